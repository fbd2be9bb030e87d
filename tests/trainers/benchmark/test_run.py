"""A study from start to table: once with real training through the command, otherwise with made-up metrics."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from nnssl.checkpoint import load_tensors
from nnssl.cli.benchmark import main
from nnssl.draws import make_generator
from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.evaluation.metrics import CaseMetrics
from nnssl.files import write_json
from nnssl.log import lines_to
from tests.trainers.benchmark.test_study import prepare
from tests.trainers.phantom_study import LABELLED
from trainers.benchmark import run as run_module
from trainers.benchmark.arms import make_weights
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.rates import choose_rates
from trainers.benchmark.run import Part, describe_matrix, parse_part, run_cells, run_study
from trainers.finetuning.arm import arm_folder
from trainers.finetuning.result import FILE_NAME

COMMAND = [
    "-d", "4", "--from", "501", "-m", "pix2rep", "-c", "3d_fullres", "--labels", "2", "--seeds", "1", "--epochs", "1", "2",
    "--iterations-per-epoch", "2", "--batch-size", "2", "--device", "cpu", "--processes", "1", "--optimizer", "adam",
    "--learning-rate", "0.003",
]  # fmt: skip
LABELS = ("liver", "spleen", "stomach", "aorta")


@pytest.fixture(scope="module")
def finished(phantoms, tmp_path_factory):
    """Folders of a study that is run through the command: the results folder, and nnU-Net's folders by name."""
    results = tmp_path_factory.mktemp("study") / "results"
    results.mkdir()
    names = {"raw": phantoms / "raw", "preprocessed": phantoms / "preprocessed", "results": results}
    return results, names


