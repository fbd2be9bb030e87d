"""RepRec: momentum contrast for the convolutional encoder, then masked recovery of its features by a transformer.

Source: Yan et al., Representation Recovering for Self-Supervised Pre-training on Medical Images, WACV 2023. No code of the
authors is public. The contrastive stage follows MoCo (He et al., CVPR 2020), to which the paper defers.

Stage 1, contrastive: ``E_c``, the encoder of the plan's U-Net, sees two crops of a patch. The loss is InfoNCE against keys
from a momentum encoder (section 4.1). Stage 2, generative: ``E_c`` is frozen, and three quarters of the positions of its
feature map are dropped. ``E_t`` sees the rest, and a small decoder predicts the features of the dropped positions
(section 4.2). ``E_c`` and ``E_t`` are exported; the decoder of stage 2, the heads and the queue are discarded. The loss of stage
2 leaves out tokens of whose voxels less than half may be learned from (not air, padding, or faces that were masked out).

Deviations:
    * Positive pairs: section 4.1 says elastic transforms, section 5.1.4 crop, jitter and flip. Here the latter.
    * Negatives: the printed formula sums over the batch and includes the query itself; the text follows MoCo's queue, as is done
      here. ``negatives=batch`` (without the self-similarity) and ``negatives=both`` are options. What leaves short runs does not
      tell them apart.
    * Intensity: the paper jitters brightness and contrast (and colours), which convolution with instance normalisation removes.
      Gamma, shifts of the window, blur and noise are drawn in addition, as the plan has them for the modality.
    * Head: MoCo v2 has no normalisation in its head, and its encoder has batch normalisation. nnU-Net's encoders have instance
      normalisation, so the head standardises its hidden vector over the batch. Without it, a queue collapsed.
    * Optimizer: SGD in the paper, learning rate not stated. Here AdamW: after 225 steps of batch 32 on the same slices, the
      other view of a slice was the nearest of 48 for 42 % of the slices, with SGD at ten times MoCo's rate for 19 %.
    * Map: the paper pools and recovers the encoder's output. Here both stages use the map of the stage that the transformer works
      on; deeper stages of the plan's U-Net stay random, and read the transformer's output.
    * Pooling: MoCo pools the last feature map. Here a hidden layer comes before the mean (``networks.heads``), because
      instance normalisation makes the plain mean nearly the same for all images.
    * Stage 2: the paper masks at random and does not say whether the loss covers visible tokens. Here blocks of tokens are
      masked (a neighbour of a single masked token has seen most of its voxels) and the loss covers masked tokens, as in MAE.
      The target is standardised per token, because the scale of a feature is arbitrary (an option of MAE).
    * The paper does not say whether ``E_c`` learns in stage 2. An encoder that produces its own target can minimise the loss
      with constant features, and the paper's sentence on the optimizer lists only ``E_t`` and ``D_t``. Here it is frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from nnssl.distributed import gather
from nnssl.losses.contrastive import Negatives, momentum_contrast
from nnssl.losses.reconstruction import counted_share, masked_token_mse, standardise_tokens, visible_mean_baseline
from nnssl.methods.protocol import (
    Exported,
    ParameterGroup,
    PretextMethod,
    StepOutput,
    split_by_decay,
    trained_parameters,
)
from nnssl.methods.settings import (
    Count,
    CropFraction,
    Factor,
    NotNegative,
    Positive,
    Share,
    TrainingSettings,
    TwoOrMore,
    changes_in_common,
)
from nnssl.momentum import make_teacher, momentum_for_run, queue_for_run
from nnssl.networks.dense import maps_up_to, prefixes_up_to, trained_up_to_stage
from nnssl.networks.heads import HeadNormalisation, PooledProjection, TokenDecoder
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.networks.tokens import map_to_tokens, sine_cosine_positions, take_tokens
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, check_intensity, restrict_to
from nnssl.views.jittered_crops import jittered_crop_pair
from nnssl.views.learnable import mask_of_patches, mask_of_tokens, mask_of_view
from nnssl.views.masking import check_mask, draw_block_mask, visible_tokens
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_affine

GATE = 1.0
"""Value of the transformer's gate on export."""


