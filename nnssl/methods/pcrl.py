"""PCRL: momentum contrast, and reconstruction of a requested transformed version of the crop.

Source: Zhou et al., Preservational Learning Improves Self-supervised Medical Image Models by Reconstructing Diverse
Contexts (PCRL), ICCV 2021. The authors describe their code (Luchixiang/PCRL) as a later version of the method.

Two crops of a patch are corrupted (blur, shuffling, in- or outpainting). The encoder ``o`` sees one, its moving average
``m`` the other, and a hybrid ``h`` mixes the features of both at every level (cross-model mixup). From the features of each of
the three, one decoder must produce a flipped and turned version of the clean crop. A code names the version and gates the
bottleneck (attention). InfoNCE compares bottleneck features. Encoder and decoder are exported; attention, projection, output
layer, moving average and queue are discarded. Reconstructed voxels that may not be learned from (air, padding, faces that were
masked out, what a rotated crop shows beyond its patch) leave the loss.

Deviations:
    * Equation 7 has no positive in its denominator. Here it is included, as in MoCo. (The code computes a binary contrast with
      a constant that it takes from the first batch.)
    * Features are compared before the attention, as in the code. After it, as in the paper, they would contain the drawn code.
    * Targets are the clean crops, as in the paper; the code turns the corrupted ones.
    * The queue gets the keys of ``m`` once, after the loss. The paper adds those of ``h``. The code enqueues before the look-up,
      so that two of its three terms have their own positives among the negatives.
    * The hybrid target of equation 8 is the mixed crop, turned. ``hybrid_target=turned_then_mixed`` mixes separately
      conditioned features and turned crops, as the code does.
    * Quarter turns only in a plane of equal sides and spacing, otherwise half turns: others would leave the voxel grid. The
      planner gives the patch equal sides wherever two spacings agree.
    * The head standardises its hidden vector over the batch; without that, all images collapse to one point with the queue.
    * For the attention's factor of the map and the normalisation of both factors, see ``networks.attention``.
    * Crops lie in the stage's patch and cover the plan's share of it; in the code they are between half and 1.75 times the
      input's size. Both overlap by the code's intersection over union, but are drawn in every step, not 16 pairs in advance.
    * Reconstructed voxels are standardised, without a sigmoid. In the code they lie in [0, 1] (``reconstruction_scale=unit``);
      there, the same weight of the reconstruction counts less beside the contrast.
    * The hybrid's share is drawn from Beta(1, 1), as in the paper; the code always gives the encoder the larger share.
    * The hidden layer of the projection comes before the mean over positions; in the code, after it (``networks.heads``).
    * No early stopping: the paper stops when the loss of held-out images has not improved for 30 epochs. As in the code, a run
      has a fixed length, no images are held out for the loss, and the last weights are exported, not the best ones.
    * Optimizer: SGD with a learning rate of 1e-3 in the paper; here AdamW, as in RepRec, whose contrast learned faster with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl.collapse import retrieval_top1
from nnssl.distributed import gather
from nnssl.errors import UserError
from nnssl.losses.contrastive import Negatives, momentum_contrast
from nnssl.losses.reconstruction import counted_mse, counted_share
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
    rotation_within,
)
from nnssl.momentum import make_teacher, momentum_for_run, queue_for_run
from nnssl.networks.attention import AttentionKind, TransformationAttention
from nnssl.networks.backbone import input_channels, widest_kernel
from nnssl.networks.dense import ENCODER, ENCODER_AND_DECODER, decode, trained_encoder, trained_up_to_segmentation
from nnssl.networks.heads import HeadNormalisation, PooledProjection
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.contexts import (
    MODELS,
    ContextViews,
    HybridTarget,
    ReconstructionScale,
    clean_crop,
    clean_in_scale,
    counted_clean,
    counted_targets,
    draw_mixing,
    mix,
    reconstruction_targets,
)
from nnssl.views.corruption import CorruptionRange, apply_corruption, draw_corruption
from nnssl.views.intensity import (
    IntensityRange,
    apply_intensity,
    check_intensity,
    draw_intensity,
    even_blur,
    restrict_to,
)
from nnssl.views.learnable import mask_of_patches, mask_of_view
from nnssl.views.overlap import draw_overlapping
from nnssl.views.spatial import AffineRange, apply_affine, check_affine
from nnssl.views.turns import (
    TurnParams,
    TurnSteps,
    check_turns,
    draw_turns,
    keeps_grid,
    mean_over_turns,
    no_turns,
    turn_code,
)


@dataclass(frozen=True)
class PCRLSettings:
    """Settings of the stage. Sources of the defaults: the paper [P], the authors' code [C], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    contrast_weight: NotNegative = 0.5  # [P]
    reconstruction_weight: NotNegative = 0.5  # [P], for voxels from 0 to 1
    """Weight of the reconstructions; with 0, only the contrast is computed, and the decoder is neither run nor trained."""
    reconstruction_scale: ReconstructionScale = "z_score"  # [R]; unit in the code
    """Scale of the reconstructed voxels: ``z_score`` as the network sees them, ``unit`` from 0 to 1 with a sigmoid."""
    temperature: Positive = 0.2  # [P] [C]
    head_normalisation: HeadNormalisation = "batch"  # [D]
    """``batch`` standardises the head's hidden vector over the batch, ``none`` leaves it as it is."""
    embedding_dimensions: TwoOrMore = 128  # [C]
    negatives: Negatives = "queue"  # [P]
    queue_length: Count = 16_384  # [C]
    teacher_momentum: Factor = 0.99  # [P]; 0.999 in the code
    attention: Literal[AttentionKind, "none"] = "outer"  # [P]; gate in the code
    """Kind of attention. ``none`` reconstructs the crop as it is, because the decoder does not receive the code."""
    attention_rank: Count = 64  # [R]; the number of channels in the paper
    mixup: bool = True  # [P]
    mixing_alpha: Positive = 1.0  # [P]; Beta(1, 1), as in the code, which takes the larger share for ``o``
    """Both parameters of the Beta distribution of the encoder's share in the hybrid; 1 is uniform."""
    hybrid_target: HybridTarget = "mixed_then_turned"  # [P]
    skips: bool = True  # [P]
    """Whether the decoder sees the encoder's high-resolution maps, which are not turned."""
    crop_fraction: CropFraction = (0.2, 1.0)  # [C] 2D
    least_iou: Share = 0.25  # [C]
    rotation_deg: RotationDeg = (10.0,)  # [C]
    flip_axes: tuple[int, ...] = (0, 1)  # [C]
    """Axes along which the crop may be flipped."""
    flip_probability: Share = 0.5  # [C]
    asked_flips: tuple[int, ...] = (0, 1)  # [P] all axes
    """Axes along which a code may flip the target."""
    asked_turns: TurnSteps = "quarter"  # [P]
    """Turns that a code may request in the plane: quarters, halves or none."""
    turn_plane: tuple[int, int] = (0, 1)  # [P] the first two axes
    blur_vox: NotNegative = 2.0  # [C]
    """Largest sigma of the blur along the finest axis; the same width in mm along the others."""
    blur_probability: Share = 1.0  # [C]
    shuffle_probability: Share = 0.5  # [C]
    paint_probability: Share = 0.9  # [C]
    inpainting_share: Share = 0.2  # [C]


