"""Similarity of the voxels of cases to a query voxel.

Source: Seince et al., Dense Self-Supervised Learning for Medical Image Segmentation (Pix2Rep), MIDL 2024, figure 2: the
cosine similarity between the embedding of a query pixel and all pixels of other images, and the pixel nearest to it.

Deviations:
    * Features are standardised before the comparison, for the reasons given in ``nnssl.pictures.features``.
    * A case is processed in tiles of the pretraining's patch size. Cosines of overlapping tiles are averaged
      with weights that decrease towards the border of a tile, where the network lacks context. The cosine at the query can
      therefore be slightly below 1. Embeddings of a whole volume are never held in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.log import logger
from nnssl.pictures.dense_network import DenseNetwork, find_case
from nnssl.pictures.features import (
    CONSTANT,
    Standardisation,
    embed_point,
    fit_standardisation,
    sample_features,
    voxel_features,
)
from nnssl.pictures.places import Voxel, check_point, middle_of
from nnssl.pictures.tiles import average_over_tiles, tile_corners


@dataclass(frozen=True)
class Similarity:
    """Similarity of the voxels of a case to the query.

    Attributes:
        case: The case.
        cosine: Cosine similarity (z, y, x), -1 to 1; NaN for voxels that were not computed.
        nearest_vox: Voxel with the largest cosine.
    """

    case: StoredCase
    cosine: Float32[np.ndarray, "z y x"]
    nearest_vox: Voxel

    @property
    def nearest_cosine(self) -> float:
        """The largest cosine."""
        return float(self.cosine[self.nearest_vox])


@dataclass(frozen=True)
class Comparison:
    """A query voxel and its similarity to voxels of its own case, which comes first, and of others."""

    query_vox: Voxel
    similarities: tuple[Similarity, ...]
    two_dimensional: bool


def compare_cases(
    network: DenseNetwork, store: CaseStore, case: str, point_vox: Voxel | None, others: Sequence[str], seed: int
) -> Comparison:
    """Compute the similarity of the voxels of several cases to one voxel.

    A 2D network processes only the query's slice of the query's case, but all slices of the other cases.

    Args:
        network: Network that computes the features.
        store: Store with the cases.
        case: Name of the query's case.
        point_vox: Query voxel; None for the middle of the case's body.
        others: Names of the other cases to search.
        seed: Random seed of the sample for standardisation.

    Returns:
        Similarities in the query's case and in the others, in the order given.

    Raises:
        UserError: If a case does not exist, or the point lies outside its case.
    """
    cases = [find_case(store, name) for name in (case, *others)]
    query_vox = check_point(cases[0], point_vox) if point_vox else middle_of(cases[0])
    standardisation = fit_standardisation(torch.cat([sample_features(network, each, seed) for each in cases]))
    query = standardisation.apply(embed_point(network, cases[0], query_vox)[None])[0]

    similarities = []
    for place, each in enumerate(cases):
        lowers = tile_corners(each.shape, network.tile_vox)
        if network.two_dimensional and place == 0:
            lowers = [lower for lower in lowers if lower[0] == query_vox[0]]
        logger.info(f"{each.name}: comparing {len(lowers)} tiles")
        cosine = average_over_tiles(
            network, each, lowers, 1, lambda maps, _: cosines(maps, network.shape, query, standardisation)
        )[0]
        similarities.append(Similarity(each, cosine, find_nearest(cosine)))
    return Comparison(query_vox, tuple(similarities), network.two_dimensional)


@torch.inference_mode()
def cosines(
    maps: Sequence[Tensor],
    shape: Sequence[int],
    query: Float[Tensor, " channel"],
    standardisation: Standardisation,
) -> Float[Tensor, " 1 *shape"]:
    """Return the cosine similarity of the standardised features of every voxel of a tile to the query's.

    Product and norm are sums over channels, so only a few channels at a time are interpolated to full resolution.

    Args:
        maps: Feature maps of the tile.
        shape: Shape of the tile.
        query: Standardised features of the query.
        standardisation: Standardisation of the concatenated features of all maps.
    """
    product = torch.zeros(tuple(shape), device=query.device)
    square = torch.zeros_like(product)
    for first, features in voxel_features(maps, shape, standardisation):
        product += torch.tensordot(query[first : first + len(features)], features, dims=1)
        square += features.square_().sum(dim=0)
    return (product / (square.sqrt() * query.norm()).clamp_min(CONSTANT)).clamp(-1, 1)[None]


def find_nearest(cosine: Float32[np.ndarray, "z y x"]) -> Voxel:
    """Return the first voxel with the largest value, ignoring NaN."""
    z, y, x = (int(place) for place in np.unravel_index(int(np.nanargmax(cosine)), cosine.shape))
    return z, y, x
