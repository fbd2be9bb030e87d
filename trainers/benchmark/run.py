"""Runs a study: pretrains missing weights, fills the cells one by one, and writes table and report.

The cells are the only state of a study. Pretraining and fine-tuning recognise finished work and resume where they stopped,
so a study that is killed at any moment ends in the same table, and a larger study reuses the cells of a smaller one.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, time
from typing import Any, TextIO

from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.labels import ignore_label
from nnssl.evaluation.metrics import evaluate_folders, write_metrics_csv
from nnssl.files import write_json
from nnssl.locks import only_process
from nnssl.log import lines_to, logger, silence
from nnssl.paths import make_writable
from nnssl.study.table import SCRATCH, StudyTable
from nnssl.study.words import count
from nnssl.tables import align, points
from nnssl.version import __version__
from planners.finetune_planner import adopt_plan
from trainers.benchmark.arms import check_up_to_date, make_weights
from trainers.benchmark.cell_times import record_times
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.estimate import estimate_seconds
from trainers.benchmark.patients import check_disjoint
from trainers.benchmark.study import CellKey, Study
from trainers.finetuning.arm import Task, run_arm
from trainers.finetuning.labelled_data import prepare_data
from trainers.finetuning.result import FILE_NAME, read_result
from trainers.pace import format_duration
from trainers.pretraining.pretrain import prepare_cases

LOG = "log.txt"
"""Name of the file in a study's folder that receives the messages of fine-tuning."""


@dataclass(frozen=True)
class Part:
    """The part of a study that one of several processes runs: number ``number`` of ``count``, counted from 1."""

    number: int = 1
    count: int = 1

    def has(self, index: int) -> bool:
        """Return whether the item with this index belongs to this part."""
        return index % self.count == self.number - 1


