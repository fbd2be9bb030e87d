"""Features of voxels, which are read from the maps of a tile, sampled over a case, and standardised for comparison.

Standardisation gives every channel mean 0 and standard deviation 1 over a sample of body voxels of the cases shown. It is
needed because the raw outputs of rectified units share a large mean, which makes every cosine nearly 1, and because the
stages of a decoder differ in scale.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnssl.data.case_store import StoredCase
from nnssl.draws import make_generator
from nnssl.pictures.dense_network import DenseNetwork
from nnssl.pictures.places import Voxel
from nnssl.pictures.tiles import tile_around
from nnssl.views.points import interpolate_at

SAMPLED_TILES = 8
"""Number of tiles of a case from which features are sampled."""
SAMPLED_POINTS = 512
"""Number of points sampled in each tile."""
CHUNK_VALUES = 2**24
"""Number of feature values at full resolution held in memory at once, 64 MiB in float32."""
CONSTANT = 1e-6
"""Standard deviation below which a channel counts as constant and is ignored."""


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of every feature over a sample; infinite standard deviation for a constant feature."""

    mean: Float[Tensor, " channel"]
    std: Float[Tensor, " channel"]

    def apply(self, features: Float[Tensor, "point channel"]) -> Float[Tensor, "point channel"]:
        """Return standardised features."""
        return (features - self.mean) / self.std


def body_points(case: StoredCase, seed: int) -> Int[np.ndarray, "point 3"]:
    """Return the stored body voxels of a case; random voxels if there are none."""
    if len(case.foreground_vox):
        return case.foreground_vox.astype(np.int64)
    generator = make_generator(seed, "show", case.name, "anywhere")
    count = SAMPLED_TILES * SAMPLED_POINTS
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in case.shape], dim=1).numpy()


@torch.inference_mode()
def features_at(
    maps: Sequence[Tensor], shape: Sequence[int], points_vox: Float[Tensor, "point d"]
) -> Float[Tensor, "point channel"]:
    """Return the concatenated features of all maps at points of a tile."""
    points = points_vox.to(maps[0].device, torch.float32)[None]
    return torch.cat([interpolate_at(each, points, shape)[0] for each in maps], dim=1)


def embed_point(network: DenseNetwork, case: StoredCase, point_vox: Voxel) -> Float[Tensor, " channel"]:
    """Return the features of a voxel, which is in the middle of a tile as far as the volume allows."""
    lower = tile_around(case.shape, network.tile_vox, point_vox)
    place = torch.tensor(point_vox) - torch.tensor(lower)
    maps = network.maps(case, lower)
    return features_at(maps, network.shape, place[None, -len(network.shape) :])[0]


def sample_features(network: DenseNetwork, case: StoredCase, seed: int) -> Float[Tensor, "point channel"]:
    """Sample features of body voxels of a case in a few tiles around random body voxels.

    Args:
        network: Network that computes the features.
        case: The case.
        seed: Random seed; the draw otherwise depends only on the case's name and stored voxels.
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
    """Fit mean and standard deviation of every feature."""
    std = features.std(dim=0, correction=0)
    return Standardisation(features.mean(dim=0), std.masked_fill(std < CONSTANT, math.inf))


def voxel_features(
    maps: Sequence[Tensor], shape: Sequence[int], standardisation: Standardisation
) -> Iterator[tuple[int, Float[Tensor, " channel *shape"]]]:
    """Yield standardised features of all voxels of a tile, a few channels at a time, with the index of the first channel.

    The result equals ``interpolate_at`` at all voxels, but is computed several times as fast.
    """
    first = 0
    for each in standardised_maps(maps, standardisation):
        for part in each.split(max(CHUNK_VALUES // math.prod(shape), 1), dim=1):
            yield first, at_full_resolution(part, shape)
            first += part.shape[1]


def standardised_maps(maps: Sequence[Tensor], standardisation: Standardisation) -> Iterator[Tensor]:
    """Yield the maps with standardised channels, before interpolation, with which standardisation commutes."""
    first = 0
    for each in maps:
        channels = slice(first, first + each.shape[1])
        per_channel = (1, -1) + (1,) * (each.ndim - 2)
        yield (each - standardisation.mean[channels].view(per_channel)) / standardisation.std[channels].view(
            per_channel
        )
        first += each.shape[1]


def at_full_resolution(feature_map: Float[Tensor, "1 channel *grid"], shape: Sequence[int]) -> Tensor:
    """Interpolate a map of a tile to the voxels of the tile, (channel, *shape)."""
    if tuple(feature_map.shape[2:]) == tuple(shape):
        return feature_map[0]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return torch.nn.functional.interpolate(feature_map, size=tuple(shape), mode=mode, align_corners=False)[0]
