"""How long finished cells took: recorded by the study when it fills a cell, or else read from the files of the cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from nnssl import schema
from nnssl.checkpoint import FINAL, load_tensors
from nnssl.schema import STRICT
from trainers.finetuning.result import FILE_NAME

SCHEMA_VERSION = 1
TIMES_NAME = "benchmark_times.json"


@dataclass(frozen=True)
class CellTimes:
    """Duration of a cell."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    seconds_per_step: float
    """Duration of the training per optimizer step, including the held-out batches."""
    other_seconds: float
    """Duration of everything else: set-up, prediction and evaluation."""


def record_times(folder: Path, steps: int, started: float, seconds: float) -> None:
    """Write how long a cell took; nothing if its log has no epochs.

    Args:
        folder: Model folder of the cell.
        steps: Number of its optimizer steps.
        started: Time at which the work on it began, in seconds as ``time.time`` returns it.
        seconds: Seconds since then, in which it was trained, perhaps from a checkpoint on, and evaluated.
    """
    epochs = _epochs(folder)
    if not epochs:
        return
    own = sum(end - start for start, end in epochs if start >= started)
    times = CellTimes(SCHEMA_VERSION, _per_step(epochs, steps), max(0.0, seconds - own))
    schema.write(folder / TIMES_NAME, times)


def times_of(folder: Path, steps: int) -> CellTimes | None:
    """Return how long a finished cell took; None if its files do not tell.

    Args:
        folder: Model folder of the cell.
        steps: Number of its optimizer steps.
    """
    if (folder / TIMES_NAME).exists():
        return schema.read(CellTimes, folder / TIMES_NAME, "record of a cell's duration", "delete the file")
    final = folder / "fold_0" / FINAL
    epochs = _epochs(folder) if (folder / FILE_NAME).exists() else []
    if not epochs:
        return None
    # A cell that nnssl_finetune trained: its result is written after prediction, without the evaluation of the study.
    predicting = max(0.0, (folder / FILE_NAME).stat().st_mtime - final.stat().st_mtime)
    return CellTimes(SCHEMA_VERSION, _per_step(epochs, steps), predicting)


def median_times(times: Sequence[CellTimes]) -> CellTimes:
    """Return the medians over several cells."""
    return CellTimes(
        SCHEMA_VERSION,
        median(each.seconds_per_step for each in times),
        median(each.other_seconds for each in times),
    )


def _epochs(folder: Path) -> list[tuple[float, float]]:
    """Return the start and end of every epoch in the final checkpoint of a cell; none without it."""
    final = folder / "fold_0" / FINAL
    if not final.exists():
        return []
    log: Any = load_tensors(final)["logging"]
    log = log.get("local_logger", log)
    return list(zip(log.get("epoch_start_timestamps", []), log.get("epoch_end_timestamps", []), strict=False))


def _per_step(epochs: Sequence[tuple[float, float]], steps: int) -> float:
    return median(end - start for start, end in epochs) * len(epochs) / steps
