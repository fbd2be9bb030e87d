"""The optimizer of a fine-tuning: which parameters are pretrained, new or frozen, and their learning rate at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nnssl.errors import ArgumentError
from nnssl.weights.tensor_names import HEAD
from trainers.finetuning.schedule import FinetuneSchedule, Trained, rate_share

DECODERS = ("decoder.", "up_projection.")
"""Prefixes of the decoders of U-Nets and Primus; ``decoder.encoder.`` is nnU-Net's second name for the encoder."""
GRADIENT_NORM = 12  # nnU-Net's
TRANSFORMER_GRADIENT_NORM = 1  # from nnU-Net's Primus trainers, which use AdamW


@dataclass(frozen=True)
class TrainedParameters:
    """The parameters of a network that are trained.

    Attributes:
        pretrained: Parameters that a checkpoint pretrained.
        new: Parameters with random weights, among them the segmentation layers.
    """

    pretrained: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]


def choose_parameters(network: nn.Module, prefixes: Sequence[str], trained: Trained) -> TrainedParameters:
    """Divide the parameters that are trained into pretrained and new ones; all others are frozen in place.

    Args:
        network: The network.
        prefixes: Prefixes of the names of pretrained parameters; empty for random weights. Segmentation layers count as
            pretrained only if a prefix names them alone, because nnU-Net's loader skips them.
        trained: What is trained.

    Raises:
        ArgumentError: If nothing would be trained.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    pretrained: list[nn.Parameter] = []
    new: list[nn.Parameter] = []
    keeps_head = any(prefix.startswith(HEAD) for prefix in prefixes)
    for parameter, own in names.items():
        is_new = (own[0].startswith(HEAD) and not keeps_head) or not any(
            name.startswith(tuple(prefixes)) for name in own
        )
        chosen = {
            "everything": True,
            "new": is_new,
            "decoder": own[0].startswith(DECODERS),  # the first name of the encoder's parameters is encoder.
            "head": own[0].startswith(HEAD),
        }[trained]
        parameter.requires_grad_(chosen)
        if chosen:
            (new if is_new else pretrained).append(parameter)
    if not pretrained and not new:
        raise ArgumentError(
            f"trained must leave something to train, got {trained} of a network without such layers", "trained"
        )
    return TrainedParameters(tuple(pretrained), tuple(new))


def make_optimizer(
    parameters: TrainedParameters, schedule: FinetuneSchedule, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of a schedule, with a group for pretrained and one for new parameters, unless one is empty.

    It updates all parameters in one pass (fused): a step of a small U-Net on a CPU takes a quarter of the time.

    Args:
        parameters: Parameters that are trained.
        schedule: The schedule.
        weight_decay: nnU-Net's weight decay, for SGD.
    """
    groups = [
        {"params": list(chosen), "lr": highest, "highest": highest, "pretrained": pretrained}
        for chosen, highest, pretrained in (
            (parameters.pretrained, schedule.learning_rate, True),
            (parameters.new, schedule.head_learning_rate, False),
        )
        if chosen
    ]
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=5e-2, fused=True)
    return torch.optim.SGD(groups, momentum=0.99, nesterov=True, weight_decay=weight_decay, fused=True)


class StepSchedule:
    """The learning rates of a run, set before every step, and what its first phase leaves out. It has no state to restore.

    Args:
        optimizer: Optimizer of ``make_optimizer``.
        schedule: The schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: FinetuneSchedule) -> None:
        self.optimizer = optimizer
        self.schedule = schedule

    def step(self, epoch: int) -> None:
        """Set the rates of an epoch's first step, which nnU-Net logs. Epochs count from 0."""
        self.set_step(epoch * self.schedule.iterations_per_epoch)

    def set_step(self, step: int) -> None:
        """Set the rates of a step, counted from 0; pretrained parameters get no gradient in the first phase."""
        share = rate_share(step, self.schedule)
        only_new = step < self.schedule.new_steps
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["highest"]
            if group["pretrained"] and group["params"][0].requires_grad == only_new:
                for parameter in group["params"]:
                    parameter.requires_grad_(not only_new)
                    parameter.grad = None
