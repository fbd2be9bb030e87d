"""Pixel-global: a teacher and a student agree on whole images and on every voxel that both see.

Source: "Pixel-global self-supervised learning with uncertainty-aware context stabilizer" (2022), equations 2 to 6. No code
of the authors is public.

Student and teacher (its moving average) see two crops of a patch. The global loss compares their pooled encoder features by
the cross-entropy of their softmaxes. The local loss does the same at every voxel of the student's crop that the teacher's crop
shows too; correspondences follow from the drawn parameters. The context stabilizer subtracts the same discrepancy measured on
another image under the same changes. Points where the teacher is uncertain, by the entropy of passes with dropout, get a
smaller weight. Encoder and decoder of the student are exported; heads and teacher are discarded. Points lie where the image may
be learned from (not in air, padding, or faces that were masked out); with a stabilizer, where both images of a pair may.

Deviations:
    * Equation 2 is reversed: as printed, the teacher would be 99.6 % student after one step. Here the teacher is kept.
    * The stabilizer as printed (equation 6) gives no incentive to agree: both images are drawn in the same way, so the signed
      difference is 0 on average, and its absolute value is smallest when all images disagree equally. ``literal`` is equation
      6, ``none`` equation 4, ``signed_detached`` has the gradient of ``none``, ``added`` is ``CE + beta |CE - CE_delta|``. The
      cross-entropy itself is logged beside the loss. The default is equation 4: with equation 6, the exported network finds the
      other view of a patch no better than with random weights.
    * The other image is another image of the batch with the same draws: images are taken in pairs, which costs no further
      pass.
    * Sums over voxels become means over drawn voxels. Weights are ``1 - U``, but at least ``least_weight``, because an untrained
      teacher is uncertain everywhere, and a few points would decide.
    * The entropy is divided by the log of the number of dimensions, so that ``1 - U`` lies between 0 and 1.
    * Dropout is in the heads, so the teacher's network runs once and its head ``uncertainty_passes`` times. The target is
      a pass without dropout.
    * Against collapse the paper has batch normalisation, which these networks do not have. Here the last layer of both heads
      is standardised (``networks.heads.standardised_rows``), and the teacher's softmax is sharper than the student's (DINO).
    * Student and teacher exchange their crops only if ``exchange_views`` is set. The student's head has dropout too.
    * LARS with a learning rate of 0.2 is out of its regime at batch 8; here AdamW.
    * The teacher's probabilities are interpolated instead of its features: each corner voxel is projected and normalised first.
    * The paper uses all shared voxels of two random crops; here points are drawn, and crops share at least ``least_overlap`` of
      the smaller one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from nnssl.collapse import retrieval_top1
from nnssl.distributed import world_size
from nnssl.errors import UserError
from nnssl.losses.distillation import (
    Stabilizer,
    distillation_cross_entropy,
    stabilise,
    weighted_mean,
)
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import (
    Count,
    CropFraction,
    Factor,
    NotNegative,
    Positive,
    PositiveShare,
    RotationDeg,
    Share,
    TrainingSettings,
    TwoOrMore,
    WholeNumber,
    changes_in_common,
)
from nnssl.momentum import cosine_momentum, make_teacher, momentum_for_run
from nnssl.networks.dense import ENCODER_AND_DECODER, decoder_maps, trained_up_to_segmentation
from nnssl.networks.heads import PointAssignment, PooledAssignment
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.networks.uncertainty import normalised_entropy, point_uncertainty
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.learnable import mask_of_patches, mask_of_view
from nnssl.views.overlap import draw_overlapping, map_across, shown_by_both
from nnssl.views.partners import check_pairs, pair_up
from nnssl.views.points import corner_points, draw_points, interpolate_at, place_of
from nnssl.views.spatial import AffineRange, apply_affine, check_affine

MONITORED_POINTS = 256
"""Approximate number of points of a step on which retrieval is measured."""


@dataclass(frozen=True)
class PixelGlobalSettings:
    """Settings of the stage.

    Sources of the defaults: the paper [P], DINO or BYOL, on which it builds [D], recommended here [R].
    """

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    stabilizer: Stabilizer = "none"  # [P] equation 4; equation 6 is ``literal``
    stabilizer_share: NotNegative = 0.5  # [R], for ``added`` only
    uncertainty_passes: WholeNumber = 20  # [P]
    """Number of passes of the teacher's head with dropout; 0 gives all points the same weight."""
    least_weight: Share = 0.05  # [R]
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.2  # not stated
    global_weight: NotNegative = 1.0  # [P]
    local_weight: NotNegative = 1.0  # [P]
    points: TwoOrMore = 8192  # [R]; all shared voxels in the paper
    """Number of points per step, over all processes; every image gets the same number."""
    global_hidden: Count = 256  # not stated
    global_dimensions: TwoOrMore = 256  # [R]
    global_length: Positive = 1.0  # [R]
    """Length of a row of global logits, before the temperatures; the larger, the farther apart strangers and twins can be."""
    local_hidden: Count = 64  # [R]; the passes cost in proportion to it
    local_dimensions: TwoOrMore = 64  # [R]
    teacher_temperature: Positive = 0.04  # [D] DINO
    student_temperature: Positive = 0.1  # [D] DINO
    teacher_momentum: Factor = 0.996  # [P] rises to 1
    exchange_views: bool = False  # [D] BYOL and DINO
    """Whether student and teacher also see each other's crop, at twice the cost; the loss is the mean of both."""
    crop_fraction: CropFraction = (0.25, 1.0)  # [R]
    """Smallest and largest share of the patch's area or volume that a view shows."""
    least_overlap: PositiveShare = 0.3  # [R]
    """Smallest share of the smaller crop that both crops have in common."""
    rotation_deg: RotationDeg = (30.0,)  # [R]
    flip_axes: tuple[int, ...] = (0, 1)  # [P]
    flip_probability: Share = 0.5  # [R]
    intensity_views: tuple[str, ...] = ("contrast", "gamma")  # [P]
    contrast: Factor = 0.3  # [R]
    gamma: tuple[Positive, Positive] = (0.7, 1.5)  # [R]
    gamma_probability: Share = 1.0


