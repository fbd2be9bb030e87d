"""PCRL: momentum contrast, and a reconstruction of whichever transformed version of the crop is asked for.

Source: Zhou et al., Preservational Learning Improves Self-supervised Medical Image Models by Reconstructing Diverse
Contexts (PCRL), ICCV 2021. The authors' code (Luchixiang/PCRL) is by its own words a later version.

Two crops of a patch are corrupted (blur, shuffling, in- or outpainting). The encoder ``o`` sees one, its moving average
``m`` the other; a hybrid ``h`` mixes the features of both on every level (cross-model mixup). One decoder makes for each of
the three the flipped and turned clean crop that a code names; the code gates the bottleneck (attention). InfoNCE on the
bottleneck features. Encoder and decoder leave; attention, projection, output layer, moving average and queue do not.

Deviations:
    * Equation 7 has no positive in its denominator. Here it has, as in MoCo. (The code does a binary contrast with a
      constant that it takes from the first batch.)
    * Features are compared before the attention, as in the code: after it, as in the paper, they would hold the drawn code.
    * Targets are the clean crops, as in the paper; the code turns the corrupted ones.
    * The queue gets the keys of ``m`` once, after the loss. The paper adds those of ``h``; the code enqueues before it looks up,
      so that two of its three terms have their own positives among the negatives.
    * Equation 8's hybrid target: the mixed crop, turned. ``hybrid_target=turned_then_mixed`` mixes separately conditioned
      features and turned crops, as the code does.
    * Quarter turns only in a plane of equal sides and spacing, else half turns: others would not keep the voxel grid.
    * Negatives are the other keys of the batch. With a queue, as in paper and code, the loss falls below chance while no image
      is told from another: positives and queue differ in age (measured for RepRec, and here).
    * The attention's factor of the map, and what normalises both factors: see ``networks.attention``.
    * Crops lie in the plan's patch and cover the plan's share of it; in the code they are between half and 1.75 times the
      input's size. Both overlap by the code's intersection over union, drawn in every step instead of 16 pairs in advance.
    * No sigmoid at the end: the data are standardised, not scaled to [0, 1].
    * Optimizer: SGD with a rate of 1e-3 in the paper; here AdamW, as in RepRec, whose contrast learned faster with it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from nnssl.collapse import retrieval_top1
from nnssl.distributed import gather, rank
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_in_batch, info_nce_with_queue
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput
from nnssl.methods.settings import TrainingSettings
from nnssl.momentum import FeatureQueue, copy_to_teacher, momentum_for_run
from nnssl.networks.attention import TransformationAttention
from nnssl.networks.backbone import input_channels
from nnssl.networks.dense import ENCODER, ENCODER_AND_DECODER, decode, trained_up_to_segmentation
from nnssl.networks.heads import PooledProjection
from nnssl.schema import STRICT
from nnssl.views.corruption import CorruptionRange, apply_corruption, draw_corruption
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_overlapping
from nnssl.views.turns import (
    TurnParams,
    TurnSteps,
    apply_turns,
    draw_turns,
    keeps_grid,
    mean_over_turns,
    no_turns,
    turn_code,
)

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
MODELS = ("o", "m", "h")
"""The encoder, its moving average, and their hybrid."""


@dataclass(frozen=True)
class PCRLSettings:
    """The paper's numbers [P], those of the authors' code [C], or recommended ones [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    contrast_weight: Weight = 0.5  # [P]
    reconstruction_weight: Weight = 0.5  # [P]
    """0 leaves the contrast alone: the decoder is neither run nor trained."""
    temperature: Positive = 0.2  # [P] [C]
    embedding_dimensions: Annotated[int, Field(ge=2)] = 128  # [C]
    negatives: Literal["batch", "queue", "both"] = "batch"  # [R]; queue in the paper
    queue_length: Annotated[int, Field(ge=1)] = 16_384  # [C]
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99  # [P]; 0.999 in the code
    attention: Literal["outer", "gate", "none"] = "outer"  # [P]; gate in the code
    """``none`` reconstructs the crop as it is: a decoder that is not told the code cannot turn anything."""
    attention_rank: Annotated[int, Field(ge=1)] = 64  # [R]; the channels in the paper
    mixup: bool = True  # [P]
    hybrid_target: Literal["mixed_then_turned", "turned_then_mixed"] = "mixed_then_turned"  # [P]
    skips: bool = True  # [P]
    """Whether the decoder sees the encoder's maps of high resolution, which are not turned."""
    crop_fraction: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.2,
        1.0,
    )  # [C] 2D
    least_iou: Share = 0.25  # [C]
    rotation_deg: tuple[Annotated[float, Field(ge=0, le=180)], ...] = (10.0,)  # [C]
    flip_axes: tuple[int, ...] = (0, 1)  # [C]
    """Axes that the crop may be flipped along."""
    flip_probability: Share = 0.5  # [C]
    asked_flips: tuple[int, ...] = (0, 1)  # [P] all axes
    """Axes that a code may flip."""
    asked_turns: TurnSteps = "quarter"  # [P]
    """Whether a code may turn the plane by quarters, by halves, or not at all."""
    turn_plane: tuple[int, int] = (0, 1)  # [P] the first two axes
    blur_vox: Weight = 2.0  # [C]
    """Largest sigma along the finest axis, and as many mm along the others."""
    blur_probability: Share = 1.0  # [C]
    shuffle_probability: Share = 0.5  # [C]
    paint_probability: Share = 0.9  # [C]
    inpainting_share: Share = 0.2  # [C]