@dataclass(frozen=True)
class ContrastiveSettings:
    """Settings of stage 1. Sources of the defaults: the paper [P], MoCo, to which it defers [D], measured here [M]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Positive = 0.2  # [D] MoCo v2; 0.07 in v1
    head_normalisation: HeadNormalisation = "batch"  # not MoCo's; MoCo v3 and SimCLR have it
    """``batch`` standardises the head's hidden vector over the batch, ``none`` leaves it as it is."""
    embedding_dimensions: TwoOrMore = 128  # [D]
    negatives: Negatives = "queue"  # [D], to which the text of [P] 4.1 defers; batch in the printed formula
    """Source of the negatives: ``queue`` as in MoCo (the text), ``batch`` as in the printed formula, or ``both``."""
    queue_length: Count = 65_536  # [D]
    teacher_momentum: Factor = 0.999  # [D]
    crop_fraction: CropFraction = (0.2, 1.0)  # [P] 5.1.4
    brightness: NotNegative = 0.4  # [P] 5.1.4, here in standard deviations of the patch
    contrast: Factor = 0.4  # [P] 5.1.4
    flip_axes: tuple[int, ...] = (-1,)  # [P] 5.1.4, horizontal
    flip_probability: Share = 0.5  # [P] 5.1.4
    intensity_views: tuple[str, ...] = (
        "brightness",
        "contrast",
        "gamma",
        "window",
        "blur",
        "noise",
    )  # [P] the first two
    """Changes to draw, of those that the plan has. An instance-normalised encoder sees neither brightness nor contrast."""


