"""Pix2Rep: dense equivariant contrast that pretrains encoder and decoder together.

Source: Seince et al., Dense Self-Supervised Learning for Medical Image Segmentation (Pix2Rep), MIDL 2024; the authors' code
(v1 only) for the numbers that the paper does not state.

A patch ``x`` gets two draws of intensity changes, ``t`` and ``t'``, and one draw of a spatial map ``phi``. One branch warps
after the network, ``z_a = g(phi . f(t(x)))``, the other before it, ``z_b = g(f(phi . t'(x)))``. At the same point of the
view both describe the same tissue. v1 contrasts pairs of points (NT-Xent), v2 decorrelates dimensions (Barlow Twins). There
is no teacher and no stopped gradient: both branches train ``f``, the whole U-Net up to its segmentation layers, and ``g``.
``f`` is exported, ``g`` is discarded. Points are drawn where the view may be learned from (not in air, padding, or faces that
were masked out). If there are fewer such voxels than points, they are repeated; a view without any draws from all valid voxels.

Deviations:
    * Order of warp and ``g``: the paper warps the projected map, ``phi . g(f(t(x)))``. Here ``f`` is interpolated at the
      sampled points and then projected by ``g``. The full-resolution projected map is never computed, and memory grows with
      the number of points. Where ``phi`` hits voxel centres, both are the same.
    * Valid points: in the authors' code, a point whose source lies outside the patch enters the loss as a zero vector. Here
      such points are never drawn.
    * Where points are drawn: the code draws them from all voxels of slices that were cropped around the reference
      segmentation. Here patches are whole, and half of the points are drawn from voxels brighter than the mean of their patch.
    * Number of points: "1,000" is per image in the text and per batch of 8 images in the code, 125 per image.
      ``points_per_image`` is the number per image, whatever the batch. v2 correlates all pixels in the paper, here the drawn
      points.
    * ``phi`` is built in millimetres (``views.spatial``) and rotates thick slices only about their own axis; flips are drawn
      for each axis separately. The code rotates by at most 90 degrees and never flips two axes.
    * Crop and flips are those of the plan, which all methods of a data set share, not the code's (sides of 0.33 to 0.95, drawn
      uniformly; flips of any axis): its smaller crops left slightly less on two data sets. After a rotation, voxels outside the
      patch are 0, the mean after z-scoring, and take part in no loss. On average, 72 % of a view of 320 x 128 rotated by any
      angle lies inside.
    * Noise and gamma: in the code, they apply to clipped raw values of MR, whose standard deviation is some tens to hundreds.
      Noise of at most 0.5 is then invisible, and an exponent within 5 % of 1 hardly more than a factor, which the network
      removes. Here strengths are in standard deviations, or of the patch's range, and such that the network sees them.
    * Blur: in voxels along all axes in the code; here of the same width in mm along thick slices as along the other axes.
    * Inversion: the code has ``1 - x`` on values that are clipped but not scaled; here ``p1 + p99 - x``. CT is not inverted.
    * Features: the paper widens the last decoder stage to 1,024 maps, which cost 8.6 GB for one patch of 128^3. ``single``
      reads the plan's last stage, ``pyramid`` concatenates all decoder stages (Goncharov et al., vox2vec, MICCAI 2023).
    * v2's weight and dimensions are not stated. Here they are those of Barlow Twins (0.0051) and of v1's head (256).
    * The code keeps the checkpoint with the best validation loss; here the last one is exported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl.collapse import retrieval_top1
from nnssl.losses.barlow_twins import barlow_twins
from nnssl.losses.nt_xent import nt_xent
from nnssl.methods.point_features import features_of_both
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, trained_parameters
from nnssl.methods.settings import (
    Count,
    CropFraction,
    Factor,
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
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import (
    IntensityRange,
    apply_intensity,
    check_intensity,
    draw_intensity,
    even_blur,
    restrict_to,
)
from nnssl.views.learnable import mask_of_patches, mask_of_view, mask_where_any
from nnssl.views.points import brighter_part, draw_points
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_affine, map_points, valid_mask

MONITORED_POINTS = 256
"""Number of evenly spaced points of a step on which retrieval is measured."""

TRAINING = TrainingSettings(
    epochs=200,  # [P]
    iterations_per_epoch=250,
    batch_size=8,  # [P]
    optimizer="adamw",  # [P] Adam: without weight decay the two are the same
    learning_rate=5e-4,  # [P]
    momentum=(0.9, 0.999),
    weight_decay=0.0,  # [P]
    learning_rate_schedule="constant",  # [C]
    warmup_epochs=0,  # [C]
    gradient_clip=12.0,  # nnU-Net's
)


@dataclass(frozen=True)
class DenseSettings:
    """Settings of both versions. Sources of the defaults: paper [P], authors' code [C], recommended [R] or measured [M] here."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    points_per_image: TwoOrMore = 125  # [C] 1,000 per batch of 8; [P] 1,000 per image, as the text can be read
    """Number of pairs of points per image. Each point is compared with the points of all images of the step."""
    foreground_share: Share = 0.5  # [R]
    """Share of the points drawn from the voxels brighter than the mean of their patch; the others come from all voxels."""
    features: DenseKind = "single"  # [P]
    hidden_dimensions: Count = 256  # [C]
    embedding_dimensions: TwoOrMore = 256  # [C]
    crop_fraction: CropFraction = (0.11, 0.9)  # [C]
    """Smallest and largest share of the patch's area or volume in the second view; 0.33 to 0.95 of each side in the code."""
    crop_uniform_in: Literal["volume", "side"] = "volume"  # [M]; side in the code
    """Whether the share of the area or volume, or that of the side, is uniform between these bounds."""
    rotation_deg: RotationDeg = (90.0,)  # [C]
    flip_axes: tuple[int, ...] = (0, 1)  # [P]
    flip_probability: Share = 0.5
    intensity_views: tuple[str, ...] = ("brightness", "contrast", "noise", "bias_field", "inversion")  # [P]
    brightness: NotNegative = 0.4  # not stated; in standard deviations of the patch
    contrast: Factor = 0.4  # not stated
    inversion_probability: Share = 0.35  # [C]
    bias_field: NotNegative = 0.3  # [R]; 0.9 in the code, on values that are not z-scored
    bias_field_probability: Share = 0.75  # [C]
    noise: NotNegative = 0.2  # [R] in standard deviations of the patch; 0.5 raw units in the code
    noise_probability: Share = 0.3  # [C]
    blur_vox: NotNegative = 1.3  # [C]
    """Largest sigma of the blur along the finest axis; the same width in mm along the others."""
    blur_probability: Share = 0.5  # [C]
    gamma: tuple[Positive, Positive] = (0.7, 1.5)  # [R]; 0.95 to 1.05 in the code, on raw values
    gamma_probability: Share = 0.5  # [R]; 0.9 in the code
    window: Factor = 0.3  # [R], CT only; in standard deviations of the patch
    window_probability: Share = 0.5  # [R]


