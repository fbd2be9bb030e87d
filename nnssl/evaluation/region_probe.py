"""How well the features of a network tell pieces of tissue apart, a measure of every method without labels.

Two overlapping crops of a patch, changed in intensity, show the same supervoxels. The prototype of a supervoxel is the mean of
the features at its points in one view; other points of the same supervoxels in the other view are classified among the prototypes
of their own patch. Features are standardised over the measured sample, as for the retrieval of views, whose patches and views
these are. All methods are measured on the same points, so their values, and those of random weights, can be compared.

Source: none; the task is that of the method Regions (after Gao et al., MASS, CVPR 2026), with the nearest prototype in place of
a trained projection; prototypes as in Snell et al., Prototypical Networks, NeurIPS 2017.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl.data.case_store import CaseStore
from nnssl.data.patch_boxes import as_volume
from nnssl.data.supervoxels import folder_of
from nnssl.draws import make_generator
from nnssl.evaluation.probe import frozen
from nnssl.evaluation.view_retrieval import AT_ONCE, PATCHES, as_exported, draw_views, stage_maps, standardised
from nnssl.losses.prototypes import prototypes_of
from nnssl.plan import DataChoices
from nnssl.views.overlap import map_across
from nnssl.views.points import draw_points, interpolate_at, place_of
from nnssl.views.regions import assign_regions

POINTS = 512
"""Number of points in each patch. Every other one serves for the prototypes; the others are classified."""
MOST_REGIONS = 64
"""Largest number of supervoxels of a patch that are told apart."""
LEAST_POINTS = 2
"""Smallest number of points that make a prototype."""


@dataclass(frozen=True)
class RegionSample:
    """Two views of some patches, and points of known supervoxels that both views show.

    Points with even numbers serve for the prototypes, those with odd numbers are classified.

    Attributes:
        first: First views.
        second: Second views, of the same shape.
        points_first: Positions of the points in the first views, zyx in voxels.
        points_second: Positions of the same points in the second views.
        regions: Region of each point within its patch; -1 for points that are not used.
        used: Whether the region exists.
    """

    first: Float[Tensor, "patch channel *shape"]
    second: Float[Tensor, "patch channel *shape"]
    points_first: Float[Tensor, "patch points d"]
    points_second: Float[Tensor, "patch points d"]
    regions: Int[Tensor, "patch points"]
    used: Bool[Tensor, "patch regions"]

    @property
    def chance(self) -> float | None:
        """Expected accuracy of features that say nothing; None if there are no two regions in any patch."""
        queries = (self.regions[:, 1::2] >= 0).sum(dim=1)
        total = int(queries.sum())
        return float((queries / self.used.sum(dim=1).clamp_min(1)).sum()) / total if total else None


def draw_regions(
    store: CaseStore,
    names: Sequence[str],
    patch_size: Sequence[int],
    data: DataChoices,
    edge_mm: float,
    count: int = PATCHES,
) -> RegionSample:
    """Draw patches and views as for the retrieval of views, and points in them; the draw depends on the names of the cases only.

    Args:
        store: Preprocessed cases, whose supervoxels with this edge exist.
        names: Names of the cases to draw from.
        patch_size: Number of voxels of a patch along each axis.
        data: Settings of the configuration, which determine flips and intensity changes.
        edge_mm: Edge of the supervoxels in mm.
        count: Number of patches.

    Raises:
        UserError: If a case has no supervoxels with this edge.
    """
    views, shape = draw_views(store, names, patch_size, data, count), tuple(patch_size)
    folder, size = folder_of(store.folder, edge_mm), as_volume(patch_size)
    read = [
        torch.from_numpy(store.case(name).read_supervoxels(folder, lower, size)).long()
        for (name, _), lower in zip(views.drawn, views.lower_vox, strict=True)
    ]
    supervoxels = torch.stack([each if len(shape) == 3 else each[0] for each in read])
    generators = [make_generator(0, "regions/points", *each) for each in views.drawn]
    points = draw_points(generators, views.shown, POINTS, views.body, 1.0)
    place = place_of(points, shape)
    in_patch, across = map_across(points.float(), *views.crops)
    last = torch.tensor([length - 1 for length in shape])
    nearest = in_patch.round().long().clamp_min(0).minimum(last)
    valid = views.shown.flatten(1).gather(1, place) & ~torch.stack([_repeated(row) for row in place])
    labels = supervoxels.flatten(1).gather(1, place_of(nearest, shape)).where(valid, 0)
    found = assign_regions(labels[:, ::2], labels[:, 1::2], torch.arange(count), MOST_REGIONS, LEAST_POINTS)
    told_apart = found.used.sum(dim=1, keepdim=True) > 1
    regions = torch.stack([found.reference, found.query], dim=2).flatten(1).where(told_apart, -1)
    return RegionSample(views.first, views.second, points.float(), across.float(), regions, found.used & told_apart)


def measure_regions(
    network: Any, sample: RegionSample, pretrained: Sequence[str], fixed: Mapping[str, float], device: torch.device
) -> dict[str, float]:
    """Return the share of points that are assigned to their supervoxel, for every pretrained stage of a network, in float32.

    Args:
        network: Network of a plan, on the device; it is left as it was.
        sample: Views and points, with two regions in at least one patch.
        pretrained: Prefixes of the names of pretrained parameters.
        fixed: Values of parameters that are set on export.
        device: Device of the network.
    """
    shape = tuple(sample.first.shape[2:])
    features: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    sides = ((sample.first, sample.points_first), (sample.second, sample.points_second))
    with frozen(network), as_exported(network, fixed), torch.autocast(device.type, enabled=False):
        for rows in torch.arange(len(sample.first)).split(AT_ONCE):
            for side, (volumes, points) in enumerate(sides):
                for name, each in stage_maps(network, volumes[rows].to(device), pretrained).items():
                    read = interpolate_at(each, points[rows].to(device), shape)
                    features.setdefault(name, ([], []))[side].append(read)
        regions, used = sample.regions.to(device), sample.used.to(device)
        return {name: _accuracy(torch.cat(a), torch.cat(b), regions, used) for name, (a, b) in features.items()}


def _accuracy(first: Tensor, second: Tensor, regions: Tensor, used: Tensor) -> float:
    """Return the mean accuracy in both directions; of equally near prototypes, each counts in part."""
    known = regions >= 0
    a, b = torch.zeros_like(first), torch.zeros_like(second)
    a[known], b[known] = standardised(first[known], second[known])
    wanted, asked = regions[:, 1::2].clamp_min(0)[..., None], known[:, 1::2]
    shares = []
    for reference, query in ((a, b), (b, a)):
        prototypes = prototypes_of(reference[:, ::2], regions[:, ::2], used.shape[1])
        similarity = F.normalize(query[:, 1::2], dim=2) @ prototypes.transpose(1, 2)
        similarity = similarity.masked_fill(~used[:, None], -torch.inf)
        nearest = similarity == similarity.amax(dim=2, keepdim=True)
        right = nearest.gather(2, wanted)[..., 0] / nearest.sum(dim=2)
        shares.append(float(right[asked].mean()))
    return sum(shares) / 2


def _repeated(places: Int[Tensor, " points"]) -> Bool[Tensor, " points"]:
    """Return which entries are equal to an earlier one."""
    order = places.argsort(stable=True)
    repeats = torch.zeros_like(places, dtype=torch.bool)
    repeats[order[1:]] = places[order[1:]] == places[order[:-1]]
    return repeats
