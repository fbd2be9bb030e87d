"""Regions: every point of one view is assigned to the supervoxel that it belongs to, by prototypes from another view.

Source: after Gao et al., Learning Generalizable 3D Medical Image Representations from Mask-Guided Self-Supervision (MASS), CVPR
2026, where a network segments, in one view of a volume, the structure that a mask marks in another view. MASS takes its masks
from SAM2; supervoxels in their place keep most of the gain without any training on labels (the paper's ablation).

Cases are partitioned by SLIC into supervoxels of several sizes. The reference view is the whole patch, the query view a crop of
it; both change in intensity. The prototype of a supervoxel is the mean of the projected
features at its reference points. Each
query point is classified among the prototypes of its own patch and of all others of the batch (cross-entropy and Dice).
Encoder and decoder are exported; the projection is discarded. Points are drawn where the patch may be learned from (not in air,
padding, or faces that were masked out), and supervoxels end there; a patch without such voxels has no regions and no loss.

Deviations:
    * Masks: supervoxels of a size drawn for each patch and step, not SAM2's masks of whole structures.
    * Task: the network of MASS receives a mask as a task embedding and predicts one mask at a time. Here the features of the
      plan's U-Net are compared with all prototypes at once, so that pretraining and fine-tuning use the same network.
    * Both losses are computed at sampled points, not at all voxels.
    * Neighbouring supervoxels can belong to one structure and are told apart nevertheless.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from nnssl.losses.prototypes import prototype_loss, prototypes_of
from nnssl.methods.point_features import features_of_both
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import (
    Count,
    CropFraction,
    NotNegative,
    Positive,
    RotationDeg,
    Share,
    TrainingSettings,
    TwoOrMore,
)
from nnssl.networks.dense import ENCODER_AND_DECODER, DenseKind, dense_channels, trained_up_to_segmentation
from nnssl.networks.heads import PointProjection
from nnssl.networks.pieces import recompute_stages
from nnssl.networks.tokens import take_tokens
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.learnable import mask_of_patches, mask_of_view
from nnssl.views.points import brighter_part, draw_points, place_of
from nnssl.views.regions import RegionPoints, assign_regions
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_affine, map_points, valid_mask

LARGEST_EDGE_MM = 48.0
"""Largest edge of a supervoxel that the plan chooses: about that of a left ventricle or a vertebra."""
EDGE_SHARE = 0.25
"""Share of the patch's shortest side, without a thick axis, that the largest edge covers at most."""
CANDIDATES = 8
"""Points that are drawn for each point of a step, so that enough of them lie in the supervoxels that are used."""
GOLDEN_RATIO = 0.6180339887
EDGE_VOX = 3.0
"""Smallest edge of a supervoxel in voxels of the patch's finest axis."""


