"""Runs a study: pretrains what is not there yet, fills the cells one by one, and writes table and report.

Nothing of a study is kept but its cells: pretraining and fine-tuning recognise what they finished and go on where they
stopped, so a study that is killed at any moment ends in the same table, and a larger one takes over the cells of a smaller.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from filelock import FileLock

import nnssl
from nnssl.errors import UserError
from nnssl.evaluation.metrics import (
    CaseMetrics,
    evaluate_folders,
    foreground_labels,
    ignore_label,
    read_metrics_csv,
    write_metrics_csv,
)
from nnssl.evaluation.statistics import tabulate
from nnssl.evaluation.study_table import SCRATCH, Cell, StudyTable
from nnssl.export.source import SEGMENTATION
from nnssl.files import write_json
from nnssl.paths import make_writable
from trainers.benchmark.arms import make_weights
from trainers.benchmark.estimate import estimate_seconds, format_duration
from trainers.benchmark.leaks import check_disjoint
from trainers.benchmark.study import CellKey, Study
from trainers.finetune_arm import arm_folder, run_arm
from trainers.finetune_result import FILE_NAME, read_result
from trainers.labelled_data import prepare_data
from trainers.pretrained_weights import Weights, open_weights, start_digest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """The share of a study that one process of several does: ``number`` of ``count``, counted from 1."""

    number: int = 1
    count: int = 1

    def has(self, index: int) -> bool:
        """Whether the thing with this index is of this part."""
        return index % self.count == self.number - 1


def parse_part(text: str) -> Part:
    """Read ``i/n``.

    Raises:
        UserError: it is not of that form, or i is not within 1 to n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(*map(int, found.groups())) if found else Part(0, 0)
    if not 1 <= part.number <= part.count:
        raise UserError(f"--part {text}: give i/n with i from 1 to n, such as 1/4")
    return part