@dataclass(frozen=True)
class GenerativeSettings:
    """Settings of stage 2. Sources of the defaults: the paper [P], MAE, to which it defers [D], measured here [M]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # [P] 4.2, "over 75 %"
    mask_block: tuple[int, ...] = (1, 1)  # [P] 4.2, single tokens
    decoder_depth: Count = 4  # [P] 5.1.4
    crop_fraction: CropFraction = (0.2, 1.0)  # not stated; as in stage 1
    flip_axes: tuple[int, ...] = (-1,)
    flip_probability: Share = 0.5


class RepRecContrastive(PretextMethod):
    """Stage 1: momentum contrast of pooled features of the convolutional encoder.

    Args:
        network: Hybrid network of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the crop, the flips or the intensity changes cannot be drawn.
    """

    learns_at_voxels: ClassVar[bool] = False
    defaults: ClassVar[ContrastiveSettings] = ContrastiveSettings(
        training=TrainingSettings(
            epochs=200,  # [P] 5.1.4
            iterations_per_epoch=250,
            batch_size=256,  # [D]
            optimizer="adamw",  # [M]; the paper has SGD
            learning_rate=1e-3,  # [M]; not stated
            momentum=(0.9, 0.999),  # [P] 5.1.4 for the first
            weight_decay=1e-4,  # [P] 5.1.4
            learning_rate_schedule="cosine",  # [D] MoCo v2
            warmup_epochs=0,  # [D]
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: ContrastiveSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.token_stage = network.token_stage
        self.encoder = trained_up_to_stage(network, self.token_stage)
        channels = network.encoder.output_channels[self.token_stage]
        batch = settings.training.batch_size
        self.head = PooledProjection(
            channels, channels, settings.embedding_dimensions, batch, settings.head_normalisation
        )
        self.key_encoder = make_teacher(self.encoder)
        self.key_head = make_teacher(self.head)
        if settings.negatives != "batch":
            self.queue = queue_for_run(
                settings.queue_length, settings.training.batch_size, settings.embedding_dimensions
            )
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's queue length, teacher momentum, crop, flips and intensity views.

        Of the plan's intensity views, the bias field and inversion are left out: a bias field made two crops hard to match.
        """
        return {
            "queue_length": configuration.queue_length,
            "teacher_momentum": configuration.teacher_momentum,
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
            "intensity_views": changes_in_common(configuration.intensity_views, cls.defaults.intensity_views),
        }

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> tuple[Float[Tensor, "batch channel *shape"], Float[Tensor, "batch channel *shape"]]:
        """Return query and key: two random crops of each patch, zoomed to its size, flipped and jittered."""
        crop, changes = affine_range(self.settings), intensity_range(self.settings)
        return jittered_crop_pair(volumes, generators, crop, changes, self.configuration.spacing_mm)

    def losses(self, views: tuple[Tensor, Tensor], progress: float) -> StepOutput:
        """Return InfoNCE of the queries against their keys and the negatives (section 4.1; MoCo equation 1)."""
        own = self.settings
        query_volumes, key_volumes = views

        def pool(encoder: nn.Module, head: PooledProjection, crops: Tensor) -> Tensor:
            return head.pool(maps_up_to(encoder, crops, self.token_stage)[-1])

        pooled = in_pieces(partial(pool, self.encoder, self.head), [query_volumes], own.training.pieces)
        queries = self.head.embed(pooled)
        with torch.no_grad():
            pooled_keys = in_pieces(partial(pool, self.key_encoder, self.key_head), [key_volumes], own.training.pieces)
            keys = self.key_head.embed(pooled_keys)
            all_keys = gather(keys)
        queue = None if own.negatives == "batch" else self.queue.keys
        losses = {"contrast": momentum_contrast(queries, keys, all_keys, queue, own.negatives, own.temperature)}
        monitors = {"head_similarity": (queries * keys).sum(dim=1).mean().detach()}
        return StepOutput(losses, queries.detach(), monitors, carry=all_keys)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder and head; all have weight decay, as in MoCo."""
        return [ParameterGroup(trained_parameters(self))]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and head with the copies that make the keys."""
        return [(self.encoder, self.key_encoder), (self.head, self.key_head)]

    def momentum(self, progress: float) -> float:
        """Return MoCo's constant momentum, adapted to the length of the run."""
        return self._momentum

    def after_step(self, carry: Tensor) -> None:
        """Enqueue the keys of all processes."""
        if self.settings.negatives != "batch":
            self.queue.enqueue(carry)

    def exported(self) -> Exported:
        """Return the convolutional encoder up to the stage of the tokens."""
        return Exported(pretrained=prefixes_up_to(self.encoder, self.token_stage))


@dataclass(frozen=True)
class MaskedViews:
    """A batch of crops and the mask of the tokens of their feature maps.

    Attributes:
        volumes: Crops (batch, channel, *shape).
        mask: Mask (batch, tokens), True for dropped tokens.
        visible: Indices of the visible tokens (batch, visible), ascending.
        counted: Mask (batch, tokens), True for tokens that may be learned from.
    """

    volumes: Float[Tensor, "batch channel *shape"]
    mask: Bool[Tensor, "batch tokens"]
    visible: Int[Tensor, "batch visible"]
    counted: Bool[Tensor, "batch tokens"]


