"""How long fine-tuning trains and by what: its modes, the numbers that each takes where the user gives none, a run's schedule."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from nnssl.errors import UserError
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
    """Check that there is such a mode.

    Raises:
        UserError: there is not.
    """
    if mode not in MODES:
        raise UserError(f"--mode {mode}: is not known; take one of {', '.join(MODES)}")


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
    """Return the schedule of a mode, with the mode's numbers where None is given, or those of Primus for a transformer.

    Raises:
        UserError: a number or the optimizer does not fit.
    """
    if transformer and optimizer is None and "adamw" in MODES[mode].optimizers:
        optimizer = "adamw"
    optimizer = optimizer or MODES[mode].optimizers[0]
    if learning_rate is None:
        learning_rate = ADAMW_RATE if optimizer == "adamw" else MODES[mode].learning_rate
    if optimizer not in MODES[mode].optimizers:
        raise UserError(
            f"--optimizer {optimizer}: --mode {mode} takes {' or '.join(MODES[mode].optimizers)}; leave it out"
        )
    warmup = epochs // 20 if warmup is None else warmup
    if epochs < 1 or iterations < 1:
        raise UserError(f"--epochs {epochs}, --iterations-per-epoch {iterations}: each is 1 or more")
    if not 0 <= warmup < epochs:
        raise UserError(f"--warmup-epochs {warmup}: is not within 0 to {epochs - 1}; it is part of the {epochs} epochs")
    if learning_rate <= 0:
        raise UserError(f"--learning-rate {learning_rate}: is above 0")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: is 1 or more")
    return FinetuneSchedule(epochs, iterations, warmup, learning_rate, batch_size, optimizer)