def parse_part(text: str) -> Part:
    """Read ``i/n``.

    Raises:
        ArgumentError: If the text does not have this form, or if i is not between 1 and n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(*map(int, found.groups())) if found else Part(0, 0)
    if not 1 <= part.number <= part.count:
        raise ArgumentError(f"part must be i/n with i between 1 and n, such as 1/4, got {text}", "part")
    return part


def run_study(
    study: Study,
    folder: Path,
    part: Part,
    command: str,
    dask_address: str | None = None,
    notes: Sequence[str] = (),
) -> StudyTable | None:
    """Run the unfinished rest of a study, or of a part of it, and write table and report once all cells are finished.

    Args:
        study: The study.
        folder: Folder for ``study.json``, ``results.csv`` and ``report.html``.
        part: Part that this process runs.
        command: Command that repeats the study, printed in the report.
        dask_address: Address of a Dask scheduler whose workers do all parts; None for this process.
        notes: Sentences that the report shows among its own notes.

    Returns:
        The table; None if cells of other parts are missing.

    Raises:
        UserError: If weights, cases or finished cells do not fit, if images or masks of finished weights were replaced, or if the
            cluster cannot be used.
    """
    cells = StudyCells(study)
    write_json(make_writable(folder) / "study.json", describe_study(study, command))
    if dask_address is not None:
        from trainers.benchmark.on_cluster import fill_on_cluster, pretrain_on_cluster

        _check_arms(study)
        pretrain_on_cluster(study, dask_address)
        prepare_cells(study)
        fill_on_cluster(cells, folder / LOG, dask_address)
        waiting = []
    else:
        pretrain_arms(study, part)
        prepare_cells(study)
        waiting = run_cells(cells, folder, part)
    missing = [cell for cell in study.cells if not cells.is_finished(cell)]
    if waiting:
        arms = ", ".join(sorted({cell.arm for cell in waiting}))
        logger.info(
            f"{len(waiting)} cells wait for the weights of {arms} from another part; run this part again once they exist"
        )
    if missing:
        logger.info(
            f"{len(missing)} of {len(study.cells)} cells are not finished; the last part to finish writes the report"
        )
        return None
    from trainers.benchmark.report_inputs import write_results  # slow to import

    with only_process(folder, "writing the report"):  # parts may finish at the same time
        return write_results(cells, folder, command, notes)


def prepare_source(study: Study) -> list[str]:
    """Preprocess cases of the pretraining data again whose images or masks were replaced, and return their names."""
    if study.source is None:
        return []
    used = {each.configuration for each in study.pretrainings.values()} | {study.configuration}
    return prepare_cases(study.source.plan, used, study.folders)


def pretrain_arms(study: Study, part: Part) -> None:
    """Pretrain those arms of a part that have no weights yet.

    Raises:
        UserError: If weights of an arm were pretrained on images or masks that were replaced since.
    """
    _check_arms(study)
    for index, (arm, pretraining) in enumerate(study.pretrainings.items()):
        if pretraining.finished or not part.has(index):
            continue
        logger.info(f"Pretraining {arm} on {study.plan.dataset_name}, {pretraining.configuration} ...")
        assert study.source is not None
        make_weights(pretraining, study.source)


def _check_arms(study: Study) -> None:
    for arm, pretraining in study.pretrainings.items():
        check_up_to_date(arm, pretraining, study.folders)


def prepare_cells(study: Study) -> None:
    """Write the plan of the labelled cases and preprocess them, in one process at a time.

    Raises:
        UserError: If nnU-Net cannot preprocess them, or if the study's plan was overwritten by another one meanwhile.
    """
    with only_process(make_writable(study.folders.preprocessed / study.dataset.name), "preparing labelled cases"):
        adopted = adopt_plan(study.plan.nnunet, study.dataset.name, study.folders)
        if adopted != study.adopted:
            raise UserError(
                f"{study.adopted.path}: the plan has changed since the study began; run the same command again"
            )
        prepare_data(study.dataset.name, adopted, study.configuration, study.used, study.folders, study.processes)


def run_cells(cells: StudyCells, folder: Path, part: Part) -> list[CellKey]:
    """Fill the cells of a part, and return those that wait for weights from another part.

    Args:
        cells: Cells of the study.
        folder: Folder for ``LOG``, which receives the messages of fine-tuning.
        part: Part that this process runs.
    """
    waiting = []
    own = [cell for index, cell in enumerate(cells.study.cells) if part.has(index)]
    for cell in own:
        if not cells.has_weights(cell.arm):
            waiting.append(cell)
        elif not cells.is_finished(cell):
            started = perf_counter()
            run_cell(cells, cell, folder / LOG)
            logger.info(describe_cell(cells, cell, perf_counter() - started, own))
    return waiting


def run_cell(cells: StudyCells, cell: CellKey, log: Path) -> None:
    """Train, predict and evaluate one cell.

    Args:
        cells: Cells of the study.
        cell: Cell to fill.
        log: File that the messages of fine-tuning are appended to.

    Raises:
        UserError: If a finished network of this cell was trained with other labels.
    """
    task = cells.task(cell)
    check_disjoint(task.split.train, (*task.split.test, *task.split.validation), cells.study.patients)
    folder = cells.folder(cell)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_process(folder, "filling a cell of a study"):  # studies share cells
        if not cells.is_finished(cell):
            _run_cell_alone(cells, cell, task, log)


def _run_cell_alone(cells: StudyCells, cell: CellKey, task: Task, log: Path) -> None:
    study, weights = cells.study, cells.weights(cell.arm)
    is_new, began, started = not cells.is_trained(cell), time(), perf_counter()
    with open(log, "a", buffering=1) as file, lines_to(lambda line: _write_line(file, line)):
        result = run_arm(task, weights, study.folders, False)
    if set(result.dice) != set(cells.classes):
        folder = cells.folder(cell)
        raise UserError(
            f"{folder / FILE_NAME}: trained with the labels {', '.join(result.dice)}, but {study.dataset.name} now has "
            f"{', '.join(cells.classes)}; delete {folder} to train again"
        )
    if study.validation:
        _evaluate(cells, cell, cells.validation_path(cell), study.validation, surfaces=False)  # rates follow from Dice
    _evaluate(cells, cell, cells.metrics_path(cell), study.test)
    if is_new:  # otherwise only the evaluation was missing
        record_times(cells.folder(cell), study.steps(cell), began, perf_counter() - started)


def _evaluate(cells: StudyCells, cell: CellKey, path: Path, cases: Sequence[str], surfaces: bool = True) -> None:
    """Compare a cell's predictions of some cases with their references, and write the metrics."""
    study = cells.study
    with silence():
        metrics = evaluate_folders(
            cells.predictions(cell),
            cells.references,
            cells.classes,
            study.settings.tolerance_mm,
            ignore_label(study.dataset_json),
            study.processes,
            cases,
            surfaces,
        )
    write_metrics_csv(path, metrics)