@dataclass(frozen=True)
class ContextViews:
    """Two clean crops of each patch, what the encoders see of them, and what the decoder is asked for.

    Attributes:
        clean_o: (batch, channel, *shape), crop of the encoder.
        clean_m: that of the moving average.
        seen_o: ``clean_o``, corrupted.
        seen_m: ``clean_m``, corrupted.
        turns: the transformation that is asked for, by model; no ``h`` without mixup.
        codes: (batch, bits), what says so to the decoder, by model.
        mixing: (batch,), share of ``o`` in the hybrid, 0 to 1.
    """

    clean_o: Float[Tensor, "batch channel *shape"]
    clean_m: Float[Tensor, "batch channel *shape"]
    seen_o: Float[Tensor, "batch channel *shape"]
    seen_m: Float[Tensor, "batch channel *shape"]
    turns: dict[str, TurnParams]
    codes: dict[str, Tensor]
    mixing: Float[Tensor, " batch"]


class PCRL(PretextMethod):
    """Contrast and reconstruction of diverse contexts.

    Args:
        network: the plan's U-Net.
        settings: resolved.
        configuration: the plan's pretext configuration.
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

    def __init__(self, network: Any, settings: PCRLSettings, configuration: Any) -> None:
        super().__init__()
        shape, spacing_mm = configuration.patch_size, configuration.spacing_mm
        check_losses(settings)
        check_turns(settings, shape, spacing_mm)
        check_affine(affine_range(settings), shape, spacing_mm)
        check_intensity(blur_range(settings, spacing_mm))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        encoder = network.encoder
        channels = encoder.output_channels
        self.head = PooledProjection(channels[-1], channels[-1], settings.embedding_dimensions)
        if settings.reconstruction_weight:
            bits = len(shape) + 4
            if settings.attention != "none":
                kernel = widest_kernel(encoder.stages[-1], len(shape))
                self.attention = TransformationAttention(
                    channels[-1], bits, settings.attention, settings.attention_rank, kernel
                )
            convolution: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(shape)]
            self.output = convolution(channels[0], input_channels(encoder), 1)
        else:
            network.decoder.requires_grad_(False)
            encoder.requires_grad_(True)  # which the decoder holds too
        self.teacher = copy.deepcopy(encoder)
        self.teacher_head = copy.deepcopy(self.head)
        for student, teacher in self.momentum_pairs():
            copy_to_teacher(student, teacher)
        if settings.negatives != "batch":
            length = max(settings.queue_length, settings.training.batch_size)
            self.queue = FeatureQueue(length, settings.embedding_dimensions, torch.Generator().manual_seed(0))
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)

    @classmethod
    def from_plan(cls, configuration: Any) -> dict[str, Any]:
        """Return crop, rotation, flips, turns, rank of the attention and length of the queue as the plan has them.

        A code may flip every axis, the thick one too: that keeps the grid, and it is told.
        """
        small = 10.0  # [C] degrees
        return {
            "queue_length": configuration.queue_length,
            "crop_fraction": configuration.crop_fraction,
            "rotation_deg": tuple(min(small, each) for each in configuration.rotation_deg),
            "flip_axes": configuration.flip_axes,
            "asked_flips": tuple(range(len(configuration.patch_size))),
            "asked_turns": "quarter" if configuration.context.quarter_turns else "half",
            "turn_plane": configuration.context.turn_plane,
            "attention_rank": configuration.context.attention_rank,
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> ContextViews:
        """Return two crops of each patch, clean and corrupted, the transformations that are asked for, and the mixing."""
        return make_context_views(volumes, generators, self.settings, self.configuration.spacing_mm)

    def losses(self, views: ContextViews, progress: float) -> StepOutput:
        """Return InfoNCE of the queries (equation 7) and the mean squared errors of the reconstructions (equation 8)."""
        own = self.settings
        features = self.network.encoder(views.seen_o)
        queries = self.head(features[-1])
        with torch.no_grad():
            taught = self.teacher(views.seen_m)
            keys = self.teacher_head(taught[-1])
            all_keys = gather(keys)
        losses = {"contrast": own.contrast_weight * self._contrast(queries, keys, all_keys)}
        monitors = {
            "positive_similarity": (queries * keys).sum(dim=1).mean().detach(),
            "retrieval_top1": retrieval_top1(queries, keys),
        }
        if own.reconstruction_weight:
            for model, errors in errors_untold(views, own).items():
                monitors[f"untold_{model}"] = own.reconstruction_weight * errors.mean()
            outputs = self.reconstruct(features, taught, views)
            targets = reconstruction_targets(views, own.hybrid_target)
            for model, output in outputs.items():
                error = F.mse_loss(output.float(), targets[model].float())
                losses[f"reconstruction_{model}"] = own.reconstruction_weight * error
        return StepOutput(losses, queries.detach(), monitors, carry=all_keys)

    def _contrast(self, queries: Tensor, keys: Tensor, all_keys: Tensor) -> Tensor:
        own = self.settings
        if own.negatives == "queue":
            return info_nce_with_queue(queries, keys, self.queue.keys, own.temperature)
        candidates = all_keys if own.negatives == "batch" else torch.cat([all_keys, self.queue.keys])
        return info_nce_in_batch(queries, candidates, own.temperature, first_row=rank() * len(queries))

    def reconstruct(
        self, features: Sequence[Tensor], taught: Sequence[Tensor], views: ContextViews
    ) -> dict[str, Tensor]:
        """Return what the decoder makes for each model, (batch, channel, *shape), in one pass.

        Args:
            features: maps of the encoder, full resolution first.
            taught: those of its moving average, without gradient.
            views: of the step.
        """
        maps = {"o": list(features), "m": list(taught)}
        gated = {model: self._attend(maps[model][-1], views.codes[model]) for model in ("o", "m")}
        if "h" in views.turns:
            maps["h"] = [mix(first, second, views.mixing) for first, second in zip(features, taught, strict=True)]
            if self.settings.hybrid_target == "mixed_then_turned":
                gated["h"] = self._attend(maps["h"][-1], views.codes["h"])
            else:
                gated["h"] = mix(gated["o"], gated["m"], views.mixing)
        models = list(maps)
        skips = [torch.cat([maps[model][level] for model in models]) for level in range(len(features) - 1)]
        if not self.settings.skips:
            skips = [torch.zeros_like(each) for each in skips]
        # one pass for all: nnU-Net's networks normalise every sample by itself
        last = decode(self.network.decoder, [*skips, torch.cat([gated[model] for model in models])])[-1]
        return dict(zip(models, self.output(last).chunk(len(models)), strict=True))

    def _attend(self, bottleneck: Tensor, code: Tensor) -> Tensor:
        return bottleneck if self.settings.attention == "none" else self.attention(bottleneck, code)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder, attention, projection and output layer; all decay."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and projection with their moving averages."""
        return [(self.network.encoder, self.teacher), (self.head, self.teacher_head)]

    def momentum(self, progress: float) -> float:
        """Return the constant momentum, shortened to the length of the run."""
        return self._momentum

    def after_step(self, carry: Tensor) -> None:
        """Enqueue the keys of all processes, once."""
        if self.settings.negatives != "batch":
            self.queue.enqueue(carry)

    def exported(self) -> Exported:
        """Return encoder and decoder, the encoder alone where nothing was reconstructed."""
        return Exported(pretrained=ENCODER_AND_DECODER if self.settings.reconstruction_weight else ENCODER)