@dataclass(frozen=True)
class Pix2RepSettings(DenseSettings):
    """Settings of v1."""

    temperature: Positive = 0.53  # [C]


@dataclass(frozen=True)
class Pix2RepV2Settings(DenseSettings):
    """Settings of v2."""

    points_per_image: TwoOrMore = 2048  # [R]; all pixels in the paper
    off_diagonal_weight: NotNegative = 0.0051  # Barlow Twins


@dataclass(frozen=True)
class EquivariantViews:
    """Both views of a batch, and the points at which they are compared.

    Attributes:
        before: View ``t(x)`` (batch, channel, *shape), which is warped after the network.
        warped: View ``phi . t'(x)``, of the same shape.
        points_before: Positions of the points in ``before`` (batch, points, d), zyx in voxels.
        points_warped: Positions of the same points in ``warped``, which are centres of voxels.
    """

    before: Float[Tensor, "batch channel *shape"]
    warped: Float[Tensor, "batch channel *shape"]
    points_before: Float[Tensor, "batch points d"]
    points_warped: Float[Tensor, "batch points d"]


class DensePoints(PretextMethod):
    """Base class of both versions: views, network, head and exported weights; a version adds the loss of pairs of points.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the crop, the rotation, the flips or the intensity changes cannot be drawn.
    """

    def __init__(self, network: Any, settings: Any, configuration: StageConfiguration) -> None:
        super().__init__()
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings, configuration.spacing_mm))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        channels = dense_channels(network.encoder.output_channels, settings.features)
        self.head = PointProjection(channels, settings.hidden_dimensions, settings.embedding_dimensions)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's features and ranges of the views."""
        return {
            "features": configuration.dense.features,
            "crop_fraction": configuration.crop_fraction,
            "rotation_deg": configuration.rotation_deg,
            "flip_axes": configuration.flip_axes,
            "intensity_views": configuration.intensity_views,
        }

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> EquivariantViews:
        """Return ``t(x)``, ``phi . t'(x)`` and the points at which they are compared."""
        own, spacing_mm, shape = self.settings, self.configuration.spacing_mm, volumes.shape[2:]
        channels, ranges = volumes.shape[1], intensity_range(own, spacing_mm)
        before = apply_intensity(volumes, draw_intensity(generators, ranges, channels))
        phi = draw_affine(generators, affine_range(own), shape, spacing_mm)
        warped = apply_affine(apply_intensity(volumes, draw_intensity(generators, ranges, channels)), phi)
        body = apply_affine(brighter_part(volumes)[:, None].float(), phi, mode="nearest")[:, 0] > 0.5
        count, kept = points_of_image(own, shape), mask_of_view(mask_of_patches(learnable, volumes), phi)
        valid = mask_where_any(valid_mask(phi, shape, volumes.device), kept)
        points = draw_points(generators, valid, count, body, own.foreground_share).float()
        return EquivariantViews(before, warped, map_points(points, phi, "to_input"), points)

    def losses(self, views: EquivariantViews, progress: float) -> StepOutput:
        """Return the loss of the pairs, embeddings for the collapse monitors, and similarity and retrieval of partners."""
        own = self.settings
        before, warped = embed_points(self.network, self.head, views, own.features, own.training.pieces)
        chosen = torch.linspace(0, len(before) - 1, min(MONITORED_POINTS, len(before)), device=before.device).long()
        first, second = before.detach()[chosen].float(), warped.detach()[chosen].float()
        monitors = {
            "head_similarity": nn.functional.cosine_similarity(first, second, dim=1).mean(),
            "head_retrieval": retrieval_top1(first, second),
        }
        return StepOutput(self.pair_losses(before, warped), first, monitors)

    def pair_losses(self, before: Float[Tensor, "pairs d"], warped: Float[Tensor, "pairs d"]) -> dict[str, Tensor]:
        """Return the parts of the loss for pairs of embedded points."""
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder and head."""
        return [ParameterGroup(trained_parameters(self))]

    def exported(self) -> Exported:
        """Return encoder and decoder."""
        return Exported(pretrained=ENCODER_AND_DECODER)


class Pix2Rep(DensePoints):
    """Version 1: NT-Xent over sampled points of the whole batch."""

    defaults: ClassVar[Pix2RepSettings] = Pix2RepSettings(training=TRAINING)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's features, ranges of the views, and number of points per image for a contrast."""
        return {**super().from_plan(configuration), "points_per_image": configuration.dense.contrast_points_per_image}

    def pair_losses(self, before: Float[Tensor, "pairs d"], warped: Float[Tensor, "pairs d"]) -> dict[str, Tensor]:
        """Return NT-Xent, the paper's loss of version 1."""
        return {"contrast": nt_xent(before, warped, self.settings.temperature)}


