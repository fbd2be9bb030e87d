"""RepRec: momentum contrast for the convolutional encoder, then masked recovery of its features by a transformer.

Source: Yan et al., Representation Recovering for Self-Supervised Pre-training on Medical Images, WACV 2023. No code of the
authors is public. The contrastive stage follows MoCo (He et al., CVPR 2020), to which the paper defers.

Stage 1, contrastive: ``E_c`` (the encoder of the plan's U-Net) sees two crops of a patch; InfoNCE against keys
from a momentum encoder (section 4.1). Stage 2, generative: ``E_c`` is frozen; three quarters of the positions of its feature
map are dropped, ``E_t`` sees the rest, a small decoder predicts the features of the dropped ones (section 4.2).
``E_c`` and ``E_t`` leave; the decoder of stage 2, the heads and the queue do not.

Deviations:
    * Positive pairs: section 4.1 says elastic transforms, section 5.1.4 crop, jitter and flip. Here the latter.
    * Negatives: the printed formula sums over the batch and includes the query itself; the text follows MoCo's queue. Here
      the batch, without the self-similarity; ``negatives=queue`` and ``negatives=both`` are there. A queue's keys come from
      a key encoder some steps back, and in runs of hundreds or thousands of steps telling old from new is the first thing that
      the encoder learns: on slices of ACDC the loss fell below chance while no patch was told from another.
    * Optimizer: SGD in the paper, learning rate not stated. Here AdamW: after 225 steps of batch 32 on the same slices, the
      other view of a slice was the nearest of 48 for 42 % of them, with SGD at ten times MoCo's rate for 19 %.
    * Pooling: MoCo pools the last feature map. Here a hidden layer comes before the mean (``networks.heads``), since
      instance normalisation leaves the plain mean nearly the same for all images.
    * Stage 2: the paper masks at random and does not say whether the loss covers visible tokens. Here blocks of tokens are
      masked (a neighbour of a single masked token has seen most of its voxels) and the loss covers masked tokens, as in MAE.
      The target is standardised per token, since the scale of a feature is arbitrary (MAE's option).
    * Whether ``E_c`` learns in stage 2 is not said. A trainable encoder that makes its own target could win by constant
      features, and the paper's optimizer sentence lists ``E_t`` and ``D_t`` only. Here it is frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from nnssl.distributed import gather
from nnssl.losses.contrastive import Negatives, momentum_contrast
from nnssl.losses.reconstruction import masked_token_mse, standardise_tokens, visible_mean_baseline
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
from nnssl.networks.dense import ENCODER, trained_encoder
from nnssl.networks.heads import PooledProjection, TokenDecoder
from nnssl.networks.tokens import map_to_tokens, sine_cosine_positions, take_tokens
from nnssl.plan import PretextConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.masking import check_mask, draw_block_mask, visible_tokens
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_affine


@dataclass(frozen=True)
class ContrastiveSettings:
    """Settings of stage 1: the paper's numbers [P], those of MoCo, to which it defers [D], or measured ones [M]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Positive = 0.2  # [D] MoCo v2; 0.07 in v1
    embedding_dimensions: TwoOrMore = 128  # [D]
    negatives: Negatives = "batch"  # [P] 4.1 as printed
    """Whose keys: ``queue`` is MoCo's (the text), ``batch`` the printed formula's, ``both`` the two together."""
    queue_length: Count = 65_536  # [D]
    teacher_momentum: Factor = 0.999  # [D]
    crop_fraction: CropFraction = (0.2, 1.0)  # [P] 5.1.4
    brightness: NotNegative = 0.4  # [P] 5.1.4, here in standard deviations of the patch
    contrast: Factor = 0.4  # [P] 5.1.4
    flip_axes: tuple[int, ...] = (-1,)  # [P] 5.1.4, horizontal
    flip_probability: Share = 0.5  # [P] 5.1.4
    intensity_views: tuple[str, ...] = ("brightness", "contrast")