@dataclass(frozen=True)
class CorrespondingViews:
    """Two crops of each patch and the points that both show.

    Attributes:
        student: View of the student (batch, channel, *shape).
        teacher: View of the teacher, of the same shape.
        points_student: Positions of the points in the student's view (batch, points, d): centres of voxels, zyx.
        points_teacher: Positions of the same points in the teacher's view.
        valid: Validity of the points (batch, points): 1, or 0 for all points of an image whose crops have no voxel in common that
            may be learned from. If there are fewer such voxels than points, they are repeated.
        partner: Index of the image with the same draws (batch,); the image's own index if it has no partner.
        seeds: Random seed of each image for dropout; partners have the same.
    """

    student: Float[Tensor, "batch channel *shape"]
    teacher: Float[Tensor, "batch channel *shape"]
    points_student: Float[Tensor, "batch points d"]
    points_teacher: Float[Tensor, "batch points d"]
    valid: Float[Tensor, "batch points"]
    partner: Int[Tensor, " batch"]
    seeds: tuple[int, ...]

    def exchanged(self) -> "CorrespondingViews":
        """Return the same crops and points with the roles of student and teacher exchanged, and other dropout."""
        return replace(
            self,
            student=self.teacher,
            teacher=self.student,
            points_student=self.points_teacher,
            points_teacher=self.points_student,
            seeds=tuple(seed + 2**32 for seed in self.seeds),  # beyond those of layers and passes
        )