class PCRL(PretextMethod):
    """Contrast and reconstruction of diverse contexts.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If all weights are 0, the contrast has no negatives, or crops, turns or the blur cannot be drawn.
    """

    defaults: ClassVar[PCRLSettings] = PCRLSettings(
        training=TrainingSettings(
            epochs=240,  # [C]
            iterations_per_epoch=250,
            batch_size=16,  # [C] 3D
            optimizer="adamw",  # [R]; SGD in the paper
            learning_rate=1e-3,  # [P]
            momentum=(0.9, 0.999),  # [P] for the first
            weight_decay=1e-4,  # [C]
            learning_rate_schedule="cosine",  # [P]
            warmup_epochs=0,
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: PCRLSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        shape, spacing_mm = configuration.patch_size, configuration.spacing_mm
        check_settings(settings)
        check_turns(shape, spacing_mm, settings.turn_plane, settings.asked_turns, settings.asked_flips)
        check_affine(affine_range(settings), shape, spacing_mm)
        check_intensity(intensity_range(settings, spacing_mm))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        encoder, channels = network.encoder, network.encoder.output_channels
        batch, dimensions = settings.training.batch_size, settings.embedding_dimensions
        self.head = PooledProjection(channels[-1], channels[-1], dimensions, batch, settings.head_normalisation)
        if settings.reconstruction_weight:
            if settings.attention != "none":
                bits, kernel = len(shape) + 4, widest_kernel(encoder.stages[-1])
                self.attention = TransformationAttention(
                    channels[-1], bits, settings.attention, settings.attention_rank, kernel
                )
            self.output = encoder.conv_op(channels[0], input_channels(encoder), 1)
        else:
            trained_encoder(network)
        self.teacher = make_teacher(encoder)
        self.teacher_head = make_teacher(self.head)
        if settings.negatives != "batch":
            self.queue = queue_for_run(settings.queue_length, batch, dimensions)
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's crop, rotation, flips, turns, attention rank and queue length.

        A code may flip every axis, including the thick one, because flips keep the voxel grid and the code names them.
        """
        plane = configuration.context.turn_plane
        # A patch that the user chose may have other proportions than the plan's.
        quarter = configuration.context.quarter_turns and keeps_grid(
            configuration.patch_size, configuration.spacing_mm, plane
        )
        return {
            "queue_length": configuration.queue_length,
            "crop_fraction": configuration.crop_fraction,
            "rotation_deg": rotation_within(configuration.rotation_deg, cls.defaults.rotation_deg),
            "flip_axes": configuration.flip_axes,
            "asked_flips": tuple(range(len(configuration.patch_size))),
            "asked_turns": "quarter" if quarter else "half",
            "turn_plane": plane,
            "attention_rank": configuration.context.attention_rank,
        }

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> ContextViews:
        """Return two crops of each patch, clean and corrupted, the requested transformations, and the mixing."""
        own, spacing_mm, shape = self.settings, self.configuration.spacing_mm, volumes.shape[2:]
        crops = draw_overlapping(generators, affine_range(own), shape, spacing_mm, own.least_iou, "iou")
        blur, corruption = intensity_range(own, spacing_mm), corruption_range(own)
        clean, seen = [], []
        kept, painted = mask_of_patches(learnable, volumes), None
        for crop in crops:
            blurred = draw_intensity(generators, blur, volumes.shape[1])
            painted = draw_corruption(generators, corruption, shape, spacing_mm, paint_like=painted)
            clean.append(apply_affine(volumes, crop))
            seen.append(apply_corruption(apply_intensity(clean[-1], blurred), painted))
        turns = draw_asked_turns(generators, own, len(shape))
        mixing = draw_mixing(generators, own.mixing_alpha)
        codes = {model: turn_code(each).to(volumes.device, non_blocking=True) for model, each in turns.items()}
        shares, masks = mixing.to(volumes.device), [mask_of_view(kept, crop) for crop in crops]
        return ContextViews(clean[0], clean[1], seen[0], seen[1], turns, codes, shares, masks[0], masks[1])

    def losses(self, views: ContextViews, progress: float) -> StepOutput:
        """Return InfoNCE of the queries (equation 7) and the mean squared errors of the reconstructions (equation 8)."""
        own = self.settings
        views = clean_in_scale(views, own.reconstruction_scale) if own.reconstruction_weight else views
        targets = reconstruction_targets(views, own.hybrid_target) if own.reconstruction_weight else {}
        counted = counted_targets(views, own.hybrid_target) if own.reconstruction_weight else {}
        share = {model: counted_share(each) for model, each in counted.items()}
        codes = [views.codes[model] for model in targets]
        tensors = [views.seen_o, views.seen_m, views.mixing, *codes, *targets.values(), *counted.values()]
        found = in_pieces(partial(self._of_piece, list(targets)), tensors, own.training.pieces)
        queries = self.head.embed(found["pooled"])
        with torch.no_grad():
            keys = self.teacher_head.embed(found["pooled_keys"])
            all_keys = gather(keys)
        queue = None if own.negatives == "batch" else self.queue.keys
        contrast = momentum_contrast(queries, keys, all_keys, queue, own.negatives, own.temperature)
        losses = {"contrast": own.contrast_weight * contrast}
        monitors = {
            "head_similarity": (queries * keys).sum(dim=1).mean().detach(),
            "head_retrieval": retrieval_top1(queries, keys),
        }
        if own.reconstruction_weight:
            for model, errors in errors_untold(views, own).items():
                monitors[f"untold_{model}"] = own.reconstruction_weight * errors.mean() / share[model]
            for model in targets:
                losses[f"reconstruction_{model}"] = own.reconstruction_weight * (found[model] / share[model])
        return StepOutput(losses, queries.detach(), monitors, carry=all_keys)

    def _of_piece(
        self, models: Sequence[str], seen_o: Tensor, seen_m: Tensor, mixing: Tensor, *asked: Tensor
    ) -> dict[str, Tensor]:
        """Return pooled features of both and each model's mean error; ``asked``: codes, targets and their voxels that count."""
        features = self.network.encoder(seen_o)
        found = {"pooled": self.head.pool(features[-1])}
        with torch.no_grad():
            taught = self.teacher(seen_m)
            found["pooled_keys"] = self.teacher_head.pool(taught[-1])
        if models:
            codes = dict(zip(models, asked[: len(models)], strict=True))
            outputs = self.reconstruct(features, taught, codes, mixing)
            targets, counted = asked[len(models) : 2 * len(models)], asked[2 * len(models) :]
            for (model, output), *wanted in zip(outputs.items(), targets, counted, strict=True):
                found[model] = counted_mse(output, *wanted)
        return found

    def reconstruct(
        self, features: Sequence[Tensor], taught: Sequence[Tensor], codes: dict[str, Tensor], mixing: Tensor
    ) -> dict[str, Tensor]:
        """Return the decoder's output for each model (batch, channel, *shape), computed in one pass.

        Args:
            features: Maps of the encoder, full resolution first.
            taught: Maps of its moving average, without gradient.
            codes: Code of the requested transformation (batch, bits), by model.
            mixing: Share of ``o`` in the hybrid (batch,).
        """
        maps = {"o": list(features), "m": list(taught)}
        gated = {model: self._attend(maps[model][-1], codes[model]) for model in ("o", "m")}
        if "h" in codes:
            maps["h"] = [mix(first, second, mixing) for first, second in zip(features, taught, strict=True)]
            if self.settings.hybrid_target == "mixed_then_turned":
                gated["h"] = self._attend(maps["h"][-1], codes["h"])
            else:
                gated["h"] = mix(gated["o"], gated["m"], mixing)
        models = list(maps)
        skips = [torch.cat([maps[model][level] for model in models]) for level in range(len(features) - 1)]
        if not self.settings.skips:
            skips = [torch.zeros_like(each) for each in skips]
        # One pass for all models gives the same result, because nnU-Net's networks normalise every sample separately.
        last = decode(self.network.decoder, [*skips, torch.cat([gated[model] for model in models])])[-1]
        output = self.output(last)
        output = torch.sigmoid(output) if self.settings.reconstruction_scale == "unit" else output
        return dict(zip(models, output.chunk(len(models)), strict=True))

    def _attend(self, bottleneck: Tensor, code: Tensor) -> Tensor:
        return bottleneck if self.settings.attention == "none" else self.attention(bottleneck, code)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder, attention, projection and output layer; all have weight decay."""
        return [ParameterGroup(trained_parameters(self))]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and projection with their moving averages."""
        return [(self.network.encoder, self.teacher), (self.head, self.teacher_head)]

    def momentum(self, progress: float) -> float:
        """Return the constant momentum, adapted to the length of the run."""
        return self._momentum

    def after_step(self, carry: Tensor) -> None:
        """Enqueue the keys of all processes, once."""
        if self.settings.negatives != "batch":
            self.queue.enqueue(carry)

    def exported(self) -> Exported:
        """Return encoder and decoder; only the encoder if nothing was reconstructed."""
        return Exported(pretrained=ENCODER_AND_DECODER if self.settings.reconstruction_weight else ENCODER)


def check_settings(settings: PCRLSettings) -> None:
    """Check that something is learned.

    Raises:
        UserError: If all losses have a weight of 0, or the contrast has no negatives.
    """
    if not settings.contrast_weight and not settings.reconstruction_weight:
        raise UserError("contrast_weight or reconstruction_weight must be above 0, got 0 for both")
    if settings.contrast_weight and settings.negatives == "batch" and settings.training.batch_size < 2:
        raise UserError("batch_size must be at least 2 for negatives=batch, got 1; set batch_size=2 or negatives=queue")


def affine_range(settings: PCRLSettings) -> AffineRange:
    """Return the range of crops, rotations and flips."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg, settings.flip_axes, settings.flip_probability)


def intensity_range(settings: PCRLSettings, spacing_mm: Sequence[float]) -> IntensityRange:
    """Return the range of the only intensity change, a blur of the same width in mm along every axis."""
    blur_vox = even_blur(settings.blur_vox, spacing_mm)
    return restrict_to(IntensityRange(blur_vox=blur_vox, blur_probability=settings.blur_probability), ("blur",))


def corruption_range(settings: PCRLSettings) -> CorruptionRange:
    """Return the range of shuffling and painting."""
    return CorruptionRange(
        paint_probability=settings.paint_probability,
        inpainting_share=settings.inpainting_share,
        shuffle_probability=settings.shuffle_probability,
    )


def draw_asked_turns(
    generators: Sequence[torch.Generator], settings: PCRLSettings, dimensions: int
) -> dict[str, TurnParams]:
    """Draw the requested transformation, by model; the identity without attention, because the decoder has no code then."""
    plane = settings.turn_plane
    turns = {
        model: draw_turns(generators, dimensions, plane, settings.asked_turns, settings.asked_flips) for model in MODELS
    }
    if settings.attention == "none":
        turns = dict.fromkeys(MODELS, no_turns(len(generators), dimensions, plane))
    if not settings.mixup:
        del turns["h"]
    return turns


@torch.no_grad()
def errors_untold(views: ContextViews, settings: PCRLSettings) -> dict[str, Float[Tensor, " batch"]]:
    """Return, by model, the smallest mean squared error of an answer that knows the clean crop but not the code.

    A decoder that ignores the code cannot be better. Without attention there is no code; the error is then that of answering
    every channel of an image with its mean. Voxels that do not count have an error of 0 and no part in the answer.
    """

    def untold(model: str, counted: Tensor) -> Tensor:
        clean, kept = clean_crop(model, views).float(), counted[:, None]
        if settings.attention == "none":
            total = torch.where(kept, clean, 0.0).flatten(2).sum(dim=2)
            mean = total / counted.flatten(1).sum(dim=1, keepdim=True).clamp_min(1)
            answer = mean.view(*mean.shape, *(1,) * (clean.ndim - 2))
        else:
            turns = settings.turn_plane, settings.asked_turns, settings.asked_flips
            number = mean_over_turns(kept.float(), *turns).clamp_min(torch.finfo().tiny)
            answer = mean_over_turns(torch.where(kept, clean, 0.0), *turns) / number
        return torch.where(kept, clean - answer, 0.0).square().flatten(1).mean(dim=1)

    if "h" in views.turns and settings.hybrid_target == "turned_then_mixed" and settings.attention != "none":
        # The crops are turned independently, so that the errors add up.
        both = counted_clean("h", views)
        mixed = views.mixing.square() * untold("o", both) + (1 - views.mixing).square() * untold("m", both)
        return {"o": untold("o", views.learnable_o), "m": untold("m", views.learnable_m), "h": mixed}
    return {model: untold(model, counted_clean(model, views)) for model in views.turns}