def make_context_views(
    volumes: Float[Tensor, "batch channel *shape"],
    generators: Sequence[torch.Generator],
    settings: PCRLSettings,
    spacing_mm: Sequence[float],
) -> ContextViews:
    """Return two crops of each patch, clean and corrupted, the transformations that are asked for, and the mixing.

    Args:
        volumes: raw patches.
        generators: one per sample.
        settings: of the method.
        spacing_mm: of the patches' voxels.
    """
    shape, channels = volumes.shape[2:], volumes.shape[1]
    crops = draw_overlapping(generators, affine_range(settings), shape, spacing_mm, settings.least_iou, "iou")
    blur = blur_range(settings, spacing_mm)
    corruption = CorruptionRange(
        paint_probability=settings.paint_probability,
        inpainting_share=settings.inpainting_share,
        shuffle_probability=settings.shuffle_probability,
    )
    clean, seen = [], []
    painted = None
    for crop in crops:
        blurred = draw_intensity(generators, blur, channels)
        painted = draw_corruption(generators, corruption, shape, spacing_mm, paint_like=painted)
        clean.append(apply_affine(volumes, crop))
        seen.append(apply_corruption(apply_intensity(clean[-1], blurred), painted))
    asked = (len(shape), settings.turn_plane, settings.asked_turns, settings.asked_flips)
    turns = {model: draw_turns(generators, *asked) for model in MODELS}
    if settings.attention == "none":
        turns = dict.fromkeys(MODELS, no_turns(len(volumes), len(shape), settings.turn_plane))
    mixing = torch.cat([torch.rand(1, generator=each) for each in generators])  # Beta(1, 1)
    if not settings.mixup:
        del turns["h"]
    codes = {model: turn_code(each).to(volumes.device, non_blocking=True) for model, each in turns.items()}
    return ContextViews(clean[0], clean[1], seen[0], seen[1], turns, codes, mixing.to(volumes.device))


