"""Gathers the content of a finished study's report and writes it."""

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl.data.raw import read_volume
from nnssl.errors import UserError
from nnssl.files import read_json, write_atomically
from nnssl.log import logger, silence
from nnssl.study.method_pictures import method_pictures, picture_of
from nnssl.study.report import (
    Picture,
    PretrainingCurve,
    Report,
    markdown_table,
    results_csv,
    write_rates,
    write_report,
)
from nnssl.study.segmentation_pictures import SegmentedCase, choose_cases, segmentation_figure
from nnssl.study.statistics import case_scores
from nnssl.study.table import SCRATCH, StudyTable
from nnssl.study.words import mode_name
from nnssl.tables import points
from nnssl.weights.opened_checkpoint import open_checkpoint
from trainers.benchmark.cell_times import times_of
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.rates import choose_rates
from trainers.benchmark.study import CellKey, Study
from trainers.finetuning.result import describe_schedule
from trainers.pace import format_duration
from trainers.pretraining.progress import METRICS_CSV, read_metrics

PACKAGES = ("nnssl", "torch", "nnunetv2", "dynamic-network-architectures", "batchgenerators", "numpy", "scipy", "monai")
BY_THE_USER = "command line"


def write_results(cells: StudyCells, folder: Path, command: str, notes: Sequence[str] = ()) -> StudyTable:
    """Write ``results.csv``, ``table.md`` and ``report.html`` of a study whose cells are all finished.

    Args:
        cells: Cells of the study.
        folder: Folder to write to.
        command: Command that repeats the study.
        notes: Sentences that the report shows before its own notes.

    Returns:
        The table.
    """
    table = cells.table()
    results_csv(folder / "results.csv", cells.finished())
    text = markdown_table(table)
    write_atomically(folder / "table.md", lambda file: file.write(text.encode()))
    write_report(folder / "report.html", gather_report(cells, table, command, notes))
    logger.info(text.rstrip())
    choices = choose_rates(cells)
    if choices:
        write_rates(folder / "rates.csv", choices)
    for name in ("results.csv", *(["rates.csv"] if choices else []), "table.md", "report.html"):
        logger.info(f"{name}: {folder / name}")
    return table


def gather_report(cells: StudyCells, table: StudyTable, command: str, given: Sequence[str] = ()) -> Report:
    """Return everything that the report shows."""
    study = cells.study
    notes = [
        *given,
        f"{len(study.test)} cases of {len({study.patients[case] for case in study.test})} patients are held out. "
        "Pretraining has not seen them: their voxels were compared with those of all pretraining images, and their patients "
        "with those of all pretraining cases.",
        "Every method was pretrained once. The seeds differ in the labelled patients, the random weights of the new layers "
        "and the batches, but not in the pretraining.",
    ]
    notes += _choice_notes(study)
    notes += _recipe_notes(study)
    pictures_by_arm: dict[str, tuple[Picture, ...]] = {}
    for arm in study.arms:
        try:
            pictures = _own_pictures(cells, arm.name)
        except UserError as error:
            notes.append(f"No pictures of {arm.name}: {error}.")
            continue
        if pictures:
            pictures_by_arm[arm.name] = pictures
    return Report(
        title=f"Does pretraining help on {study.dataset.name}?",
        dataset_name=study.dataset.name,
        source_name=study.plan.dataset_name,
        table=table,
        rates=choose_rates(cells),
        pictures=tuple(_segmentation_pictures(cells)),
        method_pictures=pictures_by_arm,
        curves=tuple(_curves(study)),
        decisions=study.plan.decisions,
        facts={"Versions": _versions(), "Hardware": _hardware(study.device), "Time": _times(cells)},
        commands=(*_pretraining_commands(study), command),
        notes=tuple(notes),
    )


def _choice_notes(study: Study) -> list[str]:
    """Return how the methods of arms were chosen that the user left open."""
    return [
        f"The method of {arm.name} was chosen by short runs on {study.plan.dataset_name}, without any label and without the "
        f"held-out cases. {arm.reason}."
        for arm in study.arms
        if arm.reason is not None
    ]


def _recipe_notes(study: Study) -> list[str]:
    """Return how the arms were fine-tuned at the longest length, and how their rates were chosen."""
    epochs = max(study.settings.epochs)
    first = {(cell.mode, cell.arm == SCRATCH): cell for cell in reversed(study.cells) if cell.epochs == epochs}
    notes = [
        f"{'Random' if is_scratch else 'Pretrained'} weights, {mode_name(mode)}: {describe_schedule(study.schedule(cell))}"
        f"{' or the other rates below' if cell.rate is not None and study.validation else ''}."
        for (mode, is_scratch), cell in sorted(first.items())
    ]
    if not study.settings.mirroring:
        notes.append(
            "Held-out cases were predicted without mirrored images, in all arms; nnU-Net averages over all mirrorings."
        )
    if study.validation:
        chosen_by = len({study.patients[case] for case in study.validation})
        notes.append(
            "The learning rate of every arm, except for linear probes, is the best on "
            f"{len(study.validation)} validation cases of {chosen_by} patients that are neither labelled, held out nor "
            "pretrained on."
        )
    return notes


def _own_pictures(cells: StudyCells, arm: str) -> tuple[Picture, ...]:
    weights, study = cells.weights(arm), cells.study
    assert weights is not None
    with silence():
        return method_pictures(weights.own_provenance.method, weights.path, study.folders, study.device)