def _write_line(file: TextIO, line: str) -> None:
    file.write(f"{line}\n")


def describe_cell(
    cells: StudyCells, cell: CellKey, seconds: float, own: Sequence[CellKey], with_rest: bool = True
) -> str:
    """Return the line about a cell that was just filled: its Dice, that of scratch, and how long the rest takes."""
    done = sum(map(cells.is_finished, own))
    left = estimate_seconds(cells, [each for each in own if not cells.is_trained(each)]) if with_rest else None
    dice = read_result(cells.folder(cell) / FILE_NAME).mean_dice
    scratch = replace(cell, arm=SCRATCH)
    beside = ""
    if cell.arm != SCRATCH and cells.is_finished(scratch):
        beside = f" (scratch {points(read_result(cells.folder(scratch) / FILE_NAME).mean_dice)})"
    remaining = f", {format_duration(left)} left" if left is not None and done < len(own) else ""
    rate = "" if cell.rate is None else f", rate {cell.rate:g}"
    return (
        f"[{done}/{len(own)}] {cell.arm}, {cell.mode}, {cell.labels} labelled, seed {cell.seed}, "
        f"{cells.study.steps(cell)} steps{rate}: Dice {points(dice)} points{beside}, {seconds:.0f} s{remaining}"
    )


def describe_study(study: Study, command: str) -> dict[str, Any]:
    """Return the content of ``study.json``: everything that determines the study."""
    settings = {key: value for key, value in asdict(study.settings).items() if value is not None}
    return {
        "nnssl_version": __version__,
        "command": command,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "dataset_name": study.dataset.name,
        "plan": study.adopted.name,
        "configuration": study.configuration,
        "weights": {arm.name: str(study.weights_path(arm.name)) for arm in study.arms},
        "test_cases": study.test,
        "validation_cases": study.validation,
        "patients_by_seed": [order[: max(study.settings.labels)] for order in study.orders],
    }


def study_folder(study: Study, name: str) -> Path:
    """Return the folder of a study's results, next to the models of its data set."""
    return study.folders.results / study.dataset.name / f"nnssl_benchmark_{name}"


def describe_matrix(cells: StudyCells) -> list[str]:
    """Return the lines of a dry run: the state of weights and cells."""
    study = cells.study
    lines = []
    for arm in study.arms:
        path = study.weights_path(arm.name)
        state = "exist" if cells.has_weights(arm.name) else f"will be pretrained on {study.plan.dataset_name}"
        lines.append(f"{arm.name}: weights {state} ({path})")
    lines += [
        f"fine-tuning: {study.dataset.name}, {study.configuration} of plan {study.adopted.name}, seeds 0 to "
        f"{study.settings.seeds - 1}, {len(study.test)} cases held out",
        "",
        *_matrix(cells),
        "",
    ]
    done = [cell for cell in study.cells if cells.is_finished(cell)]
    trained = sum(map(cells.is_trained, study.cells)) - len(done)
    also = f", {trained} more are trained and only need to be evaluated" if trained else ""
    lines.append(f"{len(done)} of {len(study.cells)} cells are finished{also}")
    return lines


def _matrix(cells: StudyCells) -> list[str]:
    """Return a table with the finished seeds for each number of labels, one line per arm, mode and length."""
    study = cells.study
    rows: dict[tuple[str, str, int], dict[int, list[bool]]] = {}
    for cell in study.cells:
        row = rows.setdefault((cell.arm, cell.mode, study.steps(cell)), {})
        row.setdefault(cell.labels, []).append(cells.is_finished(cell))
    labels = sorted(study.settings.labels)
    head = ["arm", "mode", "steps", *(count(each, "label") for each in labels)]
    body = [
        [arm, mode, str(steps), *(f"{sum(row[each])}/{len(row[each])}" for each in labels)]
        for (arm, mode, steps), row in rows.items()
    ]
    return align([head, *body], left=range(len(head)))
