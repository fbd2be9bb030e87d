"""Features of points in two views of a batch, for methods that compare points rather than images."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.networks.dense import DenseKind, dense_maps
from nnssl.networks.pieces import in_pieces
from nnssl.views.points import interpolate_at


def features_of_both(
    network: Any,
    views: tuple[Float[Tensor, "batch channel *shape"], Float[Tensor, "batch channel *shape"]],
    points: tuple[Float[Tensor, "batch first d"], Float[Tensor, "batch second d"]],
    kind: DenseKind,
    pieces: int,
) -> tuple[Float[Tensor, "batch first feature"], Float[Tensor, "batch second feature"]]:
    """Return the features of points in both views, in float32.

    Args:
        network: The whole U-Net.
        views: Two views of each patch, of the same shape.
        points: Points of each view, zyx in voxels.
        kind: Maps that describe a point.
        pieces: Number of pieces in which the batch passes the network.
    """

    def read(first: Tensor, second: Tensor, in_first: Tensor, in_second: Tensor) -> dict[str, Tensor]:
        # One pass for both views gives the same result, because nnU-Net's networks normalise every sample separately.
        maps = dense_maps(network, torch.cat([first, second]), kind)
        sides = {}
        for half, (side, places) in enumerate((("first", in_first), ("second", in_second))):
            features = [interpolate_at(each.chunk(2)[half], places, first.shape[2:]) for each in maps]
            sides[side] = torch.cat(features, dim=2)
        return sides

    found = in_pieces(read, [*views, *points], pieces)
    return found["first"], found["second"]