@dataclass(frozen=True)
class RegionsSettings:
    """Settings of the stage. Sources of the defaults: MASS [P], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    edges_mm: Annotated[tuple[Positive, ...], Field(min_length=1)] = (24.0, 48.0)  # [R]
    """Edges of the supervoxels; a size is drawn for each patch and step."""
    regions_per_image: TwoOrMore = 32  # [R]
    """Largest number of supervoxels of a patch that a step uses."""
    least_points: Count = 2  # [R]
    """Smallest number of reference points of a supervoxel."""
    reference_points: TwoOrMore = 1024  # [R]
    query_points: TwoOrMore = 512  # [R]
    foreground_share: Share = 0.5  # [R]
    """Share of the points drawn from the voxels brighter than the mean of their patch."""
    temperature: Positive = 0.1  # [R]
    dice_weight: NotNegative = 1.0  # [P] Dice and cross-entropy
    features: DenseKind = "single"  # [P]
    hidden_dimensions: Count = 256  # [R]
    embedding_dimensions: TwoOrMore = 128  # [R]
    crop_fraction: CropFraction = (0.3, 1.0)  # [R]
    rotation_deg: RotationDeg = (30.0,)  # [R]
    flip_axes: tuple[int, ...] = (0, 1)  # [R]
    flip_probability: Share = 0.5  # [R]
    intensity_views: tuple[str, ...] = ("bias_field", "contrast", "brightness", "gamma", "blur", "noise")  # [R]


@dataclass(frozen=True)
class RegionViews:
    """Both views of a batch and their points.

    Attributes:
        reference: Whole patches (batch, channel, *shape).
        query: Crops of them, of the same shape.
        in_reference: Reference points (batch, points, d), zyx in voxels; they are centres of voxels. Until the supervoxels are
            known, these are candidates, of which those in used regions are kept.
        in_query: Query points (batch, points, d) in the crop; they are centres of voxels. As above.
        query_in_patch: The same query points in the patch.
        salt: Random number of each sample for the order of the regions.
        learnable: Mask of the voxels of the patches that may be learned from (batch, *shape).
        regions: Regions of the points; None until the supervoxels are known.
    """

    reference: Float[Tensor, "batch channel *shape"]
    query: Float[Tensor, "batch channel *shape"]
    in_reference: Float[Tensor, "batch reference d"]
    in_query: Float[Tensor, "batch query d"]
    query_in_patch: Float[Tensor, "batch query d"]
    salt: Int[Tensor, " batch"]
    learnable: Bool[Tensor, " batch *shape"]
    regions: RegionPoints | None = None


class Regions(PretextMethod):
    """Classification of points among the prototypes of supervoxels.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the crop, the rotation, the flips or the intensity changes cannot be drawn.
    """

    defaults: ClassVar[RegionsSettings] = RegionsSettings(
        training=TrainingSettings(
            epochs=200,  # [R]
            iterations_per_epoch=250,
            batch_size=8,  # [R]
            optimizer="adamw",  # [P]
            learning_rate=1e-3,  # [R]
            momentum=(0.9, 0.999),  # [R]
            weight_decay=1e-4,  # [R]
            learning_rate_schedule="cosine",  # [R]
            warmup_epochs=10,  # [R]
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: RegionsSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        channels = dense_channels(network.encoder.output_channels, settings.features)
        self.head = PointProjection(channels, settings.hidden_dimensions, settings.embedding_dimensions)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's features and ranges of the views, and the edges that suit the patch."""
        return {
            "edges_mm": edges_of_patch(configuration.patch_size, configuration.spacing_mm, configuration.thick_axis),
            "features": configuration.dense.features,
            "crop_fraction": configuration.crop_fraction,
            "rotation_deg": configuration.rotation_deg,
            "flip_axes": configuration.flip_axes,
            "intensity_views": configuration.intensity_views,
        }

    def supervoxel_edges_mm(self) -> tuple[float, ...]:
        """Return the edges of the supervoxels that cases are partitioned into."""
        return self.settings.edges_mm

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> RegionViews:
        """Return both views and the points at which they are compared."""
        own, spacing_mm, shape = self.settings, self.configuration.spacing_mm, volumes.shape[2:]
        channels, ranges, body = volumes.shape[1], intensity_range(own), brighter_part(volumes)
        reference = apply_intensity(volumes, draw_intensity(generators, ranges, channels))
        crop = draw_affine(generators, affine_range(own), shape, spacing_mm)
        query = apply_affine(apply_intensity(volumes, draw_intensity(generators, ranges, channels)), crop)
        most = math.prod(shape)
        kept = mask_of_patches(learnable, volumes)
        count = min(CANDIDATES * own.reference_points, most)
        in_reference = _mixed(draw_points(generators, kept, count, body, own.foreground_share).float())
        cropped = apply_affine(body[:, None].float(), crop, mode="nearest")[:, 0] > 0.5
        valid = valid_mask(crop, shape, volumes.device) & mask_of_view(kept, crop)
        count = min(CANDIDATES * own.query_points, most)
        in_query = _mixed(draw_points(generators, valid, count, cropped, own.foreground_share).float())
        salt = torch.cat([torch.randint(2**30, (1,), generator=each) for each in generators]).to(volumes.device)
        in_patch = map_points(in_query, crop, "to_input")
        return RegionViews(reference, query, in_reference, in_query, in_patch, salt, kept)

    def partitioned(self, views: RegionViews, supervoxels: Int[Tensor, " batch *shape"]) -> RegionViews:
        """Return the views with points in used regions, and their regions; points elsewhere fill up what is missing."""
        own, shape = self.settings, supervoxels.shape[1:]
        flat = (supervoxels * views.learnable).flatten(1)  # 0 is no supervoxel
        last = torch.tensor([length - 1 for length in shape], device=supervoxels.device)
        nearest = views.query_in_patch.round().long().clamp_min(0).minimum(last)
        found = assign_regions(
            flat.gather(1, place_of(views.in_reference.long(), shape)),
            flat.gather(1, place_of(nearest, shape)),
            views.salt,
            own.regions_per_image,
            own.least_points,
        )
        kept = (found.reference < 0).int().argsort(dim=1, stable=True)[:, : own.reference_points]
        asked = (found.query < 0).int().argsort(dim=1, stable=True)[:, : own.query_points]
        return replace(
            views,
            in_reference=take_tokens(views.in_reference, kept),
            in_query=take_tokens(views.in_query, asked),
            query_in_patch=take_tokens(views.query_in_patch, asked),
            regions=RegionPoints(found.reference.gather(1, kept), found.query.gather(1, asked), found.used),
        )

    def losses(self, views: RegionViews, progress: float) -> StepOutput:
        """Return cross-entropy and Dice of the query points among the prototypes."""
        own = self.settings
        assert views.regions is not None, "the trainer passes supervoxels, because the method names their edges"
        images, points = (views.reference, views.query), (views.in_reference, views.in_query)
        first, second = features_of_both(self.network, images, points, own.features, own.training.pieces)
        reference, query = (self.head(each.flatten(0, 1)).unflatten(0, each.shape[:2]) for each in (first, second))
        prototypes = prototypes_of(reference, views.regions.reference, own.regions_per_image)
        found = prototype_loss(query, views.regions.query, prototypes, views.regions.used, own.temperature)
        losses = {"cross_entropy": found.cross_entropy}
        if own.dice_weight:
            losses["dice"] = own.dice_weight * found.dice
        monitors = {
            "head_accuracy": found.accuracy,
            "regions_per_image": views.regions.used.float().sum(dim=1).mean(),
            "points_with_region": (views.regions.query >= 0).float().mean(),
        }
        return StepOutput(losses, query.detach()[:, 0], monitors)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder and projection; biases and norms have no weight decay."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return encoder and decoder."""
        return Exported(pretrained=ENCODER_AND_DECODER)