class PixelGlobal(PretextMethod):
    """Global and local distillation with the context stabilizer.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the batch is too small to compare its images or cannot be divided into pairs, or views cannot be drawn.
    """

    defaults: ClassVar[PixelGlobalSettings] = PixelGlobalSettings(
        training=TrainingSettings(
            epochs=500,  # [P]
            iterations_per_epoch=250,
            batch_size=8,  # [P]
            optimizer="adamw",  # [R]; LARS in the paper
            learning_rate=3e-4,  # [R]
            momentum=(0.9, 0.999),
            weight_decay=1e-6,  # [R]; 1.5e-6 in BYOL
            learning_rate_schedule="cosine",  # [P]
            warmup_epochs=2,  # [P]
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: PixelGlobalSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_settings(settings, world_size())
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        channels = network.encoder.output_channels
        batch, widths = settings.training.batch_size, (settings.global_hidden, settings.global_dimensions)
        self.global_head = PooledAssignment(channels[-1], *widths, batch, settings.global_length)
        self.local_head = PointAssignment(
            channels[0], settings.local_hidden, settings.local_dimensions, settings.dropout
        )
        self.teacher = make_teacher(network)
        self.teacher_global_head = make_teacher(self.global_head)
        self.teacher_local_head = make_teacher(self.local_head)
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's crop, rotation, flips and intensity views."""
        return {
            "crop_fraction": configuration.crop_fraction,
            "rotation_deg": configuration.rotation_deg,
            "flip_axes": configuration.flip_axes,
            "intensity_views": changes_in_common(configuration.intensity_views, cls.defaults.intensity_views),
        }

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> CorrespondingViews:
        """Return two crops of each patch, with the same draws for partners, and points that both crops show."""
        own, spacing_mm, shape, device = self.settings, self.configuration.spacing_mm, volumes.shape[2:], volumes.device
        first, partner = pair_up(len(volumes))
        shared = [torch.Generator().set_state(generators[index].get_state()) for index in first]
        crops = draw_overlapping(shared, affine_range(own), shape, spacing_mm, own.least_overlap)
        ranges = intensity_range(own)
        student, teacher = (
            apply_affine(apply_intensity(volumes, draw_intensity(shared, ranges, volumes.shape[1])), crop)
            for crop in crops
        )
        kept = mask_of_patches(learnable, volumes)
        if own.stabilizer != "none":  # the same points for all images of a group
            kept = kept & kept[partner] & kept[partner][partner]
        shown = shown_by_both(*crops, shape, device) & mask_of_view(kept, crops[0])
        points = draw_points(shared, shown, points_of_image(own, shape)).float()
        return CorrespondingViews(
            student=student,
            teacher=teacher,
            points_student=points,
            points_teacher=map_across(points, *crops)[1],
            valid=shown.flatten(1).gather(1, place_of(points, shape)).float(),
            partner=torch.tensor(partner, device=device),
            seeds=tuple(int(torch.randint(2**60, (1,), generator=each)) for each in shared),
        )

    def losses(self, views: CorrespondingViews, progress: float) -> StepOutput:
        """Return both losses, with the cross-entropy per voxel, uncertainty and retrieval as monitors."""
        first = self._one_direction(views)
        if not self.settings.exchange_views:
            return first
        second = self._one_direction(views.exchanged())
        losses, monitors = (
            {name: (each[name] + other[name]) / 2 for name in each}
            for each, other in ((first.losses, second.losses), (first.monitors, second.monitors))
        )
        return StepOutput(losses, first.embeddings, monitors)

    def _one_direction(self, views: CorrespondingViews) -> StepOutput:
        """Return losses and monitors of the student's crops, as the teacher's crops answer them."""
        own, pieces = self.settings, self.settings.training.pieces
        student = partial(pooled_and_points, self.network, self.global_head)
        teacher = partial(pooled_and_points, self.teacher, self.teacher_global_head)
        corners, _ = corner_points(views.points_teacher, views.teacher.shape[2:])
        with torch.no_grad():  # first, while there is no graph of the student beside the teacher's maps
            taught = in_pieces(teacher, [views.teacher, views.points_teacher, corners.flatten(1, 2)], pieces)
            logits = self.teacher_global_head.assign(taught["pooled"])
            global_target = (logits / own.teacher_temperature).softmax(dim=1)
            local_target = self.local_target(taught["corners"], views)
            uncertainty = self.uncertainty(taught["points"], views)
        seen = in_pieces(student, [views.student, views.points_student], pieces)
        whole, features = self.global_head.assign(seen["pooled"]), seen["points"]
        local = self.local_head(features, views.seeds)

        per_image = distillation_cross_entropy(global_target, whole / own.student_temperature)
        per_point = distillation_cross_entropy(local_target, local / own.student_temperature)
        weights = views.valid * (1 - uncertainty).clamp_min(own.least_weight)
        stabilised = stabilise(per_point, views.partner, own.stabilizer, own.stabilizer_share)
        losses = {
            "global": own.global_weight * per_image.mean(),
            "local": own.local_weight * weighted_mean(stabilised, weights),
        }
        with torch.no_grad():
            # These answers are computed without dropout, because different masks alone would look like variety.
            answers = (self.local_head(features, None) / own.student_temperature).softmax(dim=2)
            monitors = self._monitors(per_point, uncertainty, answers, local_target, views)
            monitors["global_floor"] = normalised_entropy(global_target).mean() * math.log(own.global_dimensions)
            monitors["head_global_retrieval"] = retrieval_top1(whole, (global_target + 1e-6).log())
        return StepOutput(losses, answers.flatten(0, 1)[:: self._every(answers)], monitors)

    def local_target(
        self, features: Float[Tensor, "batch corners channel"], views: CorrespondingViews
    ) -> Float[Tensor, "batch points d"]:
        """Return the teacher's probabilities at the points: those of the voxels around each point, linearly weighted."""
        corners, weights = corner_points(views.points_teacher, views.teacher.shape[2:])
        logits = self.teacher_local_head(features) / self.settings.teacher_temperature
        probabilities = logits.softmax(dim=2).unflatten(1, corners.shape[1:3])
        return (probabilities * weights[..., None]).sum(dim=2)

    def uncertainty(
        self, features: Float[Tensor, "batch points channel"], views: CorrespondingViews
    ) -> Float[Tensor, "batch points"]:
        """Return the normalised entropy of the mean over passes with dropout, 0 to 1; 0 if there are no passes."""
        passes = self.settings.uncertainty_passes
        if not passes:
            return torch.zeros_like(views.valid)
        return point_uncertainty(
            self.teacher_local_head, features, views.seeds, passes, self.settings.teacher_temperature
        )

    def _every(self, answers: Tensor) -> int:
        return max(1, answers.shape[0] * answers.shape[1] // MONITORED_POINTS)

    @torch.no_grad()
    def _monitors(
        self, per_point: Tensor, uncertainty: Tensor, answers: Tensor, target: Tensor, views: CorrespondingViews
    ) -> dict[str, Tensor]:
        """Return monitors that show whether views are aligned, independently of the stabilizer."""
        every = self._every(answers)
        chosen = views.valid.flatten()[::every] > 0
        first, second = ((side.flatten(0, 1)[::every] + 1e-6).log() for side in (answers, target))
        return {
            "voxel_cross_entropy": weighted_mean(per_point, views.valid),
            "target_entropy": weighted_mean(normalised_entropy(target), views.valid) * math.log(target.shape[-1]),
            "uncertainty": weighted_mean(uncertainty, views.valid),
            "valid_share": views.valid.mean(),
            "head_retrieval": retrieval_top1(first, second, chosen),
        }

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return student and heads; biases and norms have no weight decay."""
        return split_by_decay(self)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return network and heads with their teachers."""
        return [
            (self.network, self.teacher),
            (self.global_head, self.teacher_global_head),
            (self.local_head, self.teacher_local_head),
        ]

    def momentum(self, progress: float) -> float:
        """Return the share of the teacher that is kept, which rises to 1 by a cosine."""
        total = self.settings.training.total_steps
        return cosine_momentum(round(progress * total), total, self._momentum)

    def exported(self) -> Exported:
        """Return encoder and decoder of the student."""
        return Exported(pretrained=ENCODER_AND_DECODER)


def check_settings(settings: PixelGlobalSettings, processes: int) -> None:
    """Check that images of a batch can be compared, and that both images of a pair are in the same process.

    Args:
        settings: Settings of the stage.
        processes: Number of processes that share the batch.

    Raises:
        UserError: If the batch is too small or cannot be divided into pairs.
    """
    batch = settings.training.batch_size
    if batch < 2 and (settings.global_weight or settings.stabilizer != "none"):
        raise UserError(
            f"batch_size must be at least 2, got {batch}: the global loss and stabilizer={settings.stabilizer} compare the "
            "images of a batch; set batch_size=2, or global_weight=0 and stabilizer=none"
        )
    if processes > 1:  # in one process, an odd last image joins a pair
        check_pairs(batch, processes)


def affine_range(settings: PixelGlobalSettings) -> AffineRange:
    """Return the range of crops, rotations and flips."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg, settings.flip_axes, settings.flip_probability)


def intensity_range(settings: PixelGlobalSettings) -> IntensityRange:
    """Return the range of the intensity changes named in the settings: contrast and gamma."""
    ranges = IntensityRange(
        contrast=settings.contrast,
        contrast_probability=1.0,
        gamma=settings.gamma,
        gamma_probability=settings.gamma_probability,
    )
    return restrict_to(ranges, settings.intensity_views)


def points_of_image(settings: PixelGlobalSettings, shape: Sequence[int]) -> int:
    """Return the number of points to draw from each image: as the settings say, but at most the number of its voxels."""
    return max(1, min(settings.points // settings.training.batch_size, math.prod(shape)))


def pooled_and_points(network: Any, head: PooledAssignment, volumes: Tensor, *places: Tensor) -> dict[str, Tensor]:
    """Return pooled features of images, and the decoder's features at their points and, if given, at the points' corners."""
    maps = decoder_maps(network, volumes)
    read = [interpolate_at(maps[-1], each, volumes.shape[2:]) for each in places]
    return {"pooled": head.pool(maps[0]), **dict(zip(("points", "corners"), read, strict=False))}