class Runner:
    """A study in progress: the weights that were opened and the cells that are finished."""

    def __init__(self, study: Study, folder: Path, say: Say) -> None:
        self.study = study
        self.folder = make_writable(folder)
        self.say = say
        self.opened: dict[str, Weights] = {}
        self.starts: dict[str, str] = {}
        """The arm that was opened first, by what the network takes from its weights."""
        self.labels = foreground_labels(study.dataset_json)

    def weights(self, arm: str) -> Weights | None:
        """Open the checkpoint of an arm; None for scratch.

        Raises:
            UserError: it is not there, or was made with another plan.
        """
        path = self.study.weights_path(arm)
        if path is None:
            return None
        if arm not in self.opened:
            weights = open_weights(path, self.study.folders, self.say)
            first = self.starts.setdefault(start_digest(path, self.taken), arm)
            if first != arm:
                self.say(
                    f"{arm}: gives {self.study.configuration} the same weights as {first}, so its cells are those of {first}; "
                    f"what else it trained has a place in {weights.provenance.configuration} only"
                )
                weights = self.opened[first]
            self.opened[arm] = weights
        return self.opened[arm]

    @cached_property
    def taken(self) -> list[str]:
        """Names of the tensors that the fine-tuned network takes from pretraining: all but the segmentation layers."""
        return [name for name in self.study.build_network().state_dict() if SEGMENTATION not in name]

    def has_weights(self, arm: str) -> bool:
        """Whether the weights of an arm are there."""
        path = self.study.weights_path(arm)
        return path is None or path.exists()

    def cell_folder(self, cell: CellKey) -> Path:
        """Return the model folder of a cell; its weights must be there."""
        return arm_folder(self.study.task(cell), self.weights(cell.arm), self.study.folders)

    def metrics_path(self, cell: CellKey) -> Path:
        """Return where the metrics of a cell are kept."""
        return self.cell_folder(cell) / f"metrics_{self.study.settings.tolerance_mm:g}mm.csv"

    def is_finished(self, cell: CellKey) -> bool:
        """Whether a cell was trained and evaluated."""
        return self.has_weights(cell.arm) and self.metrics_path(cell).exists()

    def is_trained(self, cell: CellKey) -> bool:
        """Whether the network of a cell is there, evaluated with this tolerance or not."""
        return self.has_weights(cell.arm) and (self.cell_folder(cell) / FILE_NAME).exists()

    # ---------------------------------------------------------------- work

    def pretrain(self, part: Part) -> None:
        """Pretrain the arms of a part that have no weights yet."""
        for index, (arm, pretraining) in enumerate(self.study.pretrainings.items()):
            if pretraining.finished or not part.has(index):
                continue
            self.say(f"Pretraining {arm} on {self.study.plan.dataset_name}, {pretraining.configuration} ...")
            assert self.study.source is not None
            make_weights(pretraining, self.study.source, self.say)

    def prepare(self) -> None:
        """Preprocess the labelled cases for fine-tuning, one process at a time."""
        study = self.study
        with FileLock(self.folder / "preparing.lock"):
            prepare_data(
                study.dataset.name,
                study.adopted,
                study.configuration,
                study.labelled,
                study.folders,
                study.processes,
                self.say,
            )

    def run_cells(self, part: Part) -> list[CellKey]:
        """Fill the cells of a part, and return those that wait for weights that another part makes."""
        waiting = []
        cells = self.study.cells
        own = [cell for index, cell in enumerate(cells) if part.has(index)]
        for cell in own:
            if not self.has_weights(cell.arm):
                waiting.append(cell)
            elif not self.is_finished(cell):
                started = perf_counter()
                self.run_cell(cell)
                self._report_cell(cell, perf_counter() - started, own)
        return waiting

    def run_cell(self, cell: CellKey) -> None:
        """Train, predict and evaluate one cell.

        Raises:
            UserError: a finished network of this cell was trained with other labels.
        """
        study, task = self.study, self.study.task(cell)
        check_disjoint(task.split.train, task.split.test, study.patients)
        folder = self.cell_folder(cell)
        with open(self.folder / "log.txt", "a", buffering=1) as log:
            result = run_arm(task, self.weights(cell.arm), study.folders, False, lambda line: _write(log, line))
        if set(result.dice) != set(self.labels):
            raise UserError(
                f"{folder / FILE_NAME}: was trained with the labels {', '.join(result.dice)}, {study.dataset.name} now has "
                f"{', '.join(self.labels)}; delete {folder} to train it again"
            )
        metrics = evaluate_folders(
            folder / "fold_0" / "validation",
            study.folders.preprocessed / study.dataset.name / "gt_segmentations",
            self.labels,
            study.settings.tolerance_mm,
            ignore_label(study.dataset_json),
            study.processes,
            study.test,
        )
        write_metrics_csv(self.metrics_path(cell), metrics)

    def read_cell(self, cell: CellKey) -> Cell:
        """Return a finished cell."""
        steps = cell.epochs * self.study.settings.iterations_per_epoch
        metrics: Sequence[CaseMetrics] = read_metrics_csv(self.metrics_path(cell))
        return Cell(cell.arm, cell.mode, cell.labels, cell.seed, steps, tuple(metrics))

    def finished_cells(self) -> list[Cell]:
        """Return all cells that are finished, whichever part made them."""
        return [self.read_cell(cell) for cell in self.study.cells if self.is_finished(cell)]

    def table(self) -> StudyTable:
        """Return the table of the finished cells."""
        return tabulate(self.finished_cells(), self.study.settings.tolerance_mm)

    def _report_cell(self, cell: CellKey, seconds: float, own: Sequence[CellKey]) -> None:
        done = sum(map(self.is_finished, own))
        left = estimate_seconds(self, [each for each in own if not self.is_trained(each)])
        steps = cell.epochs * self.study.settings.iterations_per_epoch
        dice = read_result(self.cell_folder(cell) / FILE_NAME).mean_dice
        scratch = CellKey(SCRATCH, cell.mode, cell.labels, cell.seed, cell.epochs)
        beside = ""
        if cell.arm != SCRATCH and self.is_finished(scratch):
            beside = f" (scratch {_text(read_result(self.cell_folder(scratch) / FILE_NAME).mean_dice)})"
        remaining = f", {format_duration(left)} left" if left is not None and done < len(own) else ""
        self.say(
            f"[{done}/{len(own)}] {cell.arm}, {cell.mode}, {cell.labels} labelled, seed {cell.seed}, {steps} steps: "
            f"Dice {_text(dice)}{beside}, {seconds:.0f} s{remaining}"
        )


