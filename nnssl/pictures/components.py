"""The first principal components of standardised features, fitted to several cases together."""

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
MOST_CASES = 4
"""Largest number of cases that a picture shows side by side."""


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions in which standardised features vary most.

    Attributes:
        directions: Unit vectors; rows beyond the number of features are 0.
        share: Share of the variance along each direction, 0 to 1.
        low: 1st percentile of the sample along each direction.
        high: 99th percentile of the sample along each direction.
    """

    directions: Float[Tensor, "component channel"]
    share: Float[Tensor, " component"]
    low: Float[Tensor, " component"]
    high: Float[Tensor, " component"]


@dataclass(frozen=True)
class CaseComponents:
    """The principal components in the shown planes of a case.

    Attributes:
        case: The case.
        centre_vox: Voxel in which the shown planes intersect.
        components: Components scaled to 0 (1st percentile) and 1 (99th percentile) and clipped; NaN off the planes.
    """

    case: StoredCase
    centre_vox: Voxel
    components: Float32[np.ndarray, "component z y x"]


@dataclass(frozen=True)
class Embedding:
    """The first principal components of the features of several cases, in which equal values mean equal features.

    Attributes:
        cases: Components of each case in the order given.
        share: Share of the variance of all cases along each component, 0 to 1.
        two_dimensional: Whether one slice of each case is shown instead of three planes.
    """

    cases: tuple[CaseComponents, ...]
    share: tuple[float, ...]
    two_dimensional: bool


def embed_cases(network: DenseNetwork, cases: Sequence[StoredCase], slice_vox: int | None, seed: int) -> Embedding:
    """Compute the first three principal components of the features of cases in three planes or one slice of each.

    Standardisation, components and their range are fitted to all cases together, so that they can be compared.

    Args:
        network: Network that computes the features.
        cases: Cases to show.
        slice_vox: z of the slice of the first case for a 2D network; None for the slice with the most body, which is always
            taken for the other cases.
        seed: Random seed of the sample of body voxels.

    Raises:
        UserError: If the slice lies outside the first case, or is given for a network that is not 2D.
    """
    slices = [slice_vox, *[None] * (len(cases) - 1)]
    centres = [
        choose_centre(case, z, network.two_dimensional, "three planes") for case, z in zip(cases, slices, strict=True)
    ]
    sample = torch.cat([sample_features(network, case, seed) for case in cases])
    standardisation = fit_standardisation(sample)
    components = fit_components(standardisation.apply(sample))
    low, high = (bound.cpu().numpy()[:, None, None, None] for bound in (components.low, components.high))
    shown = []
    for case, centre in zip(cases, centres, strict=True):
        lowers = tiles_through(case.shape, network.tile_vox, centre, network.two_dimensional)
        values = average_over_tiles(
            network, case, lowers, COMPONENTS, lambda maps, _: project(maps, network.shape, components, standardisation)
        )
        scaled = np.clip((values - low) / np.maximum(high - low, CONSTANT), 0, 1)
        shown.append(CaseComponents(case, centre, scaled))
    return Embedding(tuple(shown), tuple(components.share.tolist()), network.two_dimensional)


def fit_components(features: Float[Tensor, "point channel"]) -> PrincipalComponents:
    """Return the first three principal components of features whose mean is 0.

    The sign of a direction is arbitrary. Its largest entry is made positive, so that runs agree.
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

    Each map is projected at its own resolution, because projection commutes with linear interpolation.
    """
    result = torch.zeros((COMPONENTS, *shape), device=components.directions.device)
    first = 0
    for each in standardised_maps(maps, standardisation):
        directions = components.directions[:, first : first + each.shape[1]]
        result += at_full_resolution(torch.tensordot(directions, each[0], dims=1)[None], shape)
        first += each.shape[1]
    return result
