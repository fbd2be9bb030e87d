"""What a pretext method declares. The trainer steps, logs, saves and moves devices; a method does none of these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnssl.plan import PretextConfiguration


@dataclass(frozen=True)
class StepOutput:
    """What one step of a method gives to the trainer."""

    losses: dict[str, Tensor]
    """Weighted scalar parts; their sum is minimised and each is logged."""
    embeddings: Tensor | None = None
    """(sample, dimension), any scale: what the collapse monitors look at. None where nothing can collapse."""
    monitors: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are logged and not minimised."""
    carry: Any = None
    """Handed to ``after_step`` as it is."""


@dataclass(frozen=True)
class Exported:
    """Which weights leave."""

    pretrained: tuple[str, ...]
    """Prefixes of parameter names of the plan's network that were pretrained; the others are a seeded initialisation."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Parameters that get this value when they leave."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike."""

    parameters: Sequence[nn.Parameter]
    learning_rate_factor: float = 1.0
    weight_decay: bool = True


class PretextMethod(nn.Module):
    """Base of every pretext stage; a subclass is one file in ``nnssl/methods`` and reads like the paper.

    Args of a subclass's constructor: the plan's network; the stage's settings; the plan's ``PretextConfiguration``.
    Parameters that the stage does not train must have ``requires_grad`` switched off by the constructor.

    Class attributes:
        defaults: the settings with the paper's numbers.
    """

    defaults: ClassVar[Any]

    @classmethod
    def from_plan(cls, configuration: PretextConfiguration) -> dict[str, Any]:
        """Return the settings that the plan decides, by key (the schedule's are added by the trainer)."""
        raise NotImplementedError

    @classmethod
    def spares(cls, settings: Any) -> tuple[str, ...]:
        """Return the names of earlier stages that are of no use to this one under its settings."""
        return ()

    def partners(self) -> str | None:
        """Return what pairs the patches of a batch, neighbours then showing the same place of two scans; None for single patches.

        ``sam`` asks SAM's embeddings (``nnssl.matching``), ``body_box`` the place in the box around the body.
        """
        return None

    def make_views(self, volumes: Tensor, generators: Sequence[torch.Generator]) -> Any:
        """Return the views of a batch of raw patches (batch, channel, *shape), made on its device.

        ``generators`` holds one generator per sample; every random number of the step comes from them.
        """
        raise NotImplementedError

    def losses(self, views: Any, progress: float) -> StepOutput:
        """Return the parts of the loss; ``progress`` runs from 0 to 1 over the stage."""
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return what the optimizer gets."""
        raise NotImplementedError

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (student, teacher) modules for the moving average; empty without a teacher."""
        return []

    def momentum(self, progress: float) -> float:
        """Return the share of the teacher that the moving average keeps; needed where there are momentum pairs."""
        raise NotImplementedError

    def after_step(self, carry: Any) -> None:
        """Take up what the step produced (a queue does); called after the optimizer and the moving average."""

    def exported(self) -> Exported:
        """Return which weights leave under which names of the plan's network."""
        raise NotImplementedError

    def forward(self, views: Any, progress: float) -> StepOutput:
        """Return ``losses``: this is what runs under mixed precision and on several processes."""
        return self.losses(views, progress)


def trained_parameters(method: PretextMethod) -> list[nn.Parameter]:
    """Return what the method trains, in the order of its parts."""
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def split_by_decay(method: PretextMethod) -> list[ParameterGroup]:
    """Group what the method trains: matrices and kernels decay, biases, norms and single vectors (1, 1, width) do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in trained_parameters(method):
        groups[parameter.squeeze().ndim > 1].append(parameter)
    return [ParameterGroup(groups[True]), ParameterGroup(groups[False], weight_decay=False)]
