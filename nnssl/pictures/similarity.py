"""Which voxels of a case resemble a given one.

Source: Seince et al., Dense Self-Supervised Learning for Medical Image Segmentation (Pix2Rep), MIDL 2024, figure 2: the
cosine similarity between the embedding of a query pixel and all pixels of other images, and the pixel nearest to it.

Deviations:
    * Features are standardised before they are compared (``nnssl.pictures.features`` says why).
    * A case is seen in tiles of the plan's patch size, as in pretraining; the cosines of tiles that overlap are averaged
      with weights that fall towards the rim of a tile, where the network lacks context. So the map of the query's own
      case can be a little below 1 at the query. Embeddings of a whole volume are never held.
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
    """How much the voxels of one case resemble the query.

    Attributes:
        case: the case.
        cosine: (z, y, x), -1 to 1; NaN where it was not computed.
        nearest_vox: the voxel with the largest cosine.
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
    """A query voxel and what resembles it: in its own case, which comes first, and in others."""

    query_vox: Voxel
    similarities: tuple[Similarity, ...]
    two_dimensional: bool


def compare_cases(
    network: DenseNetwork, store: CaseStore, case: str, point_vox: Voxel | None, others: Sequence[str], seed: int
) -> Comparison:
    """Compute the similarity of the voxels of some cases to one voxel.

    A 2D network sees, of the query's own case, the query's slice only; of the others all slices.

    Args:
        network: whose features are compared.
        store: the cases.
        case: with the query.
        point_vox: the query; None for the middle of the case's body.
        others: cases to search.
        seed: of the sample that features are standardised over.

    Returns:
        The query's case and the others in the order given.

    Raises:
        UserError: there is no such case, or the point lies outside its case.
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
            network, each, lowers, 1, lambda maps: cosines(maps, network.shape, query, standardisation)
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
    """Return the cosine of the standardised features of every voxel of a tile with the query's.

    Channels are carried to full resolution a few at a time: product and norm are sums over channels.

    Args:
        maps: of the tile.
        shape: of the tile.
        query: standardised.
        standardisation: of the features of all maps side by side.
    """
    product = torch.zeros(tuple(shape), device=query.device)
    square = torch.zeros_like(product)
    for first, features in voxel_features(maps, shape, standardisation):
        product += torch.tensordot(query[first : first + len(features)], features, dims=1)
        square += features.square_().sum(dim=0)
    return (product / (square.sqrt() * query.norm()).clamp_min(CONSTANT)).clamp(-1, 1)[None]


def find_nearest(cosine: Float32[np.ndarray, "z y x"]) -> Voxel:
    """Return the voxel with the largest value, NaN left out; the first of several."""
    z, y, x = (int(place) for place in np.unravel_index(int(np.nanargmax(cosine)), cosine.shape))
    return z, y, x
