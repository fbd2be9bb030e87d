"""Protocol between a pretext method and the trainer.

A method declares its views, losses, parameter groups, teacher and exported weights. ``PretrainTrainer`` does the rest for all
methods: it steps the optimizer, updates the teacher, logs, saves and moves tensors between devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnssl.plan import StageConfiguration


@dataclass(frozen=True)
class StepOutput:
    """Result of one step of a method, which the trainer processes."""

    losses: dict[str, Tensor]
    """Weighted scalar parts of the loss by name. Their sum is minimised, and each part is logged."""
    embeddings: Tensor | None = None
    """Embeddings (sample, dimension) of any scale for the collapse monitors; None if nothing can collapse."""
    monitors: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by name that are logged but not minimised."""
    carry: Any = None
    """Value that the trainer passes unchanged to ``after_step``."""


@dataclass(frozen=True)
class Exported:
    """Weights that a finished stage exports."""

    pretrained: tuple[str, ...]
    """Prefixes of the names of the network's pretrained parameters. All other parameters get a seeded random initialisation."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Values that parameters are set to on export, by the parameter's name."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same learning rate and weight decay."""

    parameters: Sequence[nn.Parameter]
    learning_rate_factor: float = 1.0
    """Factor by which the stage's learning rate is multiplied."""
    weight_decay: bool = True
    """Whether the stage's weight decay applies."""


class PretextMethod(nn.Module):
    """Base class of all pretext stages.

    A subclass lives in the file of its method in ``nnssl/methods``, which should read like the paper. Its constructor takes
    the plan's network, the resolved settings of the stage and the plan's ``StageConfiguration``, in this order. It must
    switch off ``requires_grad`` for all parameters that the stage does not train. State that must survive a restart has to be
    a parameter or a buffer.

    Class attributes:
        defaults: Settings of the stage with the paper's numbers.
        learns_at_voxels: Whether the loss compares voxels or points, so that ``make_views`` needs the mask of those that may be
            learned from; false for a method that compares whole patches only.
    """

    defaults: ClassVar[Any]
    learns_at_voxels: ClassVar[bool] = True

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the settings that the plan decides, by key. The trainer adds those of the stage's schedule."""
        raise NotImplementedError

    @classmethod
    def spares(cls, settings: Any) -> tuple[str, ...]:
        """Return the names of earlier stages that this stage does not need with these settings; they are skipped."""
        return ()

    def partners(self) -> str | None:
        """Return how the patches of a batch are paired; None if they are not.

        In a paired batch, two neighbours show the same place of two scans. ``sam`` finds this place by SAM's embeddings
        (``nnssl.matching``), ``body_box`` by its position in the box around the body.
        """
        return None

    def supervoxel_edges_mm(self) -> tuple[float, ...]:
        """Return the edges in mm of the supervoxels that the method needs of every patch; none by default."""
        return ()

    def make_views(
        self, volumes: Tensor, generators: Sequence[torch.Generator], learnable: Tensor | None = None
    ) -> Any:
        """Return the views of a batch of raw patches, computed on the device of the patches.

        Args:
            volumes: Raw patches (batch, channel, *shape).
            generators: One generator per sample, from which all random numbers of the step must come.
            learnable: Mask (batch, *shape) of the voxels that may be learned from; all others must leave the loss and the
                drawing of points. None for all; always None if not ``learns_at_voxels``.
        """
        raise NotImplementedError

    def placed(self, views: Any, cases: Sequence[str], lower_vox: Tensor) -> Any:
        """Return the views with the places that they show; the views as they are for a method that needs no places.

        Args:
            views: Return value of ``make_views``.
            cases: Name of the case of each patch.
            lower_vox: First voxel (z, y, x) of each patch in its case (batch, 3).
        """
        return views

    def partitioned(self, views: Any, supervoxels: Tensor) -> Any:
        """Return the views with the supervoxels of their patches; called if the method names edges of supervoxels.

        Args:
            views: Return value of ``placed``.
            supervoxels: Supervoxel of every voxel of the raw patches (batch, *shape), on their device, in a partition that is
                drawn for each patch; 0 outside the image.
        """
        raise NotImplementedError

    def losses(self, views: Any, progress: float) -> StepOutput:
        """Return the parts of the loss, and what the trainer logs.

        Args:
            views: Return value of ``make_views``.
            progress: Share of the stage that is completed, 0 to 1.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters for the optimizer: all that the stage trains."""
        raise NotImplementedError

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return pairs of (student, teacher) modules for the moving average; none if the method has no teacher."""
        return []

    def momentum(self, progress: float) -> float:
        """Return the share of the teacher that the moving average keeps; required if there are momentum pairs."""
        raise NotImplementedError

    def after_step(self, carry: Any) -> None:
        """Process ``StepOutput.carry``, for example enqueue keys, after the optimizer step and the moving average."""

    def exported(self) -> Exported:
        """Return which weights of the plan's network were pretrained, and values that are set on export."""
        raise NotImplementedError

    def forward(self, views: Any, progress: float) -> StepOutput:
        """Return ``losses``; mixed precision and distributed training wrap this call."""
        return self.losses(views, progress)


def trained_parameters(method: PretextMethod) -> list[nn.Parameter]:
    """Return the parameters that the method trains, in the order of its modules."""
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def split_by_decay(method: PretextMethod) -> list[ParameterGroup]:
    """Return the trained parameters in two groups.

    Weight decay applies to matrices and kernels, but not to biases, norms and single vectors such as (1, 1, width).
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in trained_parameters(method):
        groups[parameter.squeeze().ndim > 1].append(parameter)
    return [ParameterGroup(groups[True]), ParameterGroup(groups[False], weight_decay=False)]