def affine_range(settings: RegionsSettings) -> AffineRange:
    """Return the range of crops, rotations and flips of the query view."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg, settings.flip_axes, settings.flip_probability)


def intensity_range(settings: RegionsSettings) -> IntensityRange:
    """Return the intensity changes named in the settings, with the default ranges of ``IntensityRange``."""
    return restrict_to(IntensityRange(), settings.intensity_views)


def edges_of_patch(shape: Sequence[int], spacing_mm: Sequence[float], thick_axis: int | None) -> tuple[float, ...]:
    """Return edges of supervoxels that suit a patch, ascending: the largest one and its half.

    The largest is a quarter of the patch's shortest side, at most 48 mm; none is below three voxels.

    Args:
        shape: Number of voxels of the patch along each axis.
        spacing_mm: Spacing of the patch along each axis.
        thick_axis: Axis of thick slices, which does not count; None if there is none.
    """
    axes = [axis for axis in range(len(shape)) if axis != thick_axis]
    shortest = min(shape[axis] * spacing_mm[axis] for axis in axes)
    least = EDGE_VOX * min(spacing_mm[axis] for axis in axes)
    largest = min(LARGEST_EDGE_MM, EDGE_SHARE * shortest)
    return tuple(sorted({float(f"{max(least, largest / part):.3g}") for part in (1, 2)}))


def _mixed(points: Float[Tensor, "batch points d"]) -> Float[Tensor, "batch points d"]:
    """Return points in an order in which every part has the same share of the body's points; ``draw_points`` puts these first."""
    order = (torch.arange(points.shape[1], device=points.device, dtype=torch.float64) * GOLDEN_RATIO % 1).argsort()
    return points[:, order]
