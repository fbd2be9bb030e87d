"""Classification of whole cases end to end: phantoms with and without a difference, in 2D and 3D, and mistakes of the user."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import nnssl
from nnssl.checkpoint import read_checkpoint, write_checkpoint
from nnssl.cli import evaluate
from nnssl.data.case_store import CaseProperties, write_case
from nnssl.data.phantoms import LABELS, make_phantom
from nnssl.environment import variables
from nnssl.evaluation import cross_validation
from nnssl.evaluation.case_features import reading_of
from nnssl.evaluation.classification import Classification, read_classification
from nnssl.evaluation.classify import ClassifySettings, classify
from nnssl.log import lines_to
from nnssl.paths import Folders
from nnssl.weights.opened_checkpoint import open_checkpoint
from tests.nnssl.cli.test_show import write_weights
from tests.trainers.conftest import NAME, SHAPE, SPACING_MM, plan_toy

CASES = 24
ALICE = ("encoder.stages.0.", "encoder.stages.1.", "decoder.encoder.stages.0.")


def make_scan(number: int) -> np.ndarray:
    """Return a normalised phantom; every second one has a bright lesion in the liver."""
    volume, labels = make_phantom(number, SHAPE, SPACING_MM)
    volume = (volume - volume.mean()) / volume.std()
    if number % 2:
        liver = np.argwhere(labels == LABELS["liver"])
        centre = liver[len(liver) // 2]
        distance_mm = np.linalg.norm((np.indices(SHAPE).T - centre) * SPACING_MM, axis=-1).T
        volume[distance_mm < 4] += 5
    return volume[None].astype(np.float32)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Phantoms preprocessed for a toy plan, with weights of several configurations; made once."""
    root = tmp_path_factory.mktemp("classify")
    folders = Folders(*(root / name for name in ("raw", "preprocessed", "results")))
    for folder in dataclasses.astuple(folders):
        folder.mkdir()
    with variables(**{f"nnUNet_{folder.name}": str(folder) for folder in dataclasses.astuple(folders)}):
        plan = plan_toy(folders, cases=CASES, narrow=False)
    inside = np.argwhere(np.ones(SHAPE, bool))[::7].astype(np.int16)
    properties = CaseProperties(2, SHAPE, 1, SPACING_MM, (), "digest", 1.0, 1.0, None)
    for folder in (folders.preprocessed / NAME).glob("*_cases_*"):
        for number in range(CASES):
            write_case(folder, f"toy_{number:02}", make_scan(number), inside, properties, SHAPE)
    for name in ("2d", "3d_fullres", "2d_hybrid", "3d_fullres_primus"):
        write_weights(root / f"{name}.pth", plan, name)
    return root


@pytest.fixture
def files(workspace, monkeypatch, tmp_path) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(workspace / name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cross_validation, "REPEATS", 1)
    monkeypatch.setattr(cross_validation, "STRENGTHS", (1e-3,))
    return workspace


def write_table(labels, patients=None) -> Path:
    rows = [f"toy_{number:02},{label}" for number, label in enumerate(labels)]
    if patients is not None:
        rows = [f"{row},{patient}" for row, patient in zip(rows, patients, strict=True)]
    path = Path("labels.csv")
    path.write_text("\n".join(["case,label,patient" if patients is not None else "case,label", *rows]))
    return path


def lesions(cases: int = CASES) -> list[str]:
    return ["lesion" if number % 2 else "none" for number in range(cases)]


def run(files, name="2d", table=None, **settings) -> Classification:
    values = {"patches": 2, "folds": 3, "seed": 1, "device": "cpu", **settings}
    return classify(table or write_table(lesions()), files / f"{name}.pth", settings=ClassifySettings(**values))


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_a_difference_that_random_networks_see_is_found_and_shuffled_labels_are_not(files, name):
    found = run(files, name, patches=24 if name == "2d" else 2)
    for auc in (found.auc.weights, found.auc.random):
        assert auc.value > 0.9
        assert auc.low > 0.7
        assert auc.low <= auc.value <= auc.high <= 1
    assert found.auc.difference.value == pytest.approx(found.auc.weights.value - found.auc.random.value)
    shuffled = run(files, name, write_table(np.random.default_rng(0).permutation(lesions())))
    for auc in (shuffled.auc.weights, shuffled.auc.random):
        assert auc.low < 0.5 < auc.high


