"""What dense features say of voxels: which voxels of a case resemble a given one, and what varies most over a case.

Source: Seince et al., Dense Self-Supervised Learning for Medical Image Segmentation (Pix2Rep), MIDL 2024, figure 2: the
cosine similarity between the embedding of a query pixel and all pixels of other images, and the pixel nearest to it.

Deviations:
    * Features are standardised before they are compared: every channel has mean 0 and standard deviation 1 over a sample
      of voxels inside the bodies of the cases shown. The raw outputs of rectified units share a large common mean, which
      makes every cosine nearly 1, and the stages of a decoder differ in scale.
    * A case is seen in tiles of the plan's patch size, as in pretraining; the cosines of tiles that overlap are averaged
      with weights that fall towards the rim of a tile, where the network lacks context. So the map of the query's own
      case can be a little below 1 at the query. Embeddings of a whole volume are never held.

Points are (z, y, x) in voxels of the preprocessed case.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.draws import make_generator
from nnssl.errors import UserError
from nnssl.evaluation.dense_network import DenseNetwork, find_case
from nnssl.evaluation.tiles import Voxel, average_over_tiles, tile_around, tile_corners
from nnssl.views.points import interpolate_at

SAMPLED_TILES = 8
"""Tiles of a case that the sample of features comes from."""
SAMPLED_POINTS = 512
"""Points of each of them."""
CHUNK_VALUES = 2**24
"""Features at full resolution that are held at once, 64 MiB in float32."""
COMPONENTS = 3
CONSTANT = 1e-6
"""Standard deviation below which a channel says nothing and is left out."""


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of every feature over a sample; a feature that does not vary has an infinite one."""

    mean: Float[Tensor, " channel"]
    std: Float[Tensor, " channel"]

    def apply(self, features: Float[Tensor, "point channel"]) -> Float[Tensor, "point channel"]:
        """Return the features with mean 0 and standard deviation 1."""
        return (features - self.mean) / self.std


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


def compare_cases(
    network: DenseNetwork,
    store: CaseStore,
    case: str,
    point_vox: Voxel | None,
    others: Sequence[str],
    seed: int,
    say: Callable[[str], None],
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
        say: called with one line for each case.

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
        say(f"{each.name}: comparing {len(lowers)} tiles")
        cosine = average_over_tiles(
            network, each, lowers, 1, lambda maps: cosines(maps, network.shape, query, standardisation)
        )[0]
        similarities.append(Similarity(each, cosine, find_nearest(cosine)))
    return Comparison(query_vox, tuple(similarities), network.two_dimensional)


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
    if slice_vox is not None and not network.two_dimensional:
        raise UserError(f"slice {slice_vox}: these weights are 3D and show three planes; leave the slice out")
    centre = middle_of(case)
    if network.two_dimensional:
        centre = (fullest_slice(case) if slice_vox is None else slice_vox, centre[1], centre[2])
    check_point(case, centre)
    sample = sample_features(network, case, seed)
    standardisation = fit_standardisation(sample)
    components = fit_components(standardisation.apply(sample))
    axes = (0,) if network.two_dimensional else (0, 1, 2)
    lowers = [
        lower
        for lower in tile_corners(case.shape, network.tile_vox)
        if any(lower[axis] <= centre[axis] < lower[axis] + network.tile_vox[axis] for axis in axes)
    ]
    values = average_over_tiles(
        network, case, lowers, COMPONENTS, lambda maps: project(maps, network.shape, components, standardisation)
    )
    low, high = (bound.cpu().numpy()[:, None, None, None] for bound in (components.low, components.high))
    scaled = np.clip((values - low) / np.maximum(high - low, CONSTANT), 0, 1)
    return Embedding(case, centre, scaled, tuple(components.share.tolist()), network.two_dimensional)


def check_point(case: StoredCase, point_vox: Voxel) -> Voxel:
    """Return a point that lies inside a case.

    Raises:
        UserError: it does not.
    """
    if any(not 0 <= place < extent for place, extent in zip(point_vox, case.shape, strict=True)):
        point, shape = " ".join(map(str, point_vox)), " ".join(map(str, case.shape))
        raise UserError(
            f"point {point}: lies outside case {case.name}, whose shape (z y x, preprocessed) is {shape}; count from 0"
        )
    return point_vox


def body_points(case: StoredCase, seed: int) -> Int[np.ndarray, "point 3"]:
    """Return the stored voxels of the body; of a case without any, random voxels."""
    if len(case.foreground_vox):
        return case.foreground_vox.astype(np.int64)
    generator = make_generator(seed, "show", case.name, "anywhere")
    count = SAMPLED_TILES * SAMPLED_POINTS
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in case.shape], dim=1).numpy()