@dataclass(frozen=True)
class GenerativeSettings:
    """Settings of stage 2: the paper's numbers [P], those of MAE, to which it defers [D], or measured ones [M]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # [P] 4.2, "over 75 %"
    mask_block: tuple[int, ...] = (1, 1)  # [P] 4.2, single tokens
    decoder_depth: Count = 4  # [P] 5.1.4
    crop_fraction: CropFraction = (0.2, 1.0)  # not stated; as in stage 1
    flip_axes: tuple[int, ...] = (-1,)
    flip_probability: Share = 0.5


class RepRecContrastive(PretextMethod):
    """Stage 1: momentum contrast on the pooled features of the convolutional encoder.

    Args:
        network: the hybrid network of the plan.
        settings: resolved.
        configuration: the plan's pretext configuration.

    Raises:
        UserError: the crop, the flips or the intensity changes cannot be drawn.
    """

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

    def __init__(self, network: Any, settings: ContrastiveSettings, configuration: PretextConfiguration) -> None:
        super().__init__()
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.encoder = trained_encoder(network)
        channels = network.encoder.output_channels[-1]
        self.head = PooledProjection(channels, channels, settings.embedding_dimensions)
        self.key_encoder = make_teacher(self.encoder)
        self.key_head = make_teacher(self.head)
        if settings.negatives != "batch":
            self.queue = queue_for_run(
                settings.queue_length, settings.training.batch_size, settings.embedding_dimensions
            )
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)

    @classmethod
    def from_plan(cls, configuration: PretextConfiguration) -> dict[str, Any]:
        """Return queue, teacher, crop, flips and intensity views as the plan has them.

        What else suits the modality is not RepRec's; gamma and a bias field made two crops of a patch hard to match.
        """
        return {
            "queue_length": configuration.queue_length,
            "teacher_momentum": configuration.teacher_momentum,
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
            "intensity_views": changes_in_common(configuration.intensity_views, cls.defaults.intensity_views),
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> tuple[Float[Tensor, "batch channel *shape"], Float[Tensor, "batch channel *shape"]]:
        """Return query and key: two random crops of each patch, zoomed to its size, flipped and jittered."""
        return self._view(volumes, generators), self._view(volumes, generators)

    def _view(self, volumes: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return one view of each patch."""
        own, spacing_mm = self.settings, self.configuration.spacing_mm
        crop = draw_affine(generators, affine_range(own), volumes.shape[2:], spacing_mm)
        changes = draw_intensity(generators, intensity_range(own), volumes.shape[1])
        return apply_intensity(apply_affine(volumes, crop), changes)

    def losses(self, views: tuple[Tensor, Tensor], progress: float) -> StepOutput:
        """Return InfoNCE of the queries against their keys and the negatives (section 4.1; MoCo equation 1)."""
        own = self.settings
        query_volumes, key_volumes = views
        queries = self.head(self.encoder(query_volumes)[-1])
        with torch.no_grad():
            keys = self.key_head(self.key_encoder(key_volumes)[-1])
            all_keys = gather(keys)
        queue = None if own.negatives == "batch" else self.queue.keys
        losses = {"contrast": momentum_contrast(queries, keys, all_keys, queue, own.negatives, own.temperature)}
        monitors = {"positive_similarity": (queries * keys).sum(dim=1).mean().detach()}
        return StepOutput(losses, queries.detach(), monitors, carry=all_keys)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder and head; all decay, as in MoCo."""
        return [ParameterGroup(trained_parameters(self))]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and head with their key-side copies."""
        return [(self.encoder, self.key_encoder), (self.head, self.key_head)]

    def momentum(self, progress: float) -> float:
        """Return MoCo's constant momentum, shortened to the length of the run."""
        return self._momentum

    def after_step(self, carry: Tensor) -> None:
        """Enqueue the keys of all processes."""
        if self.settings.negatives != "batch":
            self.queue.enqueue(carry)

    def exported(self) -> Exported:
        """Return the convolutional encoder."""
        return Exported(pretrained=ENCODER)


@dataclass(frozen=True)
class MaskedViews:
    """A batch of crops and the tokens of their feature maps that are dropped.

    Attributes:
        volumes: (batch, channel, *shape), crops.
        mask: (batch, tokens), True where a token is dropped.
        visible: (batch, visible), tokens that are not, ascending.
    """

    volumes: Float[Tensor, "batch channel *shape"]
    mask: Bool[Tensor, "batch tokens"]
    visible: Int[Tensor, "batch visible"]


class RepRecGenerative(PretextMethod):
    """Stage 2: the transformer recovers masked features of the frozen encoder.

    Args:
        network: the hybrid network of the plan, its encoder pretrained by stage 1.
        settings: resolved.
        configuration: the plan's pretext configuration.

    Raises:
        UserError: the crop, the flips or the mask cannot be drawn.
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

    def __init__(self, network: Any, settings: GenerativeSettings, configuration: PretextConfiguration) -> None:
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

    @classmethod
    def from_plan(cls, configuration: PretextConfiguration) -> dict[str, Any]:
        """Return mask block, depth of the decoder, crop and flips as the plan has them."""
        return {
            "mask_block": configuration.token_grid.mask_block,
            "decoder_depth": configuration.transformer_size.decoder_depth,
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> MaskedViews:
        """Return one random crop of each patch and the block mask of its tokens."""
        own, spacing_mm, device = self.settings, self.configuration.spacing_mm, volumes.device
        crop = draw_affine(generators, affine_range(own), volumes.shape[2:], spacing_mm)
        mask = draw_block_mask(generators, self.configuration.token_grid.grid, own.mask_block, own.mask_ratio)
        visible = visible_tokens(mask)
        return MaskedViews(apply_affine(volumes, crop), mask.to(device), visible.to(device))

    def losses(self, views: MaskedViews, progress: float) -> StepOutput:
        """Return the mean squared error of the recovered features of the masked tokens (section 4.2)."""
        with torch.no_grad():
            features = map_to_tokens(self.encoder(views.volumes)[self.token_stage])
            target = standardise_tokens(features)
        positions = sine_cosine_positions(self.configuration.token_grid.grid, self.transformer.width, features.device)
        encoded = self.transformer.encode(take_tokens(features, views.visible), positions[views.visible])
        recovered = self.decoder(encoded, views.visible, positions)
        losses = {"recovery": masked_token_mse(recovered, target, views.mask)}
        monitors = {"recovery_of_visible_mean": visible_mean_baseline(target, views.mask)}
        return StepOutput(losses, encoded.detach().float().mean(dim=1), monitors)

    def train(self, mode: bool = True) -> "RepRecGenerative":
        """Switch modes, leaving the frozen encoder in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return what of ``E_t`` the loss reaches, and ``D_t``."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return encoder and transformer; the gate opens, so that the transformer takes part from the first step on."""
        return Exported(
            pretrained=(*ENCODER, "transformer.embed.", "transformer.blocks."), fixed={"transformer.gate": 1.0}
        )


def affine_range(settings: ContrastiveSettings | GenerativeSettings) -> AffineRange:
    """Return what crops and flips are drawn from (section 5.1.4, RandomResizedCrop); nothing is turned."""
    return AffineRange(settings.crop_fraction, flip_axes=settings.flip_axes, flip_probability=settings.flip_probability)


def intensity_range(settings: ContrastiveSettings) -> IntensityRange:
    """Return the intensity changes of the settings: brightness and contrast."""
    ranges = IntensityRange(brightness_std=settings.brightness, contrast=settings.contrast)
    return restrict_to(ranges, settings.intensity_views)
