"""What varies most over a case: the first principal components of its standardised features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nnssl.data.case_store import StoredCase
from nnssl.pictures.dense_network import DenseNetwork
from nnssl.pictures.features import (
    CONSTANT,
    Standardisation,
    at_full_resolution,
    fit_standardisation,
    sample_features,
    standardised_maps,
)
from nnssl.pictures.places import Voxel, choose_centre
from nnssl.pictures.tiles import average_over_tiles, tiles_through

COMPONENTS = 3


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions in which standardised features vary most.

    Attributes:
        directions: of unit length; rows beyond the number of features are 0.
        share: of the variance along each direction, 0 to 1.
        low: 1st percentile of the sample along each direction.
        high: 99th percentile.
    """

    directions: Float[Tensor, "component channel"]
    share: Float[Tensor, " component"]
    low: Float[Tensor, " component"]
    high: Float[Tensor, " component"]


@dataclass(frozen=True)
class Embedding:
    """The first principal components of the features of a case.

    Attributes:
        case: the case.
        centre_vox: the voxel that the shown planes run through.
        components: 0 (1st percentile) to 1 (99th), cut there; NaN away from the planes.
        share: of the variance along each component.
    """

    case: StoredCase
    centre_vox: Voxel
    components: Float32[np.ndarray, "component z y x"]
    share: tuple[float, ...]
    two_dimensional: bool


def embed_case(network: DenseNetwork, case: StoredCase, slice_vox: int | None, seed: int) -> Embedding:
    """Compute the first three principal components of the features of a case, where three planes or one slice show them.

    Args:
        network: whose features are taken.
        case: the case.
        slice_vox: z of the slice for a 2D network; None for the one with the most body.
        seed: of the sample of body voxels that standardisation and components are fitted to.

    Raises:
        UserError: the slice lies outside the case, or the network is not 2D.
    """
    centre = choose_centre(case, slice_vox, network.two_dimensional, "three planes")
    sample = sample_features(network, case, seed)
    standardisation = fit_standardisation(sample)
    components = fit_components(standardisation.apply(sample))
    lowers = tiles_through(case.shape, network.tile_vox, centre, network.two_dimensional)
    values = average_over_tiles(
        network, case, lowers, COMPONENTS, lambda maps: project(maps, network.shape, components, standardisation)
    )
    low, high = (bound.cpu().numpy()[:, None, None, None] for bound in (components.low, components.high))
    scaled = np.clip((values - low) / np.maximum(high - low, CONSTANT), 0, 1)
    return Embedding(case, centre, scaled, tuple(components.share.tolist()), network.two_dimensional)


def fit_components(features: Float[Tensor, "point channel"]) -> PrincipalComponents:
    """Return the first three principal components of features whose mean is 0.

    The sign of a direction is arbitrary; its largest entry is made positive, so that it does not change from run to run.
    """
    _, spread, directions = torch.linalg.svd(features, full_matrices=False)
    missing = max(COMPONENTS - len(directions), 0)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = torch.cat([directions * largest.sign(), directions.new_zeros(missing, directions.shape[1])])[
        :COMPONENTS
    ]
    variance = torch.cat([spread.square(), spread.new_zeros(missing)])
    share = variance[:COMPONENTS] / variance.sum().clamp_min(CONSTANT)
    along = (features @ directions.T).cpu().numpy()
    low, high = (torch.from_numpy(np.percentile(along, q, axis=0)).to(features) for q in (1, 99))
    return PrincipalComponents(directions, share, low, high)


@torch.inference_mode()
def project(
    maps: Sequence[Tensor], shape: Sequence[int], components: PrincipalComponents, standardisation: Standardisation
) -> Float[Tensor, " component *shape"]:
    """Return the principal components of every voxel of a tile.

    A projection commutes with linear interpolation, so each map is projected at its own resolution.
    """
    result = torch.zeros((COMPONENTS, *shape), device=components.directions.device)
    first = 0
    for each in standardised_maps(maps, standardisation):
        directions = components.directions[:, first : first + each.shape[1]]
        result += at_full_resolution(torch.tensordot(directions, each[0], dims=1)[None], shape)
        first += each.shape[1]
    return result