def reconstruction_targets(
    views: ContextViews, hybrid_target: Literal["mixed_then_turned", "turned_then_mixed"]
) -> dict[str, Float[Tensor, "batch channel *shape"]]:
    """Return what the decoder is asked for, by model: the clean crops, flipped and turned (equation 8)."""
    targets = {model: apply_turns(clean_crop(model, views), turns) for model, turns in views.turns.items()}
    if "h" in targets and hybrid_target == "turned_then_mixed":
        targets["h"] = mix(targets["o"], targets["m"], views.mixing)
    return targets


def mix(first: Tensor, second: Tensor, share: Float[Tensor, " batch"]) -> Tensor:
    """Return ``share * first + (1 - share) * second``, sample by sample."""
    share = share.to(first).view(-1, *(1,) * (first.ndim - 1))
    return share * first + (1 - share) * second


def clean_crop(model: str, views: ContextViews) -> Float[Tensor, "batch channel *shape"]:
    """Return the clean crop of a model, as it is before it is turned; of the hybrid the mix of both."""
    if model == "h":
        return mix(views.clean_o, views.clean_m, views.mixing)
    return views.clean_o if model == "o" else views.clean_m


@torch.no_grad()
def errors_untold(views: ContextViews, settings: PCRLSettings) -> dict[str, Float[Tensor, " batch"]]:
    """Return by model the least mean squared error of an answer that knows the clean crop and not the code.

    A decoder that does not listen to the code is no better. Without attention there is no code; then it is the error of
    answering every channel of an image by its mean.
    """

    def untold(clean: Tensor) -> Tensor:
        clean = clean.float()
        if settings.attention == "none":
            return clean.flatten(2).var(dim=2, unbiased=False).mean(dim=1)
        answer = mean_over_turns(clean, settings.turn_plane, settings.asked_turns, settings.asked_flips)
        return (clean.square() - answer.square()).flatten(1).mean(dim=1)

    if "h" in views.turns and settings.hybrid_target == "turned_then_mixed" and settings.attention != "none":
        first, second = untold(views.clean_o), untold(views.clean_m)  # turned apart, so that errors add up
        mixed = views.mixing.square() * first + (1 - views.mixing).square() * second
        return {"o": first, "m": second, "h": mixed}
    return {model: untold(clean_crop(model, views)) for model in views.turns}