def call(names, capsys, *more) -> list[str]:
    with variables(NNSSL_PRECISION="float32", **{f"nnUNet_{name}": str(path) for name, path in names.items()}):
        assert main([*COMMAND, *more]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.nightly
@pytest.mark.figures
def test_the_command_from_nothing_to_the_report(finished, capsys):
    results, names = finished
    before = sorted(path for folder in names.values() for path in folder.rglob("*"))
    dry = "\n".join(call(names, capsys, "--dry-run"))
    assert sorted(path for folder in names.values() for path in folder.rglob("*")) == before  # it writes nothing
    assert "pix2rep: weights will be pretrained on Dataset501_Unlabelled" in dry
    assert re.search(r"scratch +finetune +2 +0/1", dry)
    assert re.search(r"4 cells: about .* from timed steps of the bare network", dry)

    said = call(names, capsys)
    cells = [line for line in said if line.startswith("[")]
    assert [line[:5] for line in cells] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "scratch, finetune, 2 labelled, seed 0, 2 steps" in cells[0]
    folder = results / LABELLED / "nnssl_benchmark_study"
    assert {path.name for path in folder.iterdir()} >= {
        "report.html",
        "results.csv",
        "table.md",
        "study.json",
        "log.txt",
    }

    rows = list(csv.DictReader((folder / "results.csv").open()))
    study = json.loads((folder / "study.json").read_text())
    assert len(rows) == 4 * len(study["test_cases"]) * len(LABELS)
    assert {row["steps"] for row in rows} == {"2", "4"}
    # the Dice of the table is nnU-Net's own
    for path in results.glob(f"{LABELLED}/nnssl_*/{FILE_NAME}"):
        result = json.loads(path.read_text())
        steps = result["schedule"]["epochs"] * 2
        own = [row for row in rows if row["arm"] == result["arm"] and int(row["steps"]) == steps]
        for label, dice in result["dice"].items():
            values = [float(row["dice"]) for row in own if row["class"] == label and row["dice"]]
            assert dice == pytest.approx(sum(values) / len(values), abs=1e-6)
    page = (folder / "report.html").read_text()
    assert "1 label" in page or "2 label" in page
    assert "nnssl_pretrain -m pix2rep" in page
    assert "nnssl_benchmark -d 4" in page
    assert page.count("data:image/png;base64,") >= 3  # segmentations, similarity, embedding

    # again: nothing is trained, the table is the same
    table = (folder / "table.md").read_text()
    times = {path: path.stat().st_mtime_ns for path in results.rglob("checkpoint_final.pth")}
    assert not [line for line in call(names, capsys) if line.startswith("[")]
    assert (folder / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in results.rglob("checkpoint_final.pth")} == times
    assert "all cells are trained" in "\n".join(call(names, capsys, "--dry-run"))


class Killed(BaseException):
    """Stands for a signal."""


def test_every_arm_is_reported_with_the_rate_that_is_best_on_validation_patients(
    folders, pretend, monkeypatch, tmp_path
):
    """The rate that wins on the held-out cases loses on the validation cases, and is not the one that is reported."""
    study = prepare(folders, learning_rates=(0.01, 0.001), validation_patients=1, labels=(1,), epochs=(1,))
    cells = StudyCells(study)
    rate_of = {cells.folder(cell).name: cell.rate for cell in study.cells if cells.has_weights(cell.arm)}

    def evaluate(predictions, references, labels, tolerance_mm, ignore, processes, cases, surfaces=True):
        high = rate_of[Path(predictions).parent.parent.name] == 0.01
        dice = 0.4 if high == (set(cases) == set(study.validation)) else 0.3
        return [CaseMetrics(case, label, dice, 0.5, 3.0, 1.0, 1.0) for case in cases for label in LABELS]

    monkeypatch.setattr(run_module, "evaluate_folders", evaluate)
    own = [cell for cell in study.cells if cells.has_weights(cell.arm)]
    run_cells(cells, tmp_path, Part())
    assert {(choice.arm, choice.chosen) for choice in choose_rates(cells)} == {(cell.arm, 0.01) for cell in own}
    assert choose_rates(cells)[0].dice == pytest.approx({0.01: 0.4, 0.001: 0.3})
    assert {cell.rate for cell in cells.reported()} == {0.01}
    assert {entry.dice for cell in cells.finished() for entry in cell.metrics} == {0.3}
    assert {entry.case for cell in cells.finished() for entry in cell.metrics} == set(study.test)
    # with a cell missing, the choice is open and the arm is not reported
    cells.metrics_path(own[0]).unlink()
    assert own[0].arm not in {choice.arm for choice in choose_rates(cells)} | {cell.arm for cell in cells.reported()}


@pytest.fixture
def pretend(monkeypatch):
    """Replace training, prediction and evaluation by made-up metrics; after ``pretend.after`` cells the study is killed."""

    class Pretend:
        after = 10**9
        trained: list[str]

    state = Pretend()
    state.trained = []

    def run_arm(task, weights, folders, restart):
        folder = arm_folder(task, weights, folders)
        if len(state.trained) >= state.after:
            raise Killed
        state.trained.append(folder.name)
        (folder / "fold_0").mkdir(parents=True, exist_ok=True)
        return Result(dict.fromkeys(LABELS, 0.5))

    def evaluate(predictions, references, labels, tolerance_mm, ignore, processes, cases, surfaces=True):
        generator = make_generator(0, str(Path(predictions).parent.parent.name))
        return [
            CaseMetrics(case, label, float(torch.rand(1, generator=generator)), 0.5, 3.0, 1.0, 1.0)
            for case in cases
            for label in LABELS
        ]

    monkeypatch.setattr(run_module, "run_arm", run_arm)
    monkeypatch.setattr(run_module, "evaluate_folders", evaluate)
    monkeypatch.setattr(run_module, "prepare_data", lambda *arguments: None)
    monkeypatch.setattr(run_module, "read_result", lambda path: Result({}))
    return state


class Result:
    mean_dice = 0.5

    def __init__(self, dice):
        self.dice = dice


def make_study(folders, arms=("pix2rep",)):
    study = prepare(folders, arms=arms)
    for pretraining in study.pretrainings.values():
        assert study.source is not None
        if not pretraining.finished:
            make_weights(pretraining, study.source)
    return prepare(folders, arms=arms)


def fill(study, folder, say=print) -> StudyCells:
    """Fill the cells of a study that are not finished yet, and return them."""
    cells = StudyCells(study)
    with lines_to(say):
        run_cells(cells, folder, Part())
    return cells


def test_killed_at_any_cell_it_ends_in_the_same_table(folders, pretend, tmp_path):
    study = make_study(folders)
    whole = fill(study, tmp_path)
    table, order = whole.table(), list(pretend.trained)
    assert len(order) == len(study.cells) == 16
    for path in folders.results.rglob("metrics_*.csv"):
        path.unlink()
    pretend.trained.clear()
    for after in (0, 1, 5, 15):
        pretend.after = after
        with pytest.raises(Killed):
            fill(study, tmp_path)
        assert len(pretend.trained) == after
    pretend.after = 16
    cells = fill(study, tmp_path)
    assert pretend.trained == order
    assert cells.table() == table


def test_parts_share_out_all_cells_and_the_last_one_reports(folders, pretend, tmp_path, monkeypatch):
    study = make_study(folders)
    reports = []
    monkeypatch.setattr(
        "trainers.benchmark.report_inputs.write_results", lambda cells, folder, command, notes: reports.append(cells)
    )
    trained = []
    for number in (1, 2, 3):
        assert not reports
        run_study(study, tmp_path, Part(number, 3), "command")
        trained.append(list(pretend.trained))
        pretend.trained.clear()
    assert len(reports) == 1
    assert sum(map(len, trained)) == 16
    assert {len(part) for part in trained} == {5, 6}
    assert len({name for part in trained for name in part}) == 16


def test_cells_wait_for_weights_that_another_part_makes(folders, pretend, tmp_path, monkeypatch):
    study = prepare(folders)
    monkeypatch.setattr(run_module, "make_weights", lambda *arguments: pytest.fail("not of this part"))
    said: list[str] = []
    with lines_to(said.append):
        assert run_study(study, tmp_path, Part(2, 2), "command") is None
    assert any("cells wait for the weights of pix2rep" in line for line in said)
    assert all("scratch" in name for name in pretend.trained)


@pytest.mark.nightly
def test_a_larger_study_takes_over_the_cells_of_a_smaller(folders, pretend, tmp_path):
    small, large = make_study(folders), make_study(folders, ("pix2rep", "pix2rep_v2"))
    fill(small, tmp_path)
    pretend.trained.clear()
    cells = fill(large, tmp_path)
    assert len(pretend.trained) == 8
    assert all("pix2rep-v2" in name for name in pretend.trained)
    assert re.search(r"pix2rep_v2 +finetune +1 +2/2 +2/2", "\n".join(describe_matrix(cells)))


@pytest.mark.nightly
def test_weights_that_start_the_network_alike_share_their_cells(folders, pretend, tmp_path):
    """Arms that differ only in weights outside the fine-tuned network share their cells, and a message reports this."""
    first = make_study(folders).weights_path("pix2rep")
    content = load_tensors(first)
    for name, changed in (("twin", "transformer.gate"), ("other", "encoder.stages.0.0.convs.0.conv.weight")):
        tensors = dict(content["network_weights"])
        tensors[changed] = torch.ones_like(tensors[changed]) if changed in tensors else torch.ones(1)
        torch.save({**content, "network_weights": tensors}, tmp_path / f"{name}.pth")
    study = make_study(folders, ("pix2rep", f"twin={tmp_path / 'twin.pth'}", f"other={tmp_path / 'other.pth'}"))
    said: list[str] = []
    cells = fill(study, tmp_path, said.append)
    assert all(map(cells.is_finished, study.cells))
    assert len(study.cells) == 4 * 8
    assert len(pretend.trained) == len(set(pretend.trained)) == 3 * 8
    assert [line[:5] for line in said if "the same weights as pix2rep" in line] == ["twin:"]


def test_networks_of_other_labels_are_refused(folders, pretend, tmp_path):
    study = make_study(folders)
    cells = StudyCells(study)
    cells.classes = {"liver": 1, "kidney": 2}
    with pytest.raises(
        UserError, match=": trained with the labels liver, spleen, stomach, aorta, .* now has liver, kidney"
    ):
        run_cells(cells, tmp_path, Part())


def test_a_plan_that_has_changed_in_the_meantime_is_refused(folders, pretend, tmp_path):
    study = make_study(folders)
    path = study.adopted.path
    before = path.read_text() if path.exists() else None
    try:
        write_json(path, {**study.adopted.content, "configurations": {}})
        with pytest.raises(UserError, match=r"nnsslPlans\.json: the plan has changed since the study began"):
            run_study(study, tmp_path, Part(), "command")
    finally:
        path.with_name("nnsslPlansFrom501.json").unlink()
        path.unlink() if before is None else path.write_text(before)
    assert not pretend.trained


def test_parts():
    assert parse_part("3/8") == Part(3, 8)
    for text in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="part must be i/n"):
            parse_part(text)
