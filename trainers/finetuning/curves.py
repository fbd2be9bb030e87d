"""The curves of a fine-tuning, as nnU-Net logs them, and its final Dice, under names for trackers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from trainers.finetuning.result import ArmResult


def curves_of(logged: Mapping[str, Sequence[Any]], classes: Sequence[str]) -> dict[str, list[float]]:
    """Return one value per finished epoch for every curve.

    Args:
        logged: nnU-Net's log.
        classes: Names of the classes or regions, in the order of ``dice_per_class_or_region``.
    """
    per_class = np.array(logged["dice_per_class_or_region"], dtype=float).reshape(-1, len(classes))
    times = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=False)
    return {
        "loss/training": list(map(float, logged["train_losses"])),
        "loss/held-out_patches": list(map(float, logged["val_losses"])),
        "dice/mean": list(map(float, logged["mean_fg_dice"])),
        "dice/moving_average": list(map(float, logged["ema_fg_dice"])),
        **{f"dice/{name}": per_class[:, column].tolist() for column, name in enumerate(classes)},
        "learning_rate": list(map(float, logged["lrs"])),
        "epoch_seconds": [end - start for start, end in times],
    }


def class_names(labels: Mapping[str, int | Sequence[int]], manager: LabelManager) -> list[str]:
    """Return the names of the classes or regions in the order in which nnU-Net logs their Dice.

    Args:
        labels: ``labels`` of ``dataset.json``.
        manager: nnU-Net's reading of them.
    """
    names = {_comparable(value): name for name, value in labels.items()}
    values = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    return [names[_comparable(value)] for value in values]


def final_dice(result: ArmResult) -> dict[str, float]:
    """Return the Dice on the held-out cases by class and their mean, without those that could not be computed."""
    values = {**result.dice, "mean": result.mean_dice}
    return {f"final_dice/{name}": value for name, value in values.items() if value is not None and math.isfinite(value)}


def _comparable(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, (list, tuple)) else (int(value),)
