"""Features of annotated voxels and logits of all voxels of a case, computed in tiles of the training patch size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from nnssl.data.case_store import StoredCase
from nnssl.draws import make_generator
from nnssl.matching.body_box import body_box
from nnssl.pictures.dense_network import DenseNetwork
from nnssl.pictures.features import features_at
from nnssl.pictures.places import Voxel
from nnssl.pictures.tiles import average_over_tiles, tile_corners, tile_weights
from nnssl.propagation.prototypes import LabelPrototypes


class AnnotatedPoints(NamedTuple):
    """Voxels of an annotated case.

    Attributes:
        features: Features.
        positions: Relative positions in the body's box.
        labels: Index of the label.
        widths: Number of features of each map.
    """

    features: Float[Tensor, "point feature"]
    positions: Float[Tensor, "point 3"]
    labels: Int[Tensor, " point"]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class BoxPositions:
    """Relative position of the voxels of a case in the body's box: 0 at its lower, 1 at its upper border along each axis."""

    low_vox: Float[np.ndarray, " 3"]
    size_vox: Float[np.ndarray, " 3"]

    def of_points(self, points_vox: Int[np.ndarray, "point 3"]) -> Float32[np.ndarray, "point 3"]:
        """Return the relative positions of voxels."""
        return ((points_vox - self.low_vox) / self.size_vox).astype(np.float32)

    def of_tile(self, lower_vox: Voxel, size_vox: Sequence[int]) -> Float32[np.ndarray, "3 z y x"]:
        """Return the relative positions of all voxels of a tile that starts at a voxel."""
        axes = [
            (start + np.arange(n) - low) / size
            for start, n, low, size in zip(lower_vox, size_vox, self.low_vox, self.size_vox, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def box_positions(case: StoredCase) -> BoxPositions:
    """Measure the body's box of a case."""
    low_mm, size_mm = body_box(case)
    return BoxPositions(low_mm / case.spacing_mm, size_mm / case.spacing_mm)


def read_points(
    network: DenseNetwork,
    case: StoredCase,
    labels: Int[np.ndarray, "z y x"],
    values: Sequence[int],
    most: Sequence[int],
    seed: int,
) -> AnnotatedPoints:
    """Draw annotated voxels of every label and return their features, averaged over the tiles that cover them.

    Args:
        network: Network that computes the features.
        case: The annotated case.
        labels: Its label values; values that are not listed are not used.
        values: Value of each label.
        most: Largest number of voxels of each label.
        seed: Random seed; the draw otherwise depends only on the case's name and the labels.
    """
    generator = make_generator(seed, "propagate", case.name)
    chosen, owners = [], []
    for label, (value, limit) in enumerate(zip(values, most, strict=True)):
        places = np.argwhere(labels == value)
        drawn = places[torch.randperm(len(places), generator=generator)[:limit].numpy()]
        chosen.append(drawn)
        owners += [label] * len(drawn)
    points = np.concatenate(chosen)
    features, widths = _features_of_points(network, case, points)
    positions = torch.from_numpy(box_positions(case).of_points(points))
    return AnnotatedPoints(features, positions, torch.tensor(owners), widths)


@torch.inference_mode()
def label_logits(
    network: DenseNetwork, case: StoredCase, prototypes: LabelPrototypes
) -> Float32[np.ndarray, "label z y x"]:
    """Return the logits of all voxels of a case, averaged where tiles overlap."""
    positions = box_positions(case)

    def evaluate(maps: list[Tensor], lower: Voxel) -> Tensor:
        where = torch.from_numpy(positions.of_tile(lower, network.tile_vox)).to(network.device)
        return prototypes.logits_of_maps(maps, where.view(3, *network.shape))

    corners = tile_corners(case.shape, network.tile_vox)
    return average_over_tiles(network, case, corners, prototypes.number, evaluate)


@torch.inference_mode()
def _features_of_points(
    network: DenseNetwork, case: StoredCase, points: Int[np.ndarray, "point 3"]
) -> tuple[Float[Tensor, "point feature"], tuple[int, ...]]:
    """Return the features of voxels, averaged with the weights of the tiles that cover them, and their number for each map."""
    weights, total = tile_weights(network.tile_vox), None
    widths: tuple[int, ...] = ()
    covered = torch.zeros(len(points), 1)
    for lower in tile_corners(case.shape, network.tile_vox):
        places = points - np.array(lower)
        inside = np.flatnonzero(np.all((places >= 0) & (places < network.tile_vox), axis=1))
        if not len(inside):
            continue
        own = places[inside]
        weight = torch.from_numpy(weights[tuple(own.T)])[:, None]
        asked = torch.from_numpy(own[:, -len(network.shape) :])
        maps = network.maps(case, lower)
        found = features_at(maps, network.shape, asked).cpu() * weight
        widths = tuple(each.shape[1] for each in maps)
        total = torch.zeros(len(points), found.shape[1]) if total is None else total
        total[inside] += found
        covered[inside] += weight
    assert total is not None, "tiles cover all voxels"
    return total / covered, widths
