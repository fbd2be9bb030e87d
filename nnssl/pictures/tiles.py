"""Evaluation of a case in tiles of the training patch size, averaged where they overlap."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from nnssl.data.case_store import StoredCase
from nnssl.pictures.dense_network import DenseNetwork
from nnssl.pictures.places import Voxel


def tile_around(shape: Sequence[int], tile_vox: Sequence[int], point_vox: Sequence[int]) -> Voxel:
    """Return the first voxel of the tile around a point, moved into the volume; a smaller volume is centred in it."""
    z, y, x = (
        -((length - extent) // 2) if extent < length else min(max(int(place) - length // 2, 0), extent - length)
        for extent, length, place in zip(shape, tile_vox, point_vox, strict=True)
    )
    return z, y, x


def tile_corners(shape: Sequence[int], tile_vox: Sequence[int]) -> list[Voxel]:
    """Return the first voxels of tiles that cover a volume and overlap by half or more; slices do not overlap along z.

    Args:
        shape: Shape (z, y, x) of the volume in voxels.
        tile_vox: Shape (z, y, x) of a tile in voxels.

    Returns:
        First voxels (z, y, x), negative along axes on which the volume is smaller than a tile and centred in it.
    """
    axes = []
    for extent, length in zip(shape, tile_vox, strict=True):
        room = extent - length
        if room < 0:
            axes.append([-(-room // 2)])
        else:
            steps = math.ceil(room / max(length // 2, 1))
            axes.append([round(room * step / max(steps, 1)) for step in range(steps + 1)])
    return [(z, y, x) for z, y, x in itertools.product(*axes)]


def tiles_through(
    shape: Sequence[int], tile_vox: Sequence[int], centre_vox: Voxel, two_dimensional: bool
) -> list[Voxel]:
    """Return the ``tile_corners`` whose tiles meet the three planes through a voxel, or in 2D its slice."""
    axes = (0,) if two_dimensional else (0, 1, 2)
    return [
        lower
        for lower in tile_corners(shape, tile_vox)
        if any(lower[axis] <= centre_vox[axis] < lower[axis] + tile_vox[axis] for axis in axes)
    ]


def tile_weights(tile_vox: Sequence[int]) -> Float32[np.ndarray, "z y x"]:
    """Return weights that decrease linearly along each axis from the middle of a tile to just above 0 at its border."""
    z, y, x = (1 - np.abs((2 * np.arange(n) + 1) / n - 1) * n / (n + 1) for n in tile_vox)
    return (z[:, None, None] * y[:, None] * x).astype(np.float32)


def average_over_tiles(
    network: DenseNetwork,
    case: StoredCase,
    lowers: Sequence[Voxel],
    channels: int,
    evaluate: Callable[[list[Tensor], Voxel], Float[Tensor, " channel *shape"]],
) -> Float32[np.ndarray, "channel z y x"]:
    """Evaluate the feature maps of tiles and average the values where tiles overlap.

    Args:
        network: Network that computes the maps.
        case: The case.
        lowers: First voxels of the tiles.
        channels: Number of channels that ``evaluate`` returns.
        evaluate: Function from the maps of a tile and its first voxel to values of its voxels; may modify the maps.

    Returns:
        Values by voxel; NaN outside all tiles.
    """
    total = np.zeros((channels, *case.shape), np.float32)
    weight = np.zeros(case.shape, np.float32)
    weights = tile_weights(network.tile_vox)
    for lower in lowers:
        values = evaluate(network.maps(case, lower), lower).cpu().numpy().reshape(channels, *network.tile_vox)
        inside, part = [], []
        for start, length, extent in zip(lower, network.tile_vox, case.shape, strict=True):
            first, last = max(start, 0), min(start + length, extent)
            inside.append(slice(first, last))
            part.append(slice(first - start, last - start))
        total[(slice(None), *inside)] += (values * weights)[(slice(None), *part)]
        weight[tuple(inside)] += weights[tuple(part)]
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
