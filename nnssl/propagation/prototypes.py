"""Prototypes of labels: points are assigned to the label with the nearest prototype.

A label has several prototypes, found by k-means among the points of the annotated cases, because one structure has parts of
different appearance, and the background has many. Points are described by features, and by their relative position in the
body's box.

Features are standardised over the drawn points, and every map of the network has the same weight however many channels it has.
Snell et al., Prototypical networks, NeurIPS 2017, assign by distances to prototypes in the same way.

Whitening by the covariance within labels, as in discriminant analysis, was tried and is not used: with one or three annotated
cases it magnifies directions in which these happen to differ little, and the Dice fell to a quarter or less (page on
propagation).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnssl.pictures.features import at_full_resolution

POSITION_UNIT = 0.1
"""Difference of relative position along an axis that counts as much as one standard deviation of every feature."""
CONSTANT = 1e-6
"""Standard deviation below which a feature counts as constant and is ignored."""
ITERATIONS = 20


@dataclass(frozen=True)
class FeatureScale:
    """Shift and scale after which the features of every map together have the same variance.

    Attributes:
        mean: Mean of each feature over the drawn points.
        scale: Factor of each feature; 0 for a constant one.
    """

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]

    def apply(self, features: Float[Tensor, "point feature"]) -> Float[Tensor, "point feature"]:
        """Return scaled features."""
        return (features - self.mean) * self.scale


@dataclass(frozen=True)
class LabelPrototypes:
    """The prototypes of all labels.

    Attributes:
        scaling: Shift and scale of the features.
        position_weight: Weight of squared differences in position.
        centres: Prototypes: scaled features and weighted position.
        labels: Index of the label of each prototype.
        number: Number of labels.
        temperature: Divisor of squared distances.
    """

    scaling: FeatureScale
    position_weight: float
    centres: Float[Tensor, "prototype dimension"]
    labels: Int[Tensor, " prototype"]
    number: int
    temperature: float

    def to(self, device: torch.device) -> "LabelPrototypes":
        """Return the prototypes on a device."""
        return replace(
            self,
            scaling=FeatureScale(self.scaling.mean.to(device), self.scaling.scale.to(device)),
            centres=self.centres.to(device),
            labels=self.labels.to(device),
        )

    def logits(
        self, features: Float[Tensor, "point feature"], positions: Float[Tensor, "point 3"]
    ) -> Float[Tensor, "point label"]:
        """Return the logits of the labels: the negative squared distance to the nearest prototype of each.

        Args:
            features: Features of points.
            positions: Relative positions in the body's box, 0 to 1 within it.
        """
        points = join(self.scaling.apply(features), positions, self.position_weight)
        squared = (points[:, None] - self.centres).square().sum(dim=2)
        nearest = squared.new_full((len(points), self.number), math.inf)
        nearest = nearest.scatter_reduce(1, self.labels.expand(len(points), -1), squared, "amin")
        return -nearest / self.temperature

    def logits_of_maps(
        self, maps: Sequence[Tensor], positions: Float[Tensor, " 3 *shape"]
    ) -> Float[Tensor, " label *shape"]:
        """Return the logits of all voxels of a tile, up to a number per voxel that is the same for all labels.

        Without the square of the point, which no label depends on, a distance is linear in the point. A linear map commutes
        with interpolation. Each map is therefore compared with the prototypes at its own resolution.

        Args:
            maps: Feature maps (1, channel, *grid) of any resolution that cover the tile.
            positions: Relative positions of the voxels in the body's box.
        """
        shape = positions.shape[1:]
        widths = [each.shape[1] for each in maps]
        scaled, placed = self.centres.split([sum(widths), positions.shape[0]], dim=1)
        slopes = scaled * self.scaling.scale
        offsets = self.centres.square().sum(dim=1) / 2 + slopes @ self.scaling.mean
        of_maps, of_positions = slopes.split(widths, dim=1), placed * (math.sqrt(self.position_weight) / POSITION_UNIT)
        found = []
        for label in range(self.number):
            own = self.labels == label
            total = torch.einsum("kc,c...->k...", of_positions[own], positions)
            total = total - offsets[own].view(-1, *[1] * len(shape))
            for each, slope in zip(maps, of_maps, strict=True):
                total += at_full_resolution(torch.einsum("kc,bc...->bk...", slope[own], each), shape)
            found.append(2 * total.amax(dim=0) / self.temperature)
        return torch.stack(found)


def fit_prototypes(
    features: Float[Tensor, "point feature"],
    positions: Float[Tensor, "point 3"],
    labels: Int[Tensor, " point"],
    widths: Sequence[int],
    counts: Sequence[int],
    position_weight: float,
    temperature: float,
    seed: int,
) -> LabelPrototypes:
    """Fit the prototypes of all labels to points of annotated cases.

    Args:
        features: Features of the points.
        positions: Relative positions of the points in the body's box.
        labels: Index of the label of each point; every label has at least one.
        widths: Number of features of each map, in the order of the features.
        counts: Number of prototypes of each label; a label with fewer points has them as prototypes.
        position_weight: Weight of squared differences in position; 0 for features alone.
        temperature: Divisor of squared distances.
        seed: Random seed of k-means.
    """
    from sklearn.cluster import KMeans  # slow to import

    scaling = fit_scale(features, widths)
    points = join(scaling.apply(features), positions, position_weight)
    centres, owners = [], []
    for label, count in enumerate(counts):
        own = points[labels == label].cpu().numpy()
        different = np.unique(own, axis=0)
        if count < len(different):
            different = KMeans(count, n_init=1, max_iter=ITERATIONS, random_state=seed).fit(own).cluster_centers_
        centres.append(torch.from_numpy(different).to(points))
        owners += [label] * len(different)
    return LabelPrototypes(
        scaling,
        position_weight,
        torch.cat(centres),
        torch.tensor(owners, device=points.device),
        len(counts),
        temperature,
    )


def fit_scale(features: Float[Tensor, "point feature"], widths: Sequence[int]) -> FeatureScale:
    """Fit shift and scale: each map of ``n`` features has a total variance of one ``m``-th, for ``m`` maps.

    Args:
        features: Features of the points.
        widths: Number of features of each map.
    """
    std = features.std(dim=0, correction=0)
    share = torch.cat([torch.full((width,), 1 / (width * len(widths))) for width in widths]).to(features)
    return FeatureScale(features.mean(dim=0), torch.where(std < CONSTANT, 0.0, share.sqrt() / std.clamp_min(CONSTANT)))


def join(
    scaled: Float[Tensor, "point feature"], positions: Float[Tensor, "point 3"], position_weight: float
) -> Float[Tensor, "point joined"]:
    """Return scaled features beside weighted positions."""
    return torch.cat([scaled, positions.to(scaled) * (math.sqrt(position_weight) / POSITION_UNIT)], dim=1)