def check_losses(settings: PCRLSettings) -> None:
    """Check that something is learned.

    Raises:
        UserError: no loss has a weight, or a contrast has nothing to compare with.
    """
    if not settings.contrast_weight and not settings.reconstruction_weight:
        raise UserError("contrast_weight=0 reconstruction_weight=0: nothing would be learned; --set one of them")
    if settings.contrast_weight and settings.negatives == "batch" and settings.training.batch_size < 2:
        raise UserError(
            "batch_size=1: negatives=batch compares the images of a batch; --set batch_size=2, or negatives=queue"
        )


def check_turns(settings: PCRLSettings, shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Check that codes can be asked for in a patch and keep its grid.

    Raises:
        UserError: they cannot, or would not.
    """
    plane, steps = settings.turn_plane, settings.asked_turns
    try:
        draw_turns([torch.Generator()], len(shape), plane, steps, settings.asked_flips)
    except ValueError as error:
        raise UserError(f"turn_plane or asked_flips: {error}; --set others, or plan again") from error
    if steps == "quarter" and not keeps_grid(shape, spacing_mm, plane):
        sides = " and ".join(f"{shape[axis]} voxels of {spacing_mm[axis]:g} mm" for axis in plane)
        raise UserError(
            f"asked_turns=quarter: a quarter turn in plane {plane} exchanges {sides}; --set asked_turns=half"
        )


def affine_range(settings: PCRLSettings) -> AffineRange:
    """Return what crops are drawn from."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg, settings.flip_axes, settings.flip_probability)


def blur_range(settings: PCRLSettings, spacing_mm: Sequence[float]) -> IntensityRange:
    """Return the blur of the settings, as wide in mm along every axis, and nothing else."""
    z, y, x = (settings.blur_vox * min(spacing_mm) / mm for mm in (spacing_mm[0], *spacing_mm)[-3:])
    return restrict_to(IntensityRange(blur_vox=(z, y, x), blur_probability=settings.blur_probability), ("blur",))


def widest_kernel(stage: nn.Module, dimensions: int) -> tuple[int, ...]:
    """Return the largest kernel of a stage of the encoder, which is 1 along axes that it does not look along."""
    kernels = [each.kernel_size for each in stage.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d))]
    return tuple(max(kernel[axis] for kernel in kernels) for axis in range(dimensions))