def test_weights_equal_to_the_random_ones_differ_by_nothing(files):
    """The weights were drawn with seed 0. Slices often miss the lesion, so the AUC is below 1."""
    found = run(files, seed=0)
    assert found.auc.weights == found.auc.random
    assert (found.auc.difference.low, found.auc.difference.value, found.auc.difference.high) == (0, 0, 0)
    other = run(files, seed=1)
    assert other.auc.weights != other.auc.random


def test_result_is_written_and_read_and_is_the_same_in_another_run(files, tmp_path):
    said = []
    with lines_to(said.append):
        found = run(files, output=tmp_path / "out")
    assert read_classification(tmp_path / "out" / "classification.json") == found
    content = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert content["schema_version"] == 1
    assert (found.cases, found.patients, found.cases_seen) == (CASES, CASES, 0)
    assert [(each.label, each.cases, each.patients, each.auc) for each in found.classes] == [
        ("lesion", 12, 12, None),
        ("none", 12, 12, None),
    ]
    head, *rows, whole = [line for line in said if line.startswith(("class ", "lesion", "none", "all"))]
    assert head.split()[:3] == ["class", "cases", "patients"]
    assert [row.split()[:3] for row in rows] == [["lesion", "12", "12"], ["none", "12", "12"]]
    auc = found.auc.weights
    assert whole.split()[:3] == ["all", "24", "24"]
    assert f"{auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})" in whole
    assert run(files) == found


def test_several_classes_are_each_compared_with_the_rest(files):
    labels = [("lesion" if number % 2 else f"none{number % 4}") for number in range(CASES)]
    found = run(files, "3d_fullres", write_table(labels), patches=1)
    assert [each.label for each in found.classes] == ["lesion", "none0", "none2"]
    values = [each.auc.weights.value for each in found.classes]
    assert found.auc.weights.value == pytest.approx(np.mean(values))
    assert values[0] > 0.9  # the other two classes do not differ
    assert min(values[1:]) < values[0]


