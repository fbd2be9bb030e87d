"""How well the features of a network find the other view of a patch, a measure of every method without labels.

Two overlapping crops of a patch, changed in intensity, show the same tissue. Two retrievals are measured for each stage of the
network: of the patch, by features pooled over all positions, and of a point, by the features at the point. Features are
standardised over the measured sample, since instance normalisation gives every channel of every patch nearly the same mean.
The views are the same for all methods, so the values of different methods, and of random weights, can be compared.

Source: none; the standardisation is that of the linear evaluation of MoCo v3 (Chen et al., ICCV 2021), a batch normalisation
without scale and shift.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl.collapse import retrieval_top1
from nnssl.data.case_store import CaseStore
from nnssl.data.patch_boxes import as_volume, draw_box
from nnssl.draws import make_generator
from nnssl.evaluation.probe import frozen
from nnssl.networks.dense import decode, maps_up_to
from nnssl.networks.primus_positions import is_primus
from nnssl.networks.tokens import tokens_to_map
from nnssl.plan import DataChoices, PretextConfiguration
from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity, restrict_to
from nnssl.views.overlap import draw_overlapping, map_across, shown_by_both
from nnssl.views.points import brighter_part, draw_points, interpolate_at, place_of
from nnssl.views.spatial import AffineParams, AffineRange, apply_affine

PATCHES = 64
"""Number of patches among which the other view is searched."""
POINTS = 16
"""Number of points in each patch; a point is searched among the points of all patches."""
CROP_FRACTION = (0.5, 1.0)
LEAST_OVERLAP = 0.5
TOO_STRONG = ("inversion",)
"""Intensity changes of the plan that are left out, because they exchange bright and dark tissue."""
AT_ONCE = 8
"""Number of patches in a forward pass."""
CONSTANT = 1e-6
"""Standard deviation below which a feature counts as constant and is ignored."""


@dataclass(frozen=True)
class DrawnViews:
    """Two views of some patches, and where they come from.

    Attributes:
        drawn: Name of the case of each patch, and the number of the patch among those of its case.
        lower_vox: First voxel (z, y, x) of each patch in its case.
        crops: Positions of the first and of the second views in the patches.
        first: First views.
        second: Second views, of the same shape.
        shown: Voxels of the first views that the second ones show too.
        body: Voxels of the first views that are brighter than the mean of the patch.
        generators: One generator per patch, from which all of this was drawn.
    """

    drawn: tuple[tuple[str, int], ...]
    lower_vox: tuple[tuple[int, ...], ...]
    crops: tuple[AffineParams, AffineParams]
    first: Float[Tensor, "patch channel *shape"]
    second: Float[Tensor, "patch channel *shape"]
    shown: Bool[Tensor, " patch *shape"]
    body: Bool[Tensor, " patch *shape"]
    generators: list[torch.Generator]


@dataclass(frozen=True)
class ViewPairs:
    """Two views of some patches, and points that both views show.

    Attributes:
        first: First views.
        second: Second views, of the same shape.
        points_first: Positions of the points in the first views, zyx in voxels.
        points_second: Positions of the same points in the second views.
        valid: Which points exist; an overlap smaller than the number of points has fewer.
    """

    first: Float[Tensor, "patch channel *shape"]
    second: Float[Tensor, "patch channel *shape"]
    points_first: Float[Tensor, "patch points d"]
    points_second: Float[Tensor, "patch points d"]
    valid: Bool[Tensor, "patch points"]

    @property
    def chance(self) -> "Retrieval":
        """Expected retrieval by features that say nothing."""
        return Retrieval(1 / len(self.first), 1 / max(1, int(self.valid.sum())))


@dataclass(frozen=True)
class Retrieval:
    """Shares of queries whose partner in the other view is the most similar of all, between 0 and 1.

    Attributes:
        pooled: Share of the patches, by pooled features.
        points: Share of the points, by the features at the points.
    """

    pooled: float
    points: float


def smallest_patch(configuration: PretextConfiguration) -> tuple[int, ...]:
    """Return the smallest patch of all stages of a configuration, which all methods are measured on."""
    patches = [planned.schedule.patch_size for planned in configuration.stages.values()]
    return min(patches, key=lambda patch: (torch.Size(patch).numel(), patch))


def draw_views(
    store: CaseStore, names: Sequence[str], patch_size: Sequence[int], data: DataChoices, count: int = PATCHES
) -> DrawnViews:
    """Draw patches of cases in turn, and two overlapping views of each; the draw depends on the names of the cases only.

    Args:
        store: Preprocessed cases.
        names: Names of the cases to draw from.
        patch_size: Number of voxels of a patch along each axis.
        data: Settings of the configuration, which determine flips and intensity changes.
        count: Number of patches.
    """
    size, shape = as_volume(patch_size), tuple(patch_size)
    drawn = tuple((names[number % len(names)], number // len(names)) for number in range(count))
    patches, lowest = [], []
    for name, number in drawn:
        case = store.case(name)
        lower = draw_box(case.shape, size, case.foreground_vox, 1.0, make_generator(0, "retrieval/boxes", name, number))
        patch = torch.from_numpy(case.read_box(lower, size))
        patches.append(patch if len(shape) == 3 else patch[:, 0])
        lowest.append(tuple(int(each) for each in lower))
    volumes = torch.stack(patches)
    generators = [make_generator(0, "retrieval/views", *each) for each in drawn]
    changes = restrict_to(IntensityRange(), [name for name in data.intensity_views if name not in TOO_STRONG])
    crops = draw_overlapping(
        generators, AffineRange(CROP_FRACTION, (), data.flip_axes), shape, data.spacing_mm, LEAST_OVERLAP
    )
    first, second = (
        apply_affine(apply_intensity(volumes, draw_intensity(generators, changes, volumes.shape[1])), crop)
        for crop in crops
    )
    shown = shown_by_both(*crops, shape, volumes.device)
    body = apply_affine(brighter_part(volumes)[:, None].float(), crops[0], mode="nearest")[:, 0] > 0.5
    return DrawnViews(drawn, tuple(lowest), crops, first, second, shown, body, generators)


def draw_view_pairs(
    store: CaseStore, names: Sequence[str], patch_size: Sequence[int], data: DataChoices, count: int = PATCHES
) -> ViewPairs:
    """Draw the views of ``draw_views`` and points that both show. The arguments are those of ``draw_views``."""
    views, shape = draw_views(store, names, patch_size, data, count), tuple(patch_size)
    points = draw_points(views.generators, views.shown, POINTS, views.body, 1.0)
    place = place_of(points, shape)
    repeated = torch.stack([(row[:, None] == row[None]).tril(-1).any(dim=1) for row in place])
    valid = views.shown.flatten(1).gather(1, place) & ~repeated
    across = map_across(points.float(), *views.crops)[1].float()
    return ViewPairs(views.first, views.second, points.float(), across, valid)


def stage_maps(network: Any, volumes: Tensor, pretrained: Sequence[str]) -> dict[str, Tensor]:
    """Return the maps of the stages that a method pretrains, by name.

    Args:
        network: Network of a plan.
        volumes: Patches (batch, channel, *shape).
        pretrained: Prefixes of the names of pretrained parameters.

    Returns:
        Maps (batch, channel, *grid): ``encoder_0`` and ``decoder_0`` at full resolution, ``encoder_1`` and ``decoder_1`` at
        the next coarser one, and so on; ``transformer`` for that of a hybrid; only ``encoder_0`` for Primus.
    """

    def trained(part: str) -> bool:
        return any(part.startswith(prefix) for prefix in pretrained)

    if is_primus(network):
        return {"encoder_0": tokens_to_map(network.encode(volumes), network.grid)}
    has_transformer = hasattr(network, "transformer")
    skips = list(network.transformed_maps(volumes) if has_transformer else network.encoder(volumes))
    before = maps_up_to(network.encoder, volumes, network.token_stage) if has_transformer else []
    read = [*before, *skips[len(before) :]]
    maps = {f"encoder_{level}": each for level, each in enumerate(read) if trained(f"encoder.stages.{level}.")}
    if has_transformer and trained("transformer.blocks."):
        maps["transformer"] = skips[network.token_stage]
    count = len(network.decoder.stages)
    levels = [count - 1 - index for index in range(count) if trained(f"decoder.stages.{index}.")]
    if levels:
        decoded = decode(network.decoder, skips, min(levels))[1:]
        maps |= {f"decoder_{level}": decoded[count - 1 - level] for level in levels}
    return maps


@contextmanager
def as_exported(network: nn.Module, fixed: Mapping[str, float]) -> Iterator[None]:
    """Set the parameters that a method fixes on export, and restore them afterwards.

    Args:
        network: Network of the method.
        fixed: Values by the names of the parameters.
    """
    parameters = {name: network.get_parameter(name) for name in fixed}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.fill_(fixed[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def measure_retrieval(
    network: Any, pairs: ViewPairs, pretrained: Sequence[str], fixed: Mapping[str, float], device: torch.device
) -> dict[str, Retrieval]:
    """Measure both retrievals for every pretrained stage of a network, which is left as it was, in float32.

    Args:
        network: Network of a plan, on the device.
        pairs: Views and points.
        pretrained: Prefixes of the names of pretrained parameters.
        fixed: Values of parameters that are set on export.
        device: Device of the network.
    """
    shape = tuple(pairs.first.shape[2:])
    pooled: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    points: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    sides = ((pairs.first, pairs.points_first), (pairs.second, pairs.points_second))
    with frozen(network), as_exported(network, fixed), torch.autocast(device.type, enabled=False):
        for rows in torch.arange(len(pairs.first)).split(AT_ONCE):
            valid = pairs.valid[rows].to(device)
            for side, (volumes, places) in enumerate(sides):
                maps = stage_maps(network, volumes[rows].to(device), pretrained)
                for name, each in maps.items():
                    pooled.setdefault(name, ([], []))[side].append(each.float().flatten(2).mean(dim=2))
                    read = interpolate_at(each, places[rows].to(device), shape)
                    points.setdefault(name, ([], []))[side].append(read[valid])
        return {name: Retrieval(_retrieve(*pooled[name]), _retrieve(*points[name])) for name in pooled}


def standardised(
    first: Float[Tensor, "samples d"], second: Float[Tensor, "samples d"]
) -> tuple[Float[Tensor, "samples d"], Float[Tensor, "samples d"]]:
    """Return features of both views with mean 0 and standard deviation 1 over all samples of both; constant ones become 0."""
    both = torch.cat([first, second])
    mean, std = both.mean(dim=0), both.std(dim=0, correction=0)
    std = std.masked_fill(std < CONSTANT, torch.inf)
    return (first - mean) / std, (second - mean) / std


def _retrieve(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the mean retrieval in both directions of features that are standardised over both views."""
    a, b = standardised(torch.cat(first), torch.cat(second))
    return float(retrieval_top1(a, b) + retrieval_top1(b, a)) / 2
