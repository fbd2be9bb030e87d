"""Building the network of a plan as nnU-Net does, and reading its shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.overrides import TorchFunctionMode

from nnssl.draws import draw_seed
from nnssl.errors import UserError

M = TypeVar("M")


def planned_configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Return nnU-Net's section of a plan's configuration, including what it inherits from other configurations."""
    configuration: dict[str, Any] = PlansManager(plans).get_configuration(name).configuration
    return configuration


def build_network(
    architecture: dict[str, Any], channels: int, num_classes: int, seed: int, initialise: bool = True
) -> Any:
    """Build the network that a plan's configuration names, with a seeded initialisation.

    Args:
        architecture: The configuration's ``architecture`` (network_class_name, arch_kwargs, _kw_requires_import).
        channels: Number of input channels.
        num_classes: Number of outputs of the segmentation layer.
        seed: Random seed of the initial weights; torch's global random state does not change.
        initialise: Whether to draw the weights as nnU-Net does; False leaves them as torch's layers draw them.

    Returns:
        Network with deep supervision switched on, as nnU-Net trains it.

    Raises:
        UserError: If the class cannot be imported.
    """

    def build() -> nn.Module:
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            channels,
            num_classes,
            allow_init=initialise,
            deep_supervision=True,
        )

    try:
        return seeded(build, seed, "network")
    except ImportError as error:
        raise UserError(
            f"The plan's network class {architecture['network_class_name']} cannot be imported; plan again"
        ) from error


def measurable_network(architecture: dict[str, Any], channels: int) -> Any:
    """Build the network that a plan's configuration names without weights, so that a planner can measure it quickly.

    Args:
        architecture: As for ``build_network``.
        channels: Number of input channels.

    Returns:
        Network on torch's device ``meta`` with two classes, background included. Its sizes and shapes are those of a network
        with weights.

    Raises:
        UserError: If the class cannot be imported.
    """
    with weightless():
        return build_network(architecture, channels, 2, seed=0, initialise=False)


DRAWN = frozenset(
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "clamp_", "erfinv_", "mul_", "add_", "div_", "fill_", "zero_", "copy_")
)


class _NothingIsDrawn(TorchFunctionMode):
    """Leaves out what initial weights are drawn with, on tensors without values: it takes most of building a network there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWN and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def weightless() -> Iterator[None]:
    """Within it networks are built on torch's device ``meta``: with sizes and shapes, and without values."""
    with torch.device("meta"), _NothingIsDrawn():
        yield


def seeded(build: Callable[[], M], seed: int, purpose: str) -> M:
    """Call a constructor with a random seed that depends on (seed, purpose), and restore torch's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, purpose))
        return build()


def parts_to_compile(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a plan's network that methods call separately, so that compiling the whole would not cover them."""
    blocks = getattr(getattr(network, "eva", None), "blocks", None)
    if blocks is not None:
        return list(blocks)
    decoder = network.get_submodule("decoder")
    stages = [*decoder.get_submodule("transpconvs").children(), *decoder.get_submodule("stages").children()]
    return [network.get_submodule("encoder"), *stages]


def compile_parts(network: nn.Module) -> None:
    """Compile the parts of a plan's network that methods call, in place; a graph that cannot be compiled runs uncompiled."""
    torch._dynamo.config.suppress_errors = True  # torch warns once
    for part in parts_to_compile(network):
        part.compile()


def input_channels(encoder: nn.Module) -> int:
    """Return the number of input channels of an encoder."""
    first = next(each for each in encoder.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d)))
    return first.in_channels


def widest_kernel(stage: nn.Module) -> tuple[int, ...]:
    """Return the largest kernel of an encoder stage along each axis; 1 along axes on which it does not mix voxels."""
    kernels = [each.kernel_size for each in stage.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d))]
    return tuple(max(along) for along in zip(*kernels, strict=True))


def stage_strides(encoder: Any, axes: int) -> list[tuple[int, ...]]:
    """Return the total stride of every encoder stage along each axis, in voxels of the patch, full resolution first.

    Args:
        encoder: Encoder of a plan's network.
        axes: Number of axes of the patch.
    """
    total, strides = (1,) * axes, []
    for stride in encoder.strides:
        total = tuple(n * step for n, step in zip(total, _per_axis(stride, axes), strict=True))
        strides.append(total)
    return strides


def encoder_strides(architecture: dict[str, Any]) -> list[list[int]]:
    """Return the stride of every encoder stage relative to the stage before it, along each axis, full resolution first."""
    dim = len(architecture["arch_kwargs"]["kernel_sizes"][0])
    strides = architecture["arch_kwargs"]["strides"]
    return [_per_axis(stride, dim) for stride in strides]


def _per_axis(stride: Any, axes: int) -> list[int]:
    return list(stride) if isinstance(stride, (list, tuple)) else [stride] * axes
