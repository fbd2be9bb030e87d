"""Estimates how long the rest of a study takes, from the steps that were measured so far."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from nnssl.checkpoint import FINAL, load_tensors
from trainers.benchmark.arms import Pretraining, runs_of
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.study import CellKey, Study
from trainers.finetuning.result import FILE_NAME
from trainers.pace import format_duration
from trainers.precision import choose_precision
from trainers.pretraining.progress import METRICS_CSV, read_metrics

TRIAL_STEPS = 3
"""Number of steps of the bare network that are timed if nothing was measured yet, after one step to warm up."""


def cell_seconds(folder: Path, steps: int) -> tuple[float, float] | None:
    """Return the seconds per step and the seconds of prediction and evaluation of a finished cell.

    Args:
        folder: Model folder of the cell.
        steps: Number of its optimizer steps.

    Returns:
        Both numbers; None if the log does not contain them.
    """
    final = folder / "fold_0" / FINAL
    if not (folder / FILE_NAME).exists() or not final.exists():
        return None
    log: Any = load_tensors(final)["logging"]
    log = log.get("local_logger", log)
    starts, ends = log.get("epoch_start_timestamps"), log.get("epoch_end_timestamps")
    if not starts or not ends:
        return None
    epochs = [end - start for start, end in zip(starts, ends, strict=False)]
    evaluation = max(0.0, (folder / FILE_NAME).stat().st_mtime - final.stat().st_mtime)
    return median(epochs) * len(epochs) / steps, evaluation


def estimate_seconds(cells: StudyCells, left: Sequence[CellKey]) -> float | None:
    """Return the seconds that cells will take, from finished cells of the same mode; None if there are none.

    Args:
        cells: Cells of the study.
        left: Cells that are not trained.
    """
    total = 0.0
    for mode in {cell.mode for cell in left}:
        measured = _measured(cells, mode)
        if measured is None:
            return None
        per_step, evaluation = measured
        total += sum(cells.study.steps(cell) * per_step + evaluation for cell in left if cell.mode == mode)
    return total


def _measured(cells: StudyCells, mode: str, most: int = 12) -> tuple[float, float] | None:
    """Return the medians of ``cell_seconds`` over the last finished cells of a mode."""
    finished = [cell for cell in cells.study.cells if cell.mode == mode and cells.is_trained(cell)][-most:]
    found = [cell_seconds(cells.folder(cell), cells.study.steps(cell)) for cell in finished]
    values = [value for value in found if value is not None]
    if not values:
        return None
    return median(value[0] for value in values), median(value[1] for value in values)


def time_bare_step(study: Study, batch_size: int | None) -> float:
    """Return the seconds of a forward and a backward pass of the network on a batch, without data loading.

    Args:
        study: Study that fine-tunes the network.
        batch_size: Patches per step; None for the plan's.
    """
    configuration = study.nnunet_configuration
    channels = len(configuration["normalization_schemes"])
    network = study.build_network().to(study.device)
    precision = choose_precision(study.device)
    precision.lay_out(network, len(configuration["patch_size"]))
    batch_size = batch_size or configuration["batch_size"]
    volumes: Any = torch.zeros(batch_size, channels, *configuration["patch_size"], device=study.device)
    volumes = precision.lay_out(volumes, len(configuration["patch_size"]))
    started = 0.0
    for step in range(TRIAL_STEPS + 1):
        with precision.autocast(study.device):
            outputs = network(volumes)
        first = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        first.float().mean().backward()
        if step == 0:
            _wait(study.device)
            started = perf_counter()
    _wait(study.device)
    return (perf_counter() - started) / TRIAL_STEPS


def estimate_pretraining(study: Study, pretraining: Pretraining) -> tuple[float, str]:
    """Return the seconds that a pretraining will take, and the measurement that the estimate is based on."""
    assert study.source is not None
    seconds, source = 0.0, "measured epochs"
    folders = dict(zip(pretraining.stages, pretraining.stage_folders, strict=True))
    for run in runs_of(pretraining.method, pretraining.stages, pretraining.overrides, study.source):
        stage, training = run.stage, run.settings.training
        folder = folders[stage.name]
        logged = folder / METRICS_CSV
        epochs = read_metrics(logged)["epoch_seconds"] if logged.exists() else []
        if epochs:
            seconds += median(epochs) * training.epochs
            continue
        source = "timed steps of the bare network"
        passes = stage.encoder_graphs + stage.encoder_passes / 3  # A pass without a graph costs about a third.
        seconds += time_bare_step(study, training.batch_size) * max(passes, 1) * training.total_steps
    return seconds, source


def describe_estimate(cells: StudyCells) -> list[str]:
    """Return lines with the estimated duration of the rest of a study."""
    study = cells.study
    lines = []
    for arm, pretraining in study.pretrainings.items():
        if not pretraining.finished:
            seconds, source = estimate_pretraining(study, pretraining)
            lines.append(f"pretraining {arm}: about {format_duration(seconds)}, from {source}")
    left = [cell for cell in study.cells if not cells.is_trained(cell)]
    if not left:
        return [*lines, "all cells are trained"]
    seconds = estimate_seconds(cells, left) or 0.0
    source = "finished cells"
    if not seconds:
        seconds = time_bare_step(study, study.settings.batch_size) * sum(map(study.steps, left))
        source = "timed steps of the bare network, without prediction"
    return [*lines, f"{len(left)} cells: about {format_duration(seconds)} in one process, from {source}"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