class Pix2RepV2(DensePoints):
    """Version 2: Barlow Twins over sampled points of the whole batch."""

    defaults: ClassVar[Pix2RepV2Settings] = Pix2RepV2Settings(training=TRAINING)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's features, ranges of the views, and number of points per image for a correlation matrix."""
        return {
            **super().from_plan(configuration),
            "points_per_image": configuration.dense.correlation_points_per_image,
        }

    def pair_losses(self, before: Float[Tensor, "pairs d"], warped: Float[Tensor, "pairs d"]) -> dict[str, Tensor]:
        """Return the loss of Barlow Twins, the paper's loss of version 2."""
        return {"redundancy": barlow_twins(before, warped, self.settings.off_diagonal_weight)}


def affine_range(settings: DenseSettings) -> AffineRange:
    """Return the range from which ``phi`` is drawn."""
    return AffineRange(
        settings.crop_fraction,
        settings.rotation_deg,
        settings.flip_axes,
        settings.flip_probability,
        settings.crop_uniform_in,
    )


def intensity_range(settings: DenseSettings, spacing_mm: Sequence[float]) -> IntensityRange:
    """Return the range from which the intensity changes ``t`` and ``t'`` are drawn.

    Args:
        settings: Settings of the stage.
        spacing_mm: Spacing of the patches along each axis.
    """
    ranges = IntensityRange(
        brightness_std=settings.brightness,
        brightness_probability=1.0,
        contrast=settings.contrast,
        contrast_probability=1.0,
        window_std=settings.window,
        window_probability=settings.window_probability,
        inversion_probability=settings.inversion_probability,
        bias_field=settings.bias_field,
        bias_field_probability=settings.bias_field_probability,
        noise_std=settings.noise,
        noise_probability=settings.noise_probability,
        blur_vox=even_blur(settings.blur_vox, spacing_mm),
        blur_probability=settings.blur_probability,
        gamma=settings.gamma,
        gamma_probability=settings.gamma_probability,
    )
    return restrict_to(ranges, settings.intensity_views)


def points_of_image(settings: DenseSettings, shape: Sequence[int]) -> int:
    """Return the number of points to draw from each image: as the settings say, but at most a quarter of its voxels."""
    return max(1, min(settings.points_per_image, math.prod(shape) // 4))


def embed_points(
    network: Any, head: nn.Module, views: EquivariantViews, kind: DenseKind, pieces: int = 1
) -> tuple[Float[Tensor, "pairs d"], Float[Tensor, "pairs d"]]:
    """Return ``z_a`` and ``z_b`` at the points of all images, one image after the other.

    Args:
        network: The whole U-Net ``f``.
        head: The projection ``g``, which normalises over the points of the whole batch.
        views: Both views and their points.
        kind: Maps that describe a point.
        pieces: Number of pieces in which the batch passes the network.
    """
    images, points = (views.before, views.warped), (views.points_before, views.points_warped)
    before, warped = features_of_both(network, images, points, kind, pieces)
    return head(before.flatten(0, 1)), head(warped.flatten(0, 1))