class RepRecGenerative(PretextMethod):
    """Stage 2: the transformer recovers masked features of the frozen encoder.

    Args:
        network: Hybrid network of the plan, with the encoder pretrained by stage 1.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the crop, the flips or the mask cannot be drawn.
    """

    defaults: ClassVar[GenerativeSettings] = GenerativeSettings(
        training=TrainingSettings(
            epochs=1600,  # [P] 5.1.4
            iterations_per_epoch=250,
            batch_size=256,
            optimizer="adamw",  # [P] 5.1.4
            learning_rate=5e-4,  # [M]; not stated
            momentum=(0.9, 0.95),  # [P] 5.1.4
            weight_decay=0.05,  # [D]
            learning_rate_schedule="cosine",  # [D]
            warmup_epochs=40,  # [D]
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: GenerativeSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_mask(configuration.token_grid.grid, settings.mask_block, settings.mask_ratio)
        self.settings = settings
        self.configuration = configuration
        network.requires_grad_(False)
        self.encoder = network.encoder.eval()
        self.transformer = network.transformer
        self.transformer.embed.requires_grad_(True)
        self.transformer.blocks.requires_grad_(True)
        self.token_stage = network.token_stage
        size, channels = configuration.transformer_size, network.encoder.output_channels[network.token_stage]
        self.decoder = TokenDecoder(size.width, settings.decoder_depth, size.heads, channels)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's mask block, decoder depth, crop and flips."""
        return {
            "mask_block": configuration.token_grid.mask_block,
            "decoder_depth": configuration.transformer_size.decoder_depth,
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
        }

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> MaskedViews:
        """Return one random crop of each patch and the block mask of its tokens."""
        own, spacing_mm, device = self.settings, self.configuration.spacing_mm, volumes.device
        crop = draw_affine(generators, affine_range(own), volumes.shape[2:], spacing_mm)
        mask = draw_block_mask(generators, self.configuration.token_grid.grid, own.mask_block, own.mask_ratio)
        visible = visible_tokens(mask)
        counted = mask_of_tokens(
            mask_of_view(mask_of_patches(learnable, volumes), crop), self.configuration.token_grid.grid
        )
        return MaskedViews(apply_affine(volumes, crop), mask.to(device), visible.to(device), counted)

    def losses(self, views: MaskedViews, progress: float) -> StepOutput:
        """Return the mean squared error of the recovered features over the masked tokens that count (section 4.2)."""
        pieces = self.settings.training.pieces
        with torch.no_grad():
            features = in_pieces(
                lambda volumes: map_to_tokens(maps_up_to(self.encoder, volumes, self.token_stage)[-1]),
                [views.volumes],
                pieces,
            )
        found = in_pieces(self._recover, [features, views.visible, views.mask, views.counted], pieces)
        share = counted_share(views.counted, views.mask)
        losses, monitors = (
            {"recovery": found["error"] / share},
            {"recovery_of_visible_mean": found["error_of_mean"] / share},
        )
        return StepOutput(losses, found["encoded"].detach(), monitors)

    def _recover(self, features: Tensor, visible: Tensor, mask: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """Return the error of the recovered features, that of the mean of the visible ones, and the mean encoded token."""
        target, counted = standardise_tokens(features), counted[..., None].expand_as(features)
        positions = sine_cosine_positions(self.configuration.token_grid.grid, self.transformer.width, features.device)
        encoded = self.transformer.encode(take_tokens(features, visible), positions[visible])
        recovered = self.decoder(encoded, visible, positions)
        return {
            "error": masked_token_mse(recovered, target, mask, counted),
            "error_of_mean": visible_mean_baseline(target, mask, counted),
            "encoded": encoded.float().mean(dim=1),
        }

    def train(self, mode: bool = True) -> "RepRecGenerative":
        """Switch the mode, but keep the frozen encoder in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return ``D_t`` and the part of ``E_t`` that the loss reaches."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return encoder and transformer; the gate is opened, so that the transformer takes part from the first step on."""
        pretrained = (
            *prefixes_up_to(self.encoder, self.token_stage),
            "transformer.embed.",
            "transformer.blocks.",
        )
        return Exported(pretrained, fixed={"transformer.gate": GATE})


def affine_range(settings: ContrastiveSettings | GenerativeSettings) -> AffineRange:
    """Return the range of crops and flips (section 5.1.4, RandomResizedCrop); there is no rotation."""
    return AffineRange(settings.crop_fraction, flip_axes=settings.flip_axes, flip_probability=settings.flip_probability)


def intensity_range(settings: ContrastiveSettings) -> IntensityRange:
    """Return the range of the intensity changes named in the settings; those the paper lacks have default strengths."""
    ranges = IntensityRange(brightness_std=settings.brightness, contrast=settings.contrast)
    return restrict_to(ranges, settings.intensity_views)
