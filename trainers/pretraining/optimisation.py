"""Optimizer and learning rate of a pretext stage, from its settings."""

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
    """Return the optimizer that the settings name over a method's parameter groups."""
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
        return torch.optim.SGD(listed, lr=training.learning_rate, momentum=training.momentum[0])
    return torch.optim.AdamW(listed, lr=training.learning_rate, betas=training.momentum)


def learning_rate_factor(training: TrainingSettings, step: int) -> float:
    """Return the share of the largest learning rate at a step.

    Linear over the warm-up, then constant, divided by 10 at 60 % and 80 % of the run, or a half cosine to 0.

    Args:
        training: the settings.
        step: optimizer step, from 0 to ``training.total_steps - 1``.
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


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group to its factor times this one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_factor"]


def step_optimizer(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, largest_norm: float
) -> Tensor:
    """Differentiate a loss, clip the gradient and step the optimizer.

    Args:
        loss: a scalar.
        optimizer: its gradients are none.
        scaler: of float16's gradients; None for other formats.
        largest_norm: of the gradient over all parameters; a longer one is scaled down.

    Returns:
        The gradient's norm before it was clipped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    (loss if scaler is None else scaler.scale(loss)).backward()
    return clip_and_step(parameters, optimizer, scaler, largest_norm)