def _segmentation_pictures(cells: StudyCells) -> list[Picture]:
    """Return one picture of three cases for each number of labels, from the first mode, first seed and longest training."""
    study, settings = cells.study, cells.study.settings
    mode, epochs = settings.modes[0], max(settings.epochs)
    if any(not isinstance(value, int) for value in cells.classes.values()):
        return []  # One colour per voxel cannot show regions that overlap.
    pictures = []
    for labels in sorted(settings.labels):
        arms = (SCRATCH, *(arm.name for arm in study.arms))
        keys = {
            key.arm: key
            for key in cells.reported()
            if (key.mode, key.labels, key.seed, key.epochs) == (mode, labels, 0, epochs) and key.arm in arms
        }
        if SCRATCH not in keys:
            continue
        found = {arm: case_scores(cells.read(key)) for arm, key in keys.items()}
        others = [scores for arm, scores in found.items() if arm != SCRATCH]
        gains = {
            case: float(np.mean([scores[case] for scores in others])) - score
            for case, score in found[SCRATCH].items()
            if all(case in scores for scores in others)
        }
        chosen = choose_cases(gains)
        shown = [
            _read_case(cells, case, keys, {arm: scores.get(case) for arm, scores in found.items()}) for case in chosen
        ]
        if not shown:
            continue
        values = {name: value for name, value in cells.classes.items() if isinstance(value, int)}
        title = f"{labels} labelled, {study.steps(keys[SCRATCH])} steps, seed 0"
        described = "; ".join(
            f"{case.name}: " + ", ".join(f"{arm} {note}" for arm, note in case.notes.items()) for case in shown
        )
        pictures.append(
            picture_of(
                segmentation_figure(shown, values, title),
                f"Segmentations with {title}, next to image and reference. {described}",
                f"{title}: the cases with the smallest, the median and the largest gain of the methods over scratch, selected "
                "by Dice and not by eye.",
            )
        )
    return pictures


def _read_case(
    cells: StudyCells, case: str, keys: dict[str, CellKey], scores: dict[str, float | None]
) -> SegmentedCase:
    study = cells.study
    raw = next(each for each in study.dataset.cases if each.name == case)
    volume, spacing_mm = read_volume(raw, study.dataset.reader)
    ending = study.dataset.file_ending
    predictions = {
        arm: _read_segmentation(study, cells.predictions(key) / f"{case}{ending}") for arm, key in keys.items()
    }
    notes = {arm: f"Dice {points(score)}" for arm, score in scores.items() if score is not None}
    z, y, x = spacing_mm
    reference = _read_segmentation(study, cells.references / f"{case}{ending}")
    return SegmentedCase(case, volume[0], (z, y, x), reference, predictions, notes)


def _read_segmentation(study: Study, path: Path) -> np.ndarray:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    reader = PlansManager(study.adopted.content).image_reader_writer_class()
    segmentation: np.ndarray = reader.read_seg(str(path))[0][0]
    return segmentation.astype(np.int16)


def _curves(study: Study) -> list[PretrainingCurve]:
    """Return the logged metrics of every stage of every arm whose table lies next to the weights."""
    curves = []
    for arm in study.arms:
        pretraining = study.pretrainings.get(arm.name)
        path = study.weights_path(arm.name)
        assert path is not None
        folders = pretraining.stage_folders if pretraining else (path.parent,)
        for folder in folders:
            table, run = folder / METRICS_CSV, folder / "run.json"
            if table.exists() and run.exists():
                stage = read_json(run, "settings of a run")["stage"]
                curves.append(PretrainingCurve(arm.name, stage, read_metrics(table)))
    return curves


def _pretraining_commands(study: Study) -> list[str]:
    """Return the commands that make the weights, with the settings given by the user."""
    commands = []
    for arm in study.arms:
        pretraining = study.pretrainings.get(arm.name)
        if pretraining is None:
            continue
        given: list[str] = []
        for stage, folder in zip(pretraining.stages, pretraining.stage_folders, strict=True):
            if not (folder / "run.json").exists():
                continue  # The stage was skipped because it was not needed.
            run = read_json(folder / "run.json", "settings of a run")
            name = stage.rpartition(".")[2]
            given += [
                f"{name}.{key}={_typed(entry['value'])}"
                for key, entry in run["settings"].items()
                if entry["origin"] == BY_THE_USER
            ]
        whole = pretraining.stages == tuple(stage.name for stage in pretraining.method.stages)
        options = ["--set", *given] if given else []
        plan = study.plan
        line = [
            "nnssl_pretrain", "-m", pretraining.method.name, "-d", plan.dataset_name, "-c", pretraining.configuration,
            "-p", plan.name, *options,
        ]  # fmt: skip
        if whole:
            commands.append(shlex.join(line))
    return list(dict.fromkeys(commands))


def _typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _hardware(device: torch.device) -> dict[str, str]:
    found = {"System": platform.platform(), "Processor": _processor(), "Cores": str(os.cpu_count())}
    found["Device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _times(cells: StudyCells) -> dict[str, str]:
    """Return the durations of pretraining and fine-tuning, as far as they were logged."""
    study, times = cells.study, {}
    for arm, pretraining in study.pretrainings.items():
        seconds = 0.0
        for folder in pretraining.stage_folders:
            if (folder / METRICS_CSV).exists():
                seconds += float(np.nansum(read_metrics(folder / METRICS_CSV)["epoch_seconds"]))
        provenance = open_checkpoint(pretraining.final).own_provenance
        times[f"pretraining {arm}"] = f"{format_duration(seconds)}, {provenance.total_steps} steps in its last stage"
    measured = [times_of(cells.folder(cell), study.steps(cell)) for cell in study.cells]
    total = sum(
        each.seconds_per_step * study.steps(cell) + each.other_seconds
        for each, cell in zip(measured, study.cells, strict=True)
        if each is not None
    )
    times[f"fine-tuning, {len(study.cells)} networks"] = format_duration(total)
    return times