def run_study(study: Study, folder: Path, part: Part, command: str, say: Say) -> StudyTable | None:
    """Do what is left of a study, or of a part of it, and write table and report once all cells are there.

    Args:
        study: what to do.
        folder: for ``study.json``, ``results.csv`` and ``report.html``.
        part: the share of this process.
        command: that repeats the study, for the report.
        say: called with lines for the user.

    Returns:
        The table; None where cells are missing that other parts make.

    Raises:
        UserError: weights, cases or finished cells do not fit.
    """
    runner = Runner(study, folder, say)
    write_json(runner.folder / "study.json", describe_study(study, command))
    runner.pretrain(part)
    runner.prepare()
    waiting = runner.run_cells(part)
    missing = [cell for cell in study.cells if not runner.is_finished(cell)]
    if waiting:
        arms = ", ".join(sorted({cell.arm for cell in waiting}))
        say(f"{len(waiting)} cells wait for the weights of {arms}, which another part makes; run this part again then")
    if missing:
        say(f"{len(missing)} of {len(study.cells)} cells are not finished; the last part to end writes the report")
        return None
    from trainers.benchmark.report_inputs import write_results

    return write_results(runner, command)


def describe_study(study: Study, command: str) -> dict[str, Any]:
    """Return what ``study.json`` holds: everything that decides the study."""
    settings = {key: value for key, value in asdict(study.settings).items() if value is not None}
    return {
        "nnssl_version": nnssl.__version__,
        "command": command,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "dataset_name": study.dataset.name,
        "plan": study.adopted.name,
        "configuration": study.configuration,
        "weights": {arm.name: str(study.weights_path(arm.name)) for arm in study.arms},
        "test_cases": study.test,
        "patients_by_seed": [order[: max(study.settings.labels)] for order in study.orders],
    }


def study_folder(study: Study, name: str) -> Path:
    """Return the folder of a study's results, beside the models of its data set."""
    return study.folders.results / study.dataset.name / f"nnssl_benchmark_{name}"


def describe_matrix(runner: Runner) -> list[str]:
    """Return the lines of a dry run: what there is, what is to be done and how long that takes."""
    study = runner.study
    lines = []
    for arm in study.arms:
        path = study.weights_path(arm.name)
        state = "there" if runner.has_weights(arm.name) else f"to be pretrained on {study.plan.dataset_name}"
        lines.append(f"{arm.name}: weights {state} ({path})")
    lines += [
        f"fine-tuning: {study.dataset.name}, {study.configuration} of plan {study.adopted.name}, seeds 0 to "
        f"{study.settings.seeds - 1}, {len(study.test)} cases held out",
        "",
        *_matrix(runner),
        "",
    ]
    done = [cell for cell in study.cells if runner.is_finished(cell)]
    trained = sum(map(runner.is_trained, study.cells)) - len(done)
    also = f", {trained} more are trained and need only be evaluated" if trained else ""
    lines.append(f"{len(done)} of {len(study.cells)} cells are finished{also}")
    return lines


def _matrix(runner: Runner) -> list[str]:
    """Return a table with one line per arm, mode and length, and the seeds that are finished for each number of labels."""
    study = runner.study
    rows: dict[tuple[str, str, int], dict[int, list[bool]]] = {}
    for cell in study.cells:
        row = rows.setdefault((cell.arm, cell.mode, cell.epochs), {})
        row.setdefault(cell.labels, []).append(runner.is_finished(cell))
    labels = sorted(study.settings.labels)
    head = ["arm", "mode", "steps", *(f"{number} label{'' if number == 1 else 's'}" for number in labels)]
    body = [
        [arm, mode, str(epochs * study.settings.iterations_per_epoch)]
        + [f"{sum(row[number])}/{len(row[number])}" for number in labels]
        for (arm, mode, epochs), row in rows.items()
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in (head, *body)]


def _write(log: Any, line: str) -> None:
    log.write(f"{line}{os.linesep}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