def middle_of(case: StoredCase) -> Voxel:
    """Return the stored voxel of the body that is nearest to their mean in mm; the centre of a case without any."""
    points = case.foreground_vox.astype(np.float64)
    if not len(points):
        z, y, x = (extent // 2 for extent in case.shape)
        return z, y, x
    distance_mm = np.linalg.norm((points - points.mean(axis=0)) * case.spacing_mm, axis=1)
    z, y, x = case.foreground_vox[int(distance_mm.argmin())].tolist()
    return z, y, x


def fullest_slice(case: StoredCase) -> int:
    """Return z of the slice with the most stored voxels of the body; the middle one of a case without any."""
    points = case.foreground_vox
    return int(np.bincount(points[:, 0]).argmax()) if len(points) else case.shape[0] // 2


@torch.inference_mode()
def features_at(
    maps: Sequence[Tensor], shape: Sequence[int], points_vox: Float[Tensor, "point d"]
) -> Float[Tensor, "point channel"]:
    """Return the features of all maps at points of a tile, side by side."""
    points = points_vox.to(maps[0].device, torch.float32)[None]
    return torch.cat([interpolate_at(each, points, shape)[0] for each in maps], dim=1)


def embed_point(network: DenseNetwork, case: StoredCase, point_vox: Voxel) -> Float[Tensor, " channel"]:
    """Return the features of a voxel, read in the middle of a tile as far as the volume allows."""
    lower = tile_around(case.shape, network.tile_vox, point_vox)
    place = torch.tensor(point_vox) - torch.tensor(lower)
    maps = network.maps(case, lower)
    return features_at(maps, network.shape, place[None, -len(network.shape) :])[0]


def sample_features(network: DenseNetwork, case: StoredCase, seed: int) -> Float[Tensor, "point channel"]:
    """Return the features of body voxels of a case, drawn in a few tiles around random ones of them.

    Args:
        network: whose features are taken.
        case: the case.
        seed: of the draw, which depends on nothing else but the case's name and stored points.
    """
    points = body_points(case, seed)
    generator = make_generator(seed, "show", case.name)
    centres = points[torch.randperm(len(points), generator=generator)[:SAMPLED_TILES].numpy()]
    lowers = dict.fromkeys(tile_around(case.shape, network.tile_vox, centre) for centre in centres)
    features = []
    for lower in lowers:
        places = points - np.array(lower)
        places = places[np.all((places >= 0) & (places < network.tile_vox), axis=1)]
        drawn = torch.randperm(len(places), generator=generator)[:SAMPLED_POINTS].numpy()
        chosen = torch.from_numpy(places[drawn][:, -len(network.shape) :])
        features.append(features_at(network.maps(case, lower), network.shape, chosen))
    return torch.cat(features)


def fit_standardisation(features: Float[Tensor, "point channel"]) -> Standardisation:
    """Return mean and standard deviation of every feature."""
    std = features.std(dim=0, correction=0)
    return Standardisation(features.mean(dim=0), std.masked_fill(std < CONSTANT, math.inf))


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


def voxel_features(
    maps: Sequence[Tensor], shape: Sequence[int], standardisation: Standardisation
) -> Iterator[tuple[int, Float[Tensor, " channel *shape"]]]:
    """Yield standardised features of all voxels of a tile, a few channels at a time, with the first channel's number.

    The same numbers as ``interpolate_at`` at all voxels, several times as fast.
    """
    first = 0
    for each in _standardised(maps, standardisation):
        for part in each.split(max(CHUNK_VALUES // math.prod(shape), 1), dim=1):
            yield first, _to_full_resolution(part, shape)
            first += part.shape[1]


@torch.inference_mode()
def project(
    maps: Sequence[Tensor], shape: Sequence[int], components: PrincipalComponents, standardisation: Standardisation
) -> Float[Tensor, " component *shape"]:
    """Return the principal components of every voxel of a tile.

    A projection commutes with linear interpolation, so each map is projected at its own resolution.
    """
    result = torch.zeros((COMPONENTS, *shape), device=components.directions.device)
    first = 0
    for each in _standardised(maps, standardisation):
        directions = components.directions[:, first : first + each.shape[1]]
        result += _to_full_resolution(torch.tensordot(directions, each[0], dims=1)[None], shape)
        first += each.shape[1]
    return result


def _standardised(maps: Sequence[Tensor], standardisation: Standardisation) -> Iterator[Tensor]:
    """Yield the maps with standardised channels; linear interpolation keeps mean and scale, so it may follow."""
    first = 0
    for each in maps:
        channels = slice(first, first + each.shape[1])
        per_channel = (1, -1) + (1,) * (each.ndim - 2)
        yield (each - standardisation.mean[channels].view(per_channel)) / standardisation.std[channels].view(
            per_channel
        )
        first += each.shape[1]


def _to_full_resolution(feature_map: Float[Tensor, "1 channel *grid"], shape: Sequence[int]) -> Tensor:
    if tuple(feature_map.shape[2:]) == tuple(shape):
        return feature_map[0]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return torch.nn.functional.interpolate(feature_map, size=tuple(shape), mode=mode, align_corners=False)[0]


def find_nearest(cosine: Float32[np.ndarray, "z y x"]) -> Voxel:
    """Return the voxel with the largest value, NaN left out; the first of several."""
    z, y, x = (int(place) for place in np.unravel_index(int(np.nanargmax(cosine)), cosine.shape))
    return z, y, x
