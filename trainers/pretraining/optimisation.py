"""Optimizer and learning rate of a pretext stage, as its settings define them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnssl.methods.protocol import ParameterGroup
from nnssl.methods.settings import TrainingSettings
from trainers.precision import clip_and_step

STEP_MILESTONES = (0.6, 0.8)
"""Shares of the run after which the step schedule divides by 10 (MoCo v1: epochs 120 and 160 of 200)."""


def make_optimizer(groups: Sequence[ParameterGroup], training: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer of the settings for a method's parameter groups; it updates all parameters in one pass (fused)."""
    listed: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "weight_decay": training.weight_decay if group.weight_decay else 0.0,
            "learning_rate_factor": group.learning_rate_factor,
        }
        for group in groups
        if len(group.parameters)
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=training.learning_rate, momentum=training.momentum[0], fused=True)
    return torch.optim.AdamW(listed, lr=training.learning_rate, betas=training.momentum, fused=True)


def learning_rate_factor(training: TrainingSettings, step: int) -> float:
    """Return the learning rate at a step as a share of the largest one.

    The share rises linearly over the warm-up. Then it is constant, is divided by 10 at 60 % and 80 % of the run, or falls
    to 0 along a half cosine.

    Args:
        training: Settings of the training.
        step: Optimizer step, from 0 to ``training.total_steps - 1``.
    """
    warmup = training.warmup_epochs * training.iterations_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    if training.learning_rate_schedule == "constant":
        return 1.0
    if training.learning_rate_schedule == "step":
        share = step / training.total_steps
        return float(0.1 ** sum(share >= milestone for milestone in STEP_MILESTONES))
    share = (step - warmup) / max(1, training.total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


def steps_at_full_rate(training: TrainingSettings, steps: int) -> float:
    """Return the sum of ``learning_rate_factor`` over the first steps: the steps at the largest rate that they amount to.

    Args:
        training: Settings of the training.
        steps: Number of optimizer steps so far.
    """
    return sum(learning_rate_factor(training, step) for step in range(steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group to ``learning_rate`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_factor"]


def step_optimizer(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, largest_norm: float
) -> Tensor:
    """Differentiate a loss, clip the gradient and step the optimizer.

    Args:
        loss: Loss to differentiate, a scalar.
        optimizer: Optimizer whose gradients are None.
        scaler: Loss scaler of float16; None for other formats.
        largest_norm: Largest norm of the gradient over all parameters; a longer gradient is scaled down.

    Returns:
        The gradient's norm before clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    (loss if scaler is None else scaler.scale(loss)).backward()
    return clip_and_step(parameters, optimizer, scaler, largest_norm)
