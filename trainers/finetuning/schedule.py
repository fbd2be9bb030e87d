"""How long fine-tuning trains and by what: its modes, the numbers that each takes where the user gives none, a run's schedule."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from nnssl.errors import ArgumentError
from nnssl.schema import STRICT

Optimizer = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True)
class FinetuneSchedule:
    """How long an arm is trained, and by which optimizer; stands in ``finetune.json``."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int
    iterations_per_epoch: int
    warmup_epochs: int
    learning_rate: float
    """Highest learning rate, reached at the end of the warm-up."""
    batch_size: int | None
    """Patches per step; None for the plan's."""
    optimizer: Optimizer
    """nnU-Net's SGD, Adam without weight decay, or AdamW as nnU-Net trains Primus; a linear probe is trained by Adam."""


@dataclass(frozen=True)
class Mode:
    """What a mode of fine-tuning takes where the user gives none."""

    learning_rate: float
    optimizers: tuple[Optimizer, ...]
    """Those it can be trained with; the first is the default."""


MODES = {
    "finetune": Mode(0.01, ("sgd", "adam", "adamw")),  # nnU-Net
    "linear": Mode(0.01, ("adam",)),  # Pix2Rep
    "mean_teacher": Mode(0.01, ("sgd", "adam", "adamw")),  # nnU-Net, and UA-MT's too
}
ADAMW_RATE = 3e-4
"""Of nnU-Net's own trainers of Primus, which learns little by SGD."""


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
    """Return the schedule of a mode. None stands for the mode's default, or for that of Primus for a transformer.

    Raises:
        ArgumentError: If a number or the optimizer does not fit.
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
