"""Uncertainty of the teacher of Pixel-global: the entropy of its passes with dropout in each voxel (the paper's figure 2).

Source: "Pixel-global self-supervised learning with uncertainty-aware context stabilizer" (2022).

Deviations: the head standardises over the points of one call. In training, these are the points of a step; here, they are the
voxels of a tile in random order, in chunks that fit into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nnssl.data.case_store import StoredCase
from nnssl.draws import draw_seed, make_generator
from nnssl.errors import UserError
from nnssl.networks.heads import PointAssignment
from nnssl.networks.uncertainty import point_uncertainty
from nnssl.pictures.dense_network import DenseNetwork, dense_network_of
from nnssl.pictures.places import Voxel, choose_centre
from nnssl.pictures.tiles import average_over_tiles, tiles_through
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.restored_method import method_of

METHOD = "pixelglobal"
POINTS_AT_ONCE = 2**15


@dataclass(frozen=True)
class Teacher:
    """The teacher's network, and the head whose passes with dropout are compared."""

    network: DenseNetwork
    head: PointAssignment
    temperature: float
    passes: int


@dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of the teacher in the shown planes of a case.

    Attributes:
        case: The case.
        centre_vox: Voxel in which the shown planes intersect.
        values: Uncertainty (z, y, x), 0 for one-hot, 1 for uniform; NaN off the planes.
        two_dimensional: Whether one slice is shown instead of three planes.
    """

    case: StoredCase
    centre_vox: Voxel
    values: Float32[np.ndarray, "z y x"]
    two_dimensional: bool


def teacher_of(pretrained: OpenedCheckpoint, passes: int | None, device: torch.device) -> Teacher:
    """Build the teacher of Pixel-global.

    Args:
        pretrained: The checkpoint.
        passes: Number of passes with dropout; None for the setting of the pretraining or, if it is 0, the paper's 20.
        device: Device for the computation.

    Raises:
        UserError: If the checkpoint is of another method, or ``dense_network_of`` rejects it.
    """
    found = pretrained.own_provenance.method
    if found != METHOD:
        raise UserError(
            f"{pretrained.path}: is of {found}, which has no teacher with an uncertainty; use a checkpoint of {METHOD}"
        )
    network = dense_network_of(pretrained, "single", device)
    method = method_of(pretrained, device)
    wanted = passes or method.settings.uncertainty_passes or 20  # the paper's
    teacher = replace(network, network=method.teacher)
    return Teacher(teacher, method.teacher_local_head, method.settings.teacher_temperature, wanted)


def measure_uncertainty(teacher: Teacher, case: StoredCase, slice_vox: int | None) -> Uncertainty:
    """Compute the uncertainty in three planes or one slice of a case.

    Args:
        teacher: Teacher whose passes are compared.
        case: The case.
        slice_vox: z of the slice for a 2D network; None for the slice with the most body.

    Raises:
        UserError: If the slice lies outside the case, or is given for a network that is not 2D.
    """
    network = teacher.network
    centre = choose_centre(case, slice_vox, network.two_dimensional, "three planes")
    lowers = tiles_through(case.shape, network.tile_vox, centre, network.two_dimensional)
    values = average_over_tiles(
        network, case, lowers, 1, lambda maps, _: tile_uncertainty(teacher, maps[-1], case.name)
    )
    return Uncertainty(case, centre, values[0], network.two_dimensional)


@torch.inference_mode()
def tile_uncertainty(
    teacher: Teacher, feature_map: Float[Tensor, "1 channel *shape"], name: str
) -> Float[Tensor, " 1 *shape"]:
    """Return the uncertainty of all voxels of a tile, 0 to 1.

    Args:
        teacher: Teacher whose head is applied.
        feature_map: Feature map at full resolution.
        name: Name of the case, which determines the random draws.
    """
    features = feature_map.flatten(2)[0].T
    order = torch.randperm(len(features), generator=make_generator(0, "uncertainty", name)).to(features.device)
    values = torch.empty(len(features), device=features.device)
    for place, chosen in enumerate(_even_chunks(order)):
        seed = draw_seed(0, "uncertainty", name, place) % 2**60
        values[chosen] = point_uncertainty(
            teacher.head, features[chosen][None], (seed,), teacher.passes, teacher.temperature
        )[0]
    return values.view(1, *feature_map.shape[2:])


def _even_chunks(order: Tensor) -> Sequence[Tensor]:
    """Split an order into parts of about the same length, at most ``POINTS_AT_ONCE``."""
    return order.tensor_split(-(-len(order) // POINTS_AT_ONCE))
