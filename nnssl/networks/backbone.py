"""The network of a plan, built the way nnU-Net builds it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnssl.draws import draw_seed
from nnssl.errors import UserError

M = TypeVar("M")


def planned_configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Return nnU-Net's section of a configuration of a plan, with what it inherits from others."""
    configuration: dict[str, Any] = PlansManager(plans).get_configuration(name).configuration
    return configuration


def build_network(architecture: dict[str, Any], channels: int, num_classes: int, seed: int) -> Any:
    """Build the network that a plan's configuration names, with a seeded initialisation.

    Args:
        architecture: the configuration's ``architecture`` (network_class_name, arch_kwargs, _kw_requires_import).
        channels: of the input.
        num_classes: outputs of the segmentation layer.
        seed: of the initial weights; torch's global random state is left as it was.

    Returns:
        The network with deep supervision on, as nnU-Net trains it.

    Raises:
        UserError: the class cannot be imported.
    """

    def build() -> nn.Module:
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            channels,
            num_classes,
            allow_init=True,
            deep_supervision=True,
        )

    try:
        return seeded(build, seed, "network")
    except ImportError as error:
        raise UserError(
            f"plan: network class {architecture['network_class_name']} cannot be imported; plan again"
        ) from error


def measurable_network(architecture: dict[str, Any], channels: int) -> Any:
    """Build the network that a plan's configuration names without weights, which a planner need not wait for.

    Args:
        architecture: as for ``build_network``.
        channels: of the input.

    Returns:
        The network on torch's device ``meta``, with one class and the background: sizes and shapes are those of the real one.

    Raises:
        UserError: the class cannot be imported.
    """
    with torch.device("meta"):
        return build_network(architecture, channels, 2, seed=0)


def seeded(build: Callable[[], M], seed: int, purpose: str) -> M:
    """Call a constructor under a seed that depends on (seed, purpose), leaving torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, purpose))
        return build()


def parts_to_compile(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a plan's network that methods call one by one; a compiled whole would not cover them."""
    blocks = getattr(getattr(network, "eva", None), "blocks", None)
    if blocks is not None:
        return list(blocks)
    decoder = network.get_submodule("decoder")
    stages = [*decoder.get_submodule("transpconvs").children(), *decoder.get_submodule("stages").children()]
    return [network.get_submodule("encoder"), *stages]


def input_channels(encoder: nn.Module) -> int:
    """Return the channels of the images that an encoder takes."""
    first = next(each for each in encoder.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d)))
    return first.in_channels


def widest_kernel(stage: nn.Module) -> tuple[int, ...]:
    """Return the largest kernel of a stage of an encoder, which is 1 along axes that it does not look along."""
    kernels = [each.kernel_size for each in stage.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d))]
    return tuple(max(along) for along in zip(*kernels, strict=True))


def stage_strides(encoder: Any, axes: int) -> list[tuple[int, ...]]:
    """Return how many voxels of the patch a position of each encoder stage stands for along each axis, full resolution first.

    Args:
        encoder: of a plan's network.
        axes: of the patch.
    """
    total, strides = (1,) * axes, []
    for stride in encoder.strides:
        total = tuple(n * step for n, step in zip(total, _per_axis(stride, axes), strict=True))
        strides.append(total)
    return strides


def encoder_strides(architecture: dict[str, Any]) -> list[list[int]]:
    """Return the stride per axis of every encoder stage, full resolution first."""
    dim = len(architecture["arch_kwargs"]["kernel_sizes"][0])
    strides = architecture["arch_kwargs"]["strides"]
    return [_per_axis(stride, dim) for stride in strides]


def _per_axis(stride: Any, axes: int) -> list[int]:
    return list(stride) if isinstance(stride, (list, tuple)) else [stride] * axes
