"""The schedule of a fine-tuning, in optimizer steps: its learning rate at every step and what is trained.

Sources: polynomial decay with exponent 0.9 and its rates, nnU-Net (Isensee et al., 2021); linear warm-up, nnU-Net's
``nnUNetTrainer_warmup``; ``sawtooth``, Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", CVPR 2025,
as in nnU-Net's ``PretrainedTrainer_sawtooth``.

Deviations: nnU-Net changes the rate once per epoch, here it changes at every step; both agree at the first step of an epoch
during the decay. The lengths of warm-up and first phase are shares of the run, so that a short run has the shape of a long one;
for 150 and 1,000 epochs they are those of the sources. In the first phase of ``sawtooth``, nnU-Net trains the whole decoder,
here only what was not pretrained; its second rise ends at half the rate, here at the highest; for Primus it lowers the rate of
the first phase to a hundredth, here ``head_learning_rate`` does this on request; and it makes a new optimizer where all layers
begin, here the momentum of the first phase is kept.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from nnssl.schema import STRICT

Optimizer = Literal["sgd", "adam", "adamw"]
Recipe = Literal["nnunet", "warmup", "sawtooth"]
"""``nnunet``: polynomial decay; ``warmup``: a linear rise first; ``sawtooth``: new layers alone with a rise and a decay of their
own, then everything with a second rise and decay."""
Trained = Literal["everything", "new", "decoder", "head"]
"""What is trained of a pretrained network: everything, what was not pretrained, the decoder, or the segmentation layers."""
DECAY_EXPONENT = 0.9


@dataclass(frozen=True)
class FinetuneSchedule:
    """Length, recipe and optimizer of an arm's training, as written to ``finetune.json``."""

    __pydantic_config__: ClassVar = STRICT

    epochs: int
    iterations_per_epoch: int
    recipe: Recipe
    warmup_steps: int
    """Steps in which the rate of all layers rises; 0 for ``nnunet``."""
    new_steps: int
    """Steps of the first phase of ``sawtooth``, in which only new layers are trained; 0 for the other recipes."""
    learning_rate: float
    """Highest learning rate of pretrained layers, and of all layers if none is pretrained."""
    head_learning_rate: float
    """Highest learning rate of layers that were not pretrained."""
    batch_size: int | None
    """Patches per step; None for the batch size of the plan."""
    optimizer: Optimizer
    """nnU-Net's SGD, Adam without weight decay, or AdamW as in nnU-Net's training of Primus. A linear probe uses Adam."""
    trained: Trained = "everything"

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.epochs * self.iterations_per_epoch

    @property
    def held_out_batches(self) -> int:
        """Number of held-out batches per epoch for the curve: one for every 50 steps, but at least one (nnU-Net has ten)."""
        return max(1, self.iterations_per_epoch // 50)


def rate_share(step: int, schedule: FinetuneSchedule) -> float:
    """Return the learning rate at a step as a share of the highest one.

    A rise over n steps has the shares 1/n, 2/n, ..., 1. A decay over n steps has ``(1 - i / n) ** 0.9`` at its step i, from 0.

    Args:
        step: Number of steps that were taken before, from 0.
        schedule: The schedule.
    """
    rise = schedule.new_steps // 2
    if step < schedule.new_steps:
        return (step + 1) / rise if step < rise else _decay(step - rise, schedule.new_steps - rise)
    step -= schedule.new_steps
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    first = schedule.new_steps + schedule.warmup_steps
    return _decay(step - schedule.warmup_steps, schedule.total_steps - first)


def _decay(step: int, steps: int) -> float:
    return max(0.0, 1 - step / steps) ** DECAY_EXPONENT