def test_cases_of_a_patient_count_as_one(files):
    """With pairs of cases, there are half as many patients, and the interval is over them."""
    labels = [("lesion" if number // 2 % 2 else "none") for number in range(CASES)]
    table = write_table(labels, [f"p{number // 2}" for number in range(CASES)])
    found = run(files, "3d_fullres", table, patches=1)
    assert (found.cases, found.patients) == (CASES, CASES // 2)
    assert [each.patients for each in found.classes] == [6, 6]
    assert found.auc.weights.low < 0.5 < found.auc.weights.high  # every patient has one scan with a lesion


@pytest.mark.parametrize(("name", "stages"), [("2d_hybrid", True), ("3d_fullres_primus", False)])
def test_networks_with_a_transformer(files, name, stages):
    found = run(files, name, write_table(lesions(6)), patches=1)
    assert bool(found.encoder_stages) == stages
    assert 0 <= found.auc.weights.value <= 1


def test_stages_are_the_last_ones_that_were_pretrained(files, tmp_path):
    content, provenance = read_checkpoint(files / "3d_fullres.pth")
    part = dataclasses.replace(provenance, pretrained=ALICE, settings={"patch_size": [8, 16, 8]})
    write_checkpoint(tmp_path / "part.pth", {"network_weights": content["network_weights"]}, part, {})
    checkpoint = open_checkpoint(tmp_path / "part.pth")
    reading = reading_of(checkpoint, checkpoint.build_network(0), 4, 0)
    assert reading.stages == (0, 1)
    assert reading.patch_vox == (8, 16, 8)
    whole = open_checkpoint(files / "3d_fullres.pth")
    network = whole.build_network(0)
    count = len(network.encoder.stages)
    reading = reading_of(whole, network, 4, 0)
    assert reading.stages == tuple(range(count))[-3:]
    assert reading.patch_vox == whole.plan.configuration("3d_fullres").patch_size
    hybrid = open_checkpoint(files / "2d_hybrid.pth")
    network = hybrid.build_network(0)
    assert network.token_stage in reading_of(hybrid, network, 4, 0).stages


def test_cases_that_pretraining_has_seen_are_counted(files, tmp_path):
    content, provenance = read_checkpoint(files / "3d_fullres.pth")
    seen = dataclasses.replace(provenance, cases=("toy_00", "toy_05", "toy_20", "another"))
    write_checkpoint(tmp_path / "seen.pth", {"network_weights": content["network_weights"]}, seen, {})
    said = []
    with lines_to(said.append):
        found = run(tmp_path, "seen", write_table(lesions(6)))
    assert found.cases_seen == 2
    assert "The pretraining has seen 2 of these cases, without their labels" in said


# the command


def command(files, *argv, table=None) -> int:
    path = table or write_table(lesions())
    return evaluate.main(
        ["--classify", str(path), "-w", str(files / "3d_fullres.pth"), "--device", "cpu", "--patches", "2", *argv]
    )


def fails(capsys, files, *argv, table=None) -> str:
    capsys.readouterr()
    assert command(files, *argv, table=table) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("nnssl_evaluate: error: ")
    assert not Path("classification.json").exists()
    return line


def test_command_prints_the_table_and_the_next_command(files, capsys):
    assert command(files, "--folds", "3", "-d", "501", table=write_table(lesions(6))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("all     ") for line in lines)
    assert lines[-1] == f"next: nnssl_finetune -d LABELLED_ID -w {files / '3d_fullres.pth'}"
    assert Path("classification.json").exists()


def test_mistakes_end_in_one_line(files, capsys, tmp_path):
    path = write_table(lesions())
    path.write_text(path.read_text() + "\nnobody,none\n")
    assert "has no preprocessed case nobody; it has toy_00, toy_01" in fails(capsys, files, table=path)
    assert "all cases have the label 'a'" in fails(capsys, files, table=write_table(["a"] * CASES))
    few = write_table(["rare"] * 4 + ["usual"] * 20)
    line = fails(capsys, files, table=few)
    assert "--folds must be at most 4, the number of patients with the label 'rare' in labels.csv, got 5" in line
    assert "--folds must be at least 3, got 2" in fails(capsys, files, "--folds", "2", table=few)
    few.write_text("name,label\n")
    assert "must have the columns 'case' and 'label'" in fails(capsys, files, table=few)
    assert "none.csv: cannot be read as a table" in fails(capsys, files, table=Path("none.csv"))
    assert "there is no such checkpoint" in fails(capsys, files, "-w", "none.pth")
    (tmp_path / "text.pth").write_text("weights")
    assert "text.pth: is not a checkpoint" in fails(capsys, files, "-w", "text.pth")
    assert "data set 77 was not found" in fails(capsys, files, "-d", "77")
    assert "the folder is not writable" in fails(capsys, files, "-o", "/dev/null/here")


def test_weights_that_do_not_fit_or_were_made_elsewhere(files, capsys, tmp_path):
    content, provenance = read_checkpoint(files / "3d_fullres.pth")
    weights = dict(list(content["network_weights"].items())[1:])
    write_checkpoint(tmp_path / "part.pth", {"network_weights": weights}, provenance, {})
    assert "do not fit the network of its plan" in fails(capsys, files, "-w", "part.pth")
    import torch

    torch.save({"network_weights": {}}, tmp_path / "bare.pth")
    assert "bare.pth: has weights of a training but no plans" in fails(capsys, files, "-w", "bare.pth")


def test_cases_of_another_modality_are_refused(files, capsys, tmp_path, monkeypatch):
    shutil.copytree(files / "preprocessed" / NAME, tmp_path / NAME)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    plan = tmp_path / NAME / "nnsslPlans.json"
    content = json.loads(plan.read_text())
    content["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    plan.write_text(json.dumps(content))
    assert "use a data set of the same modality" in fails(capsys, files)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give the folders PREDICTIONS and REFERENCES, or --classify FILE.csv"),
        (["predictions"], "give the folders PREDICTIONS and REFERENCES"),
        (["a", "b", "-w", "a.pth"], "--weights needs --classify FILE.csv"),
        (["a", "b", "--folds", "3"], "--folds needs --classify FILE.csv"),
        (["--classify", "a.csv", "--labels", "dataset.json"], "--labels belongs to segmentations"),
        (["--classify", "a.csv", "--tolerance-mm", "1"], "--tolerance-mm belongs to segmentations"),
        (["predictions", "--classify", "a.csv"], "--classify takes no folders of segmentations, got predictions"),
    ],
)
def test_the_two_evaluations_are_kept_apart(capsys, argv, message):
    assert evaluate.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_public_name():
    assert nnssl.classify is classify
