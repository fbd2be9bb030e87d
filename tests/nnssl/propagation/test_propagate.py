"""Labels carried over end to end on phantoms: the format, resuming, kinds of labels and weights, and mistakes of the user."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnssl
from nnssl.checkpoint import Provenance, write_checkpoint
from nnssl.cli import propagate as command
from nnssl.cli.plan_and_preprocess import main as plan_and_preprocess
from nnssl.data.case_store import CaseStore
from nnssl.data.phantoms import LABELS, write_phantom_dataset
from nnssl.data.raw import read_dataset
from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.networks.backbone import build_network, planned_configuration
from nnssl.networks.dense import ENCODER_AND_DECODER
from nnssl.paths import Folders
from nnssl.plan import read_plan
from nnssl.propagation.grids import read_grid, resampling_of, to_case, to_image
from nnssl.propagation.propagate import PropagateSettings, copy_segmentation, propagate
from tests.trainers.phantom_study import narrow_unet

NAME, CASES = "Dataset004_Phantoms", 4
SHAPE, SPACING_MM = (14, 24, 20), (3.0, 2.0, 2.2)
PLAN_SPACING = ("3", "2.5", "2.5")
NAMES = [f"phantom_{number:04d}" for number in range(CASES)]
FAST = PropagateSettings(prototypes=2, device="cpu")


def write_weights(path: Path, plan: dict, configuration: str, pretrained=ENCODER_AND_DECODER, seed: int = 0) -> Path:
    planned = planned_configuration(plan, configuration)
    network = build_network(planned["architecture"], 1, 2, seed)
    provenance = Provenance(
        nnssl_version="0", method="regions", stage="regions.prototypes", dataset_name=NAME, plans_name="nnsslPlans",
        configuration=configuration, plans=plan, dataset_json={}, settings={"features": "pyramid"}, seed=seed, step=1,
        total_steps=1, finished=True, pretrained=pretrained, init=None,
    )  # fmt: skip
    write_checkpoint(path, {"network_weights": network.state_dict()}, provenance, {})
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Labelled phantoms, planned and preprocessed, with random weights of several configurations; made once."""
    root = tmp_path_factory.mktemp("propagate")
    names = ("raw", "preprocessed", "results")
    for name in names:
        (root / name).mkdir()
    write_phantom_dataset(root / "raw", NAME, CASES, 0, SHAPE, SPACING_MM)
    for file in (root / "raw" / NAME).glob("*Tr/*.nii.gz"):  # an image that is moved and turned
        image = sitk.ReadImage(str(file))
        image.SetOrigin((-5.0, 7.0, 11.0))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(file))
    with variables(**{f"nnUNet_{name}": str(root / name) for name in names}):
        arguments = ["-d", "4", "--preset", "cpu", "--processes", "1", "-c", "2d", "3d_fullres"]
        assert plan_and_preprocess([*arguments, "--spacing", *PLAN_SPACING]) == 0
    plan = json.loads((root / "preprocessed" / NAME / "nnsslPlans.json").read_text())
    for configuration in plan["configurations"].values():
        narrow_unet(configuration)
    for name in ("2d", "3d_fullres", "2d_hybrid", "3d_fullres_primus"):
        write_weights(root / f"{name}.pth", plan, name)
    write_weights(root / "encoder.pth", plan, "3d_fullres", ("encoder.", "decoder.encoder."))
    write_weights(root / "other.pth", plan, "3d_fullres", seed=1)
    return root


@pytest.fixture
def files(workspace, monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(workspace / name))
    return workspace


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "confidence.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def run(files, output="drafts", weights="3d_fullres", cases=(NAMES[0],), **changes):
    settings = PropagateSettings(**{"prototypes": 2, "device": "cpu", **changes})
    return propagate(4, list(cases), files / f"{weights}.pth", output, settings)


