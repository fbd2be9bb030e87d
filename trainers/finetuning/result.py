"""``finetune.json``: the settings of one arm of a comparison and its Dice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nnssl import schema
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.segmentation_files import case_name
from nnssl.files import read_json
from nnssl.schema import STRICT
from nnssl.tables import align, points, signed_points
from trainers.finetuning.schedule import FinetuneSchedule

SCHEMA_VERSION = 3
FILE_NAME = "finetune.json"


@dataclass(frozen=True)
class ArmResult:
    """Result of a finished arm: its initial weights, its cases, and its Dice on the held-out cases."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    nnssl_version: str
    mode: str
    """``finetune``, ``linear`` or ``mean_teacher``."""
    arm: str
    """Pretext method of the weights, or ``scratch``, followed by the mode if it is not ``finetune``: ``scratch-linear``."""
    dataset_name: str
    plans_name: str
    configuration: str
    weights: str | None
    """Checkpoint that the arm started from; None for random weights."""
    weights_digest: str | None
    """Digest of that file's bytes."""
    schedule: FinetuneSchedule
    seed: int
    fold: int | str | None
    """Fold of nnU-Net's cross-validation, or ``all``; None for cases that were chosen otherwise."""
    train_cases: tuple[str, ...]
    test_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    """Cases that were predicted to choose between arms; ``dice`` does not contain them."""
    unlabelled_cases: tuple[str, ...]
    """Cases whose images the mean teacher saw besides those of the training cases; empty in other modes."""
    mirroring: bool
    """Whether the held-out cases were predicted as the mean over all mirrored images, as nnU-Net does."""
    num_parameters: int
    dice: dict[str, float | None]
    """Mean Dice over the held-out cases by class or region; None if a class is in no reference and no prediction."""
    mean_dice: float | None
    """Mean over the classes."""
    model_folder: str
    predict_command: str
    """Command of stock nnU-Net that predicts with this model."""


def read_result(path: Path) -> ArmResult:
    """Read a ``finetune.json``.

    Raises:
        ArgumentError: If the file is missing, has another schema version or a wrong key.
    """
    try:
        return schema.read(ArmResult, path, "fine-tuning result", "fine-tune again with restart")
    except UserError as error:
        raise ArgumentError(str(error), "restart") from error


def read_dice(
    summary: Path, labels: Mapping[str, int | Sequence[int]], cases: Sequence[str]
) -> tuple[dict[str, float | None], float | None]:
    """Read the mean Dice of every class over some cases, and their mean, from nnU-Net's ``summary.json``.

    As in nnU-Net, a case counts for a class only if the class is in its reference or in the prediction.

    Args:
        summary: The file.
        labels: ``labels`` of ``dataset.json``: class names with their values, or with tuples of values for regions.
        cases: Names of the cases that count.

    Returns:
        Dice by class name, and its mean over the classes; None for a class that is in no case, and for the mean with such a
        class.
    """
    wanted = set(cases)
    measured = [
        case["metrics"]
        for case in read_json(summary, "evaluation of nnU-Net")["metric_per_case"]
        if case_name(Path(case["reference_file"])) in wanted
    ]
    dice = {}
    for name, value in labels.items():
        key = str(value) if isinstance(value, int) else str(tuple(value))
        found = [float(case[key]["Dice"]) for case in measured if key in case]
        if found:  # nnU-Net evaluates neither the background nor the ignore label
            dice[name] = _mean(found)
    values = [value for value in dice.values() if value is not None]
    return dice, sum(values) / len(values) if values and len(values) == len(dice) else None


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of the values that are numbers; None if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def comparison(results: Sequence[ArmResult]) -> list[str]:
    """Return a table with the Dice of all arms in points and the gain over scratch, if trained, and a line per schedule."""
    first = results[0]
    scratch = next((result for result in results[1:] if result.weights is None), None)
    what = "training cases" if first.fold == "all" else "held-out cases"
    header = [f"Dice (points) on {len(first.test_cases)} {what}", *(result.arm for result in results)]
    rows = [header if scratch is None else [*header, "gain"]]
    for name in [*first.dice, None]:
        values = [result.mean_dice if name is None else result.dice[name] for result in results]
        row = ["mean" if name is None else name, *map(points, values)]
        if scratch is not None:
            against = scratch.mean_dice if name is None else scratch.dice[name]
            row.append(signed_points(None if values[0] is None or against is None else values[0] - against))
        rows.append(row)
    lines = [*align(rows), *(f"{result.arm}: {describe_schedule(result.schedule)}" for result in results)]
    return lines if first.mirroring else [*lines, "predicted without mirrored images (mirroring off)"]


def describe_schedule(schedule: FinetuneSchedule) -> str:
    """Return recipe, optimizer, highest rates and what was trained in one line."""
    phases = {
        "nnunet": "nnunet",
        "warmup": f"warmup ({schedule.warmup_steps} steps)",
        "sawtooth": f"sawtooth ({schedule.new_steps} steps of new layers alone, {schedule.warmup_steps} of warm-up)",
    }[schedule.recipe]
    rates = f"{schedule.learning_rate:g}"
    if schedule.head_learning_rate != schedule.learning_rate:
        rates += f", new layers {schedule.head_learning_rate:g}"
    trained = "" if schedule.trained == "everything" else f"; trained: {schedule.trained}"
    return f"{schedule.total_steps} steps, recipe {phases}, {schedule.optimizer} at {rates}{trained}"
