"""Wrong labels end the commands in one line that names case and file, before anything is preprocessed or trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.cli import evaluate as evaluate_command
from nnssl.cli import finetune as finetune_command
from nnssl.data.phantoms import write_phantom_dataset
from nnssl.files import read_json
from nnssl.paths import resolve_folders
from planners.finetune_planner import adopt_plan
from tests.trainers.finetuning.runs import DATASET
from tests.trainers.tiny_plan import tiny_plan, write_weights
from trainers.finetuning import labelled_data
from trainers.finetuning.labelled_data import prepare_data

CASES = ("phantom_0000", "phantom_0001")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_phantom_dataset(folder, DATASET, 2, seed=0, shape=(16, 24, 20))
    return folder / DATASET


@pytest.fixture
def raw(phantoms, nnunet_folders, monkeypatch) -> Path:
    """Two labelled phantoms below ``nnUNet_raw``; the fingerprint, which starts processes, exists already."""
    folder = nnunet_folders / "raw" / DATASET
    shutil.copytree(phantoms, folder)
    write_weights(nnunet_folders / "weights.pth", tiny_plan())
    return folder


def describe(raw: Path, **changes) -> None:
    content = {**read_json(raw / "dataset.json", "dataset.json"), **changes}
    (raw / "dataset.json").write_text(json.dumps({key: own for key, own in content.items() if own is not None}))


def change_label(raw: Path, case: str, value: float, dtype: type) -> Path:
    path = raw / "labelsTr" / f"{case}.nii.gz"
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image).astype(dtype)
    array[2, 3, 4] = value
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))
    return path


def fails(capsys, command, *argv: str) -> str:
    capsys.readouterr()
    assert command.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def fails_to_finetune(capsys, raw: Path) -> str:
    weights = str(raw.parents[1] / "weights.pth")
    line = fails(capsys, finetune_command, "-d", "4", "-w", weights, "--labels", "1", "--device", "cpu")
    assert not list((raw.parents[1] / "results").iterdir())
    assert not list((raw.parents[1] / "preprocessed" / DATASET).glob("nnsslPlans_3d_fullres/*"))
    return line


@pytest.mark.parametrize(("value", "dtype"), [(0.5, np.float32), (9, np.uint8), (-1, np.int16)])
def test_a_label_file_is_named_before_anything_is_made(value, dtype, raw, capsys):
    path = change_label(raw, CASES[1], value, dtype)
    line = fails_to_finetune(capsys, raw)
    assert f"case {CASES[1]}: {path} contains the value {value:g}, which is not" in line


def test_nothing_but_background_is_refused(raw, capsys):
    for path in (raw / "labelsTr").iterdir():
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image * 0, str(path))
    assert "the labels of all 2 cases contain background only" in fails_to_finetune(capsys, raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "liver": 1, "spleen": 2, "stomach": 3, "aorta": 5}}, "without gaps"),
        ({"labels": {"background": 0, "all": [1, 2, 3, 4], "liver": 1}}, "regions_class_order must list one value"),
        ({"channel_names": {"0": {"name": "CT"}}}, "channel_names must have the form"),
        ({"channel_names": None}, "has no key 'channel_names'"),
    ],
)
def test_a_dataset_json_is_named(changes, message, raw, capsys):
    describe(raw, **changes)
    line = fails_to_finetune(capsys, raw)
    assert message in line
    assert "dataset.json" in line


def segmented(raw: Path, monkeypatch, **changes) -> list[np.ndarray]:
    """Prepare the data set as fine-tuning does; return the preprocessed label maps."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    monkeypatch.setattr(labelled_data, "make_fingerprint", lambda *arguments: None)
    describe(raw, **changes)
    folders = resolve_folders()
    shutil.rmtree(folders.preprocessed / DATASET, ignore_errors=True)
    prepare_data(DATASET, adopt_plan(tiny_plan(), DATASET, folders), "3d_fullres", CASES, folders, 1)
    cases = nnUNetDatasetBlosc2(str(folders.preprocessed / DATASET / "nnsslPlans_3d_fullres"), list(CASES))
    return [np.asarray(cases.load_case(case)[1]) for case in CASES]


def test_other_spellings_give_the_same_voxels_and_a_dataset_json_for_nnunet(raw, monkeypatch):
    plain = segmented(raw, monkeypatch)
    content = read_json(raw / "dataset.json", "dataset.json")
    names = list(content["labels"])
    spelt = segmented(
        raw, monkeypatch, channel_names=None, modality=["MRI"], labels={str(n): name for n, name in enumerate(names)}
    )
    assert all(np.array_equal(*pair) for pair in zip(plain, spelt, strict=True))
    written = read_json(resolve_folders().preprocessed / DATASET / "dataset.json", "dataset.json")
    assert {key: written[key] for key in ("channel_names", "labels")} == {
        key: content[key] for key in ("channel_names", "labels")
    }


def test_regions_are_those_of_nnunet(raw, monkeypatch):
    """The classes that batches are drawn around are regions; the label maps keep their values."""
    plain = segmented(raw, monkeypatch)
    regions = {"background": 0, "all": ["1", "2", "3", "4"], "liver": [1]}
    spelt = segmented(raw, monkeypatch, labels=regions, regions_class_order=["2", 1])
    assert all(np.array_equal(*pair) for pair in zip(plain, spelt, strict=True))
    import pickle

    path = resolve_folders().preprocessed / DATASET / "nnsslPlans_3d_fullres" / f"{CASES[0]}.pkl"
    with open(path, "rb") as file:
        places = pickle.load(file)["class_locations"]  # noqa: S301  written by this test
    assert set(places) == {(1, 2, 3, 4), 1}
    assert {int(plain[0][0, z, y, x]) for _, z, y, x in places[1]} == {1}


def test_evaluate_reads_the_decathlons_labels_and_names_a_wrong_value(raw, capsys, tmp_path):
    content = read_json(raw / "dataset.json", "dataset.json")
    describe(raw, labels={str(value): name for name, value in content["labels"].items()})
    predictions = tmp_path / "predictions"
    shutil.copytree(raw / "labelsTr", predictions)
    call = [str(predictions), str(raw / "labelsTr"), "--processes", "1"]
    assert evaluate_command.main(call) == 0
    assert "liver" in capsys.readouterr().out
    path = change_label(raw, CASES[0], 0.5, np.float32)
    assert f"{path}: contains fractions" in fails(capsys, evaluate_command, *call)
    path = change_label(raw, CASES[0], 8, np.float32)
    assert f"{path}: contains the value 8, which is not a label" in fails(capsys, evaluate_command, *call)