@pytest.mark.parametrize("name", ["2d", "3d_fullres", "encoder"])
def test_drafts_have_the_format_of_nnunet(files, capsys, name):
    arguments = ["-d", "4", "--from", NAMES[0], NAMES[2], "-w", str(files / f"{name}.pth"), "-o", "drafts"]
    assert command.main([*arguments, "--prototypes", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert ("does not pretrain the decoder: labels are carried by the maps of encoder stages" in printed) == (
        name == "encoder"
    )
    folder, raw = Path("drafts"), files / "raw" / NAME
    rows = read_rows(folder)
    assert sorted(row["case"] for row in rows) == [NAMES[1], NAMES[3]]
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences)
    assert all(0 <= each <= 1 for each in confidences)
    for case in NAMES:
        image, draft = (
            sitk.ReadImage(str(path)) for path in (raw / "imagesTr" / f"{case}_0000.nii.gz", folder / f"{case}.nii.gz")
        )
        assert draft.GetPixelID() == sitk.sitkUInt8
        assert (draft.GetSize(), draft.GetOrigin(), draft.GetDirection()) == (
            image.GetSize(),
            image.GetOrigin(),
            image.GetDirection(),
        )
        assert draft.GetSpacing() == pytest.approx(image.GetSpacing())
        assert set(np.unique(sitk.GetArrayFromImage(draft))) <= set(LABELS.values())
    assert (folder / f"{NAMES[0]}.nii.gz").read_bytes() == (raw / "labelsTr" / f"{NAMES[0]}.nii.gz").read_bytes()
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == LABELS
    assert content["numTraining"] == CASES
    manager = PlansManager(json.loads((files / "preprocessed" / NAME / "nnsslPlans.json").read_text()))
    assert manager.get_label_manager(content).foreground_labels == [1, 2, 3, 4]
    reader = manager.image_reader_writer_class()
    assert reader.read_seg(str(folder / f"{NAMES[1]}.nii.gz"))[0].shape == (1, *SHAPE)
    assert (folder / "propagate.png").read_bytes()[:4] == b"\x89PNG"
    assert maybe_convert_to_dataset_name(4) == NAME


def test_labels_of_an_equal_image_come_back(files, tmp_path, monkeypatch):
    """A copy of the annotated case, every voxel a prototype: what is lost is lost by resampling only."""
    from nnssl.propagation import carry

    monkeypatch.setattr(carry, "POINTS_PER_LABEL", 100_000)
    folders = Folders(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results")
    shutil.copytree(files / "raw", folders.raw)
    shutil.copytree(files / "preprocessed", folders.preprocessed)
    shutil.copy(
        folders.raw / NAME / "imagesTr" / f"{NAMES[0]}_0000.nii.gz",
        folders.raw / NAME / "imagesTr" / "copy_0000.nii.gz",
    )
    for store in (folders.preprocessed / NAME).glob("*_cases_*"):
        for file in store.glob(f"{NAMES[0]}*"):
            shutil.copy(file, store / file.name.replace(NAMES[0], "copy"))
    Path("list.txt").write_text("copy\n")
    settings = PropagateSettings(prototypes=100_000, smoothing_mm=0.0, cases=Path("list.txt"), device="cpu")
    (draft,) = propagate(4, NAMES[:1], files / "3d_fullres.pth", "drafts", settings, folders)
    expected = read_all(folders.raw / NAME / "labelsTr")[f"{NAMES[0]}.nii.gz"]
    resampling = resampling_of(read_plan(folders.preprocessed / NAME / "nnsslPlans.json"), "3d_fullres")
    raw = read_dataset(4, folders)
    grid = read_grid(raw.cases[0], raw.reader, resampling)
    store = next((folders.preprocessed / NAME).glob("*_cases_3d*"))
    case = CaseStore(store).case("copy")
    there = to_case(expected.astype(np.int64), grid, case, resampling)
    best = to_image(np.moveaxis(np.eye(5)[there], -1, 0), grid, case, resampling)
    found = read_all(Path("drafts"))["copy.nii.gz"]
    for label in range(1, 5):
        assert dice(found == label, expected == label) > dice(best == label, expected == label) - 0.05
    assert draft.confidence > 0.7


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())


def test_an_interrupted_run_ends_like_an_uninterrupted_one(files, monkeypatch):
    from nnssl.propagation import propagate as module

    run(files, "whole")
    wrote = []

    def write(file, *rest):
        if len(wrote) == 1:
            raise KeyboardInterrupt
        wrote.append(file)
        original(file, *rest)

    original = module.write_segmentation
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_segmentation", write)
        with pytest.raises(KeyboardInterrupt):
            run(files, "parts")
    assert len(read_rows(Path("parts"))) == 1
    first = wrote[0].stat().st_mtime_ns
    run(files, "parts")
    assert wrote[0].stat().st_mtime_ns == first
    for name, values in read_all(Path("whole")).items():
        assert np.array_equal(read_all(Path("parts"))[name], values)
    for name in ("confidence.csv", "dataset.json", "propagate.json"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()


def test_drafts_of_replaced_images_are_made_again_unless_they_were_corrected(files, monkeypatch, tmp_path):
    copy = tmp_path / "own"
    shutil.copytree(files, copy)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(copy / name))
    # the copy has other paths, under which the cases are now known
    for path in (copy / "preprocessed" / NAME).rglob("phantom_*.json"):
        path.write_text(path.read_text().replace(str(files), str(copy)))
    run(copy, "drafts")
    before = read_all(Path("drafts"))
    for name in NAMES[1:3]:  # other images under the same names
        path = copy / "raw" / NAME / "imagesTr" / f"{name}_0000.nii.gz"
        old = sitk.ReadImage(str(path))
        turned = sitk.GetImageFromArray(np.ascontiguousarray(sitk.GetArrayFromImage(old)[:, ::-1] + 5))
        turned.CopyInformation(old)
        sitk.WriteImage(turned, str(path))
    draft = Path("drafts", f"{NAMES[2]}.nii.gz")
    corrected = sitk.ReadImage(str(draft))
    sitk.WriteImage(corrected * 0 + 1, str(draft))
    said: list[str] = []
    with lines_to(said.append):
        run(copy, "drafts")
    assert any(
        f"images or masks of 2 cases have changed since they were preprocessed ({NAMES[1]}, " in line for line in said
    )
    assert any(f"Images of 1 cases were replaced ({NAMES[1]}); they are labelled again" in line for line in said)
    assert any(f"images of {NAMES[2]} were replaced, but their drafts were corrected by hand" in line for line in said)
    after = read_all(Path("drafts"))
    assert [np.array_equal(after[f"{name}.nii.gz"], before[f"{name}.nii.gz"]) for name in (NAMES[1], NAMES[3])] == [
        False,
        True,
    ]
    assert (after[f"{NAMES[2]}.nii.gz"] == 1).all()
    reference = copy / "raw" / NAME / "imagesTr" / f"{NAMES[0]}_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(reference)) + 5, str(reference))
    with pytest.raises(UserError, match=f"before the images of the annotated cases {NAMES[0]} were replaced"):
        run(copy, "drafts")
    assert len(run(copy, "drafts", restart=True)) == 3


def test_other_settings_are_refused_unless_restarted(files):
    run(files)
    before = Path("drafts/confidence.csv").read_bytes()
    with pytest.raises(UserError, match=r"holds drafts with other position_weight \(0.1 there, 3.0 now\)"):
        run(files, position_weight=3.0)
    with pytest.raises(UserError, match="holds drafts with other weights_digest"):
        run(files, weights="other")
    with pytest.raises(UserError, match="holds drafts with other references"):
        run(files, cases=NAMES[:2])
    assert Path("drafts/confidence.csv").read_bytes() == before
    run(files, position_weight=3.0, cases=NAMES[1:2], restart=True)
    assert Path("drafts/confidence.csv").read_bytes() != before
    assert {row["case"] for row in read_rows(Path("drafts"))} == set(NAMES) - {NAMES[1]}


def test_annotations_are_never_overwritten(files, tmp_path):
    folder = tmp_path / "labelsTr"
    shutil.copytree(files / "raw" / NAME / "labelsTr", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for restart in (False, True):
        with pytest.raises(UserError, match="holds segmentations that nnssl_propagate did not write"):
            run(files, folder, restart=restart)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_drafts_that_were_corrected_in_place_survive_a_restart_with_them(files):
    run(files)
    folder = Path("drafts")
    shutil.copyfile(files / "raw" / NAME / "labelsTr" / f"{NAMES[1]}.nii.gz", folder / f"{NAMES[1]}.nii.gz")
    before = {name: (folder / f"{name}.nii.gz").read_bytes() for name in NAMES[:2]}
    run(files, cases=NAMES[:2], labels=folder, restart=True)
    assert {name: (folder / f"{name}.nii.gz").read_bytes() for name in NAMES[:2]} == before
    assert {row["case"] for row in read_rows(folder)} == set(NAMES[2:])


def test_an_annotated_tiff_keeps_its_spacing(tmp_path):
    """As nnU-Net reads it, which looks for the spacing beside the label map."""
    labels, copies = tmp_path / "labels", tmp_path / "copies"
    labels.mkdir()
    copies.mkdir()
    values = np.zeros((1, 4, 6, 5), np.uint8)
    values[0, 1, 2:] = 2
    Tiff3DIO().write_seg(values[0], str(labels / "case.tif"), {"spacing": (3.0, 1.5, 2.0)})
    copy_segmentation(labels / "case.tif", copies)
    copy_segmentation(copies / "case.tif", copies)
    found, properties = Tiff3DIO().read_seg(str(copies / "case.tif"))
    assert (found == values).all()
    assert properties["spacing"] == [3.0, 1.5, 2.0]


def label_folder(files, change, content=None) -> Path:
    """Return a folder with a changed label map of the first case, and a ``dataset.json`` if there is one."""
    folder = Path("labels")
    folder.mkdir()
    image = sitk.ReadImage(str(files / "raw" / NAME / "labelsTr" / f"{NAMES[0]}.nii.gz"))
    sitk.WriteImage(change(image), str(folder / f"{NAMES[0]}.nii.gz"))
    if content is not None:
        (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_ignored_voxels_are_not_used_and_regions_keep_their_values(files):
    def ignore_some(image):
        values = sitk.GetArrayFromImage(image)
        values[:5] = 5
        changed = sitk.GetImageFromArray(values)
        changed.CopyInformation(image)
        return changed

    labels = {"background": 0, "upper": [1, 2], "liver": 1, "stomach": 3, "aorta": 4, "ignore": 5}
    folder = label_folder(files, ignore_some, {"labels": labels, "regions_class_order": [2, 1, 3, 4]})
    run(files, labels=folder)
    assert json.loads(Path("drafts/dataset.json").read_text())["regions_class_order"] == [2, 1, 3, 4]
    for values in [read_all(Path("drafts"))[f"{case}.nii.gz"] for case in NAMES[1:]]:
        assert set(np.unique(values)) <= {0, 1, 2, 3, 4}
        assert len(np.unique(values)) > 2
    assert json.loads(Path("drafts/propagate.json").read_text())["label_values"] == [0, 1, 2, 3, 4]


def exit_code(arguments: list[str]) -> int:
    try:
        return command.main(arguments)
    except SystemExit as end:
        return int(str(end.code))


def shifted(image):
    image.SetOrigin((0, 0, 0))
    return image


@pytest.mark.parametrize(
    ("change", "content", "message"),
    [
        (lambda image: image[:, :-1], None, "has (14, 23, 20) voxels (z, y, x), but the image"),
        (shifted, None, "differs in origin from the image"),
        (lambda image: image * 2, None, "contains the value 6, which is not a label in"),
        (lambda image: image * 0, None, "hold background only; annotate a structure"),
        (
            lambda image: image + sitk.Cast(image == 0, image.GetPixelID()) * 5,
            {"labels": {**LABELS, "ignore": 5}},
            "hold no background (value 0); annotate voxels outside the structures",
        ),
        (lambda image: sitk.Cast(image, sitk.sitkFloat32) / 2, None, "is not a label map"),
        (lambda image: image, {"labels": {"background": 0, "a": 1}}, "which is not a label in labels/dataset.json (0, 1)"),
    ],
)  # fmt: skip
def test_label_maps_that_do_not_fit_are_one_line(files, capsys, change, content, message):
    folder = label_folder(files, change, content)
    arguments = ["-d", "4", "--from", NAMES[0], "-w", str(files / "2d.pth"), "-o", "drafts", "--labels", str(folder)]
    assert command.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(Path().glob("drafts/*.nii.gz"))


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ("2d", ["--from", "nobody"], f"--from: {NAME} has no case nobody; it has phantom_0000, phantom_0001, "),
        ("2d", ["--from", NAMES[0], NAMES[0]], "--from must be different names of annotated cases"),
        ("2d", ["--from", NAMES[0], "--labels", "."], "there is no such label map of the annotated case phantom_0000"),
        ("2d", ["--from", NAMES[0], "--position-weight", "-1"], "must be a number of at least 0, got -1"),
        ("2d", ["--from", NAMES[0], "--cases", "list.txt"], "list.txt: Dataset004_Phantoms has no preprocessed case nobody"),
        ("encoder", ["--from", NAMES[0], "--features", "single"], "--features must not be given for weights of regions"),
        ("2d_hybrid", ["--from", NAMES[0]], "its network HybridUNet has a transformer"),
        ("3d_fullres_primus", ["--from", NAMES[0]], "has no convolutional decoder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(files, capsys, weights, more, message):
    Path("list.txt").write_text("nobody\n")
    assert exit_code(["-d", "4", "-w", str(files / f"{weights}.pth"), "-o", "drafts", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_another_number_of_channels_is_refused(files, tmp_path):
    folders = Folders(tmp_path / "raw", files / "preprocessed", files / "results")
    shutil.copytree(files / "raw", folders.raw)
    folder = folders.raw / NAME
    for file in list((folder / "imagesTr").iterdir()):
        shutil.copy(file, file.with_name(file.name.replace("_0000.nii", "_0001.nii")))
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "MRI", "1": "MRI"}}))
    with pytest.raises(UserError, match=r"has 2 channel\(s\), but the weights .* are for 1"):
        propagate(4, NAMES[:1], files / "2d.pth", "drafts", FAST, folders)


def test_an_image_that_changed_since_it_was_preprocessed_is_refused(files, tmp_path):
    folders = Folders(tmp_path / "raw", files / "preprocessed", files / "results")
    shutil.copytree(files / "raw", folders.raw)
    path = folders.raw / NAME / "imagesTr" / f"{NAMES[1]}_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(path))[:-6], str(path))
    with pytest.raises(UserError, match="case phantom_0001: its preprocessed voxels have the shape"):
        propagate(4, NAMES[:1], files / "2d.pth", "drafts", FAST, folders)


def test_python_has_the_same_names():
    assert nnssl.propagate is propagate
    assert nnssl.PropagateSettings is PropagateSettings
