"""Modes of fine-tuning with their default hyper-parameters, and the schedule of a run."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from nnssl.errors import ArgumentError
from nnssl.schema import STRICT

Optimizer = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True)
class FinetuneSchedule:
    """Length and optimizer of an arm's training, as written to ``finetune.json``."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int
    iterations_per_epoch: int
    warmup_epochs: int
    learning_rate: float
    """Highest learning rate, reached at the end of the warm-up."""
    batch_size: int | None
    """Patches per step; None for the batch size of the plan."""
    optimizer: Optimizer
    """nnU-Net's SGD, Adam without weight decay, or AdamW as in nnU-Net's training of Primus. A linear probe uses Adam."""


@dataclass(frozen=True)
class Mode:
    """Default hyper-parameters of a mode of fine-tuning."""

    learning_rate: float
    optimizers: tuple[Optimizer, ...]
    """Supported optimizers; the first is the default."""


MODES = {
    "finetune": Mode(0.01, ("sgd", "adam", "adamw")),  # nnU-Net
    "linear": Mode(0.01, ("adam",)),  # Pix2Rep
    "mean_teacher": Mode(0.01, ("sgd", "adam", "adamw")),  # nnU-Net and UA-MT
}
ADAMW_RATE = 3e-4
"""Learning rate of nnU-Net's Primus trainers. Primus learns little with SGD."""


def check_mode(mode: str) -> None:
    """Check that a mode exists.

    Raises:
        ArgumentError: If it does not.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(MODES)}, got {mode}", "mode")


def make_schedule(
    mode: str,
    epochs: int,
    iterations: int,
    warmup: int | None,
    learning_rate: float | None,
    batch_size: int | None,
    optimizer: Optimizer | None,
    transformer: bool = False,
) -> FinetuneSchedule:
    """Return the schedule of a mode. None stands for the default of the mode, or of Primus if the network is a transformer.

    Raises:
        ArgumentError: If a number is out of range or the mode does not support the optimizer.
    """
    if transformer and optimizer is None and "adamw" in MODES[mode].optimizers:
        optimizer = "adamw"
    optimizer = optimizer or MODES[mode].optimizers[0]
    if learning_rate is None:
        learning_rate = ADAMW_RATE if optimizer == "adamw" else MODES[mode].learning_rate
    if optimizer not in MODES[mode].optimizers:
        known = " or ".join(MODES[mode].optimizers)
        raise ArgumentError(f"optimizer must be {known} in mode {mode}, got {optimizer}", "optimizer", "mode")
    warmup = epochs // 20 if warmup is None else warmup
    if not 0 <= warmup < max(1, epochs):
        raise ArgumentError(
            f"warmup_epochs must be between 0 and {epochs - 1} with {epochs} epochs, got {warmup}", "warmup_epochs"
        )
    _check_at_least_1(epochs=epochs, iterations_per_epoch=iterations)
    if learning_rate <= 0:
        raise ArgumentError(f"learning_rate must be above 0, got {learning_rate:g}", "learning_rate")
    if batch_size is not None:
        _check_at_least_1(batch_size=batch_size)
    return FinetuneSchedule(epochs, iterations, warmup, learning_rate, batch_size, optimizer)


def _check_at_least_1(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}", name)
