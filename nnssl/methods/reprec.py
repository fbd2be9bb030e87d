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

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from nnssl.distributed import gather, rank
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_in_batch, info_nce_with_queue
from nnssl.losses.reconstruction import masked_token_mse, standardise_tokens, visible_mean_baseline
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import TrainingSettings
from nnssl.momentum import FeatureQueue, copy_to_teacher, momentum_for_run
from nnssl.networks.dense import ENCODER
from nnssl.networks.heads import PooledProjection, TokenDecoder
from nnssl.networks.hybrid import map_to_tokens, sine_cosine_positions
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity, restrict_to
from nnssl.views.masking import draw_block_mask, split_tokens
from nnssl.views.spatial import AffineRange, apply_affine, draw_affine

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class ContrastiveSettings:
    """Settings of stage 1: the paper's numbers [P], those of MoCo, to which it defers [D], or measured ones [M]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Annotated[float, Field(gt=0)] = 0.2  # [D] MoCo v2; 0.07 in v1
    embedding_dimensions: Annotated[int, Field(ge=2)] = 128  # [D]
    negatives: Literal["batch", "queue", "both"] = "batch"  # [P] 4.1 as printed
    """Whose keys: ``queue`` is MoCo's (the text), ``batch`` the printed formula's, ``both`` the two together."""
    queue_length: Annotated[int, Field(ge=1)] = 65_536  # [D]
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999  # [D]
    crop_fraction: tuple[Share, Share] = (0.2, 1.0)  # [P] 5.1.4
    brightness: Annotated[float, Field(ge=0)] = 0.4  # [P] 5.1.4, here in standard deviations of the patch
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.4  # [P] 5.1.4
    flip_axes: tuple[int, ...] = (-1,)  # [P] 5.1.4, horizontal
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # [P] 5.1.4
    intensity_views: tuple[str, ...] = ("brightness", "contrast")


@dataclass(frozen=True)
class GenerativeSettings:
    """Settings of stage 2: the paper's numbers [P], those of MAE, to which it defers [D], or measured ones [M]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # [P] 4.2, "over 75 %"
    mask_block: tuple[int, ...] = (1, 1)  # [P] 4.2, single tokens
    decoder_depth: Annotated[int, Field(ge=1)] = 4  # [P] 5.1.4
    crop_fraction: tuple[Share, Share] = (0.2, 1.0)  # not stated; as in stage 1
    flip_axes: tuple[int, ...] = (-1,)
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5


class RepRecContrastive(PretextMethod):
    """Stage 1: momentum contrast on the pooled features of the convolutional encoder.

    Args:
        network: the hybrid network of the plan.
        settings: resolved.
        configuration: the plan's pretext configuration.
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

    def __init__(self, network: Any, settings: ContrastiveSettings, configuration: Any) -> None:
        super().__init__()
        self.settings = settings
        self.configuration = configuration
        network.requires_grad_(False)
        self.encoder = network.encoder.requires_grad_(True)
        channels = network.encoder.output_channels[-1]
        self.head = PooledProjection(channels, channels, settings.embedding_dimensions)
        self.key_encoder = copy.deepcopy(self.encoder)
        self.key_head = copy.deepcopy(self.head)
        for student, teacher in self.momentum_pairs():
            copy_to_teacher(student, teacher)
            teacher.requires_grad_(False)
        if settings.negatives != "batch":
            length = max(settings.queue_length, settings.training.batch_size)
            self.queue = FeatureQueue(length, settings.embedding_dimensions, torch.Generator().manual_seed(0))
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)

    @classmethod
    def from_plan(cls, configuration: Any) -> dict[str, Any]:
        """Return queue, teacher, crop, flips and intensity views as the plan has them."""
        # what else suits the modality is not RepRec's; gamma and a bias field made two crops of a patch hard to match
        kept = ("brightness", "contrast")
        return {
            "queue_length": configuration.queue_length,
            "teacher_momentum": configuration.teacher_momentum,
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
            "intensity_views": tuple(name for name in configuration.intensity_views if name in kept),
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> tuple[Float[Tensor, "batch channel *shape"], Float[Tensor, "batch channel *shape"]]:
        """Return query and key: two random crops of each patch, zoomed to its size, flipped and jittered."""
        return self._view(volumes, generators), self._view(volumes, generators)

    def _view(self, volumes: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        cropped = random_crop(volumes, generators, self.settings, self.configuration.spacing_mm)
        ranges = restrict_to(
            IntensityRange(brightness_std=self.settings.brightness, contrast=self.settings.contrast),
            self.settings.intensity_views,
        )
        return apply_intensity(cropped, draw_intensity(generators, ranges, volumes.shape[1]))

    def losses(self, views: tuple[Tensor, Tensor], progress: float) -> StepOutput:
        """Return InfoNCE of the queries against their keys and the negatives (section 4.1; MoCo equation 1)."""
        query_volumes, key_volumes = views
        queries = self.head(self.encoder(query_volumes)[-1])
        with torch.no_grad():
            keys = self.key_head(self.key_encoder(key_volumes)[-1])
            all_keys = gather(keys)
        if self.settings.negatives == "queue":
            loss = info_nce_with_queue(queries, keys, self.queue.keys, self.settings.temperature)
        else:
            candidates = all_keys if self.settings.negatives == "batch" else torch.cat([all_keys, self.queue.keys])
            loss = info_nce_in_batch(queries, candidates, self.settings.temperature, first_row=rank() * len(queries))
        return StepOutput(
            losses={"contrast": loss},
            embeddings=queries,
            monitors={"positive_similarity": (queries * keys).sum(dim=1).mean().detach()},
            carry=all_keys,
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder and head; all decay, as in MoCo."""
        return [ParameterGroup([*self.encoder.parameters(), *self.head.parameters()])]

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
    """A batch of crops and the tokens of their feature maps that are dropped."""

    volumes: Float[Tensor, "batch channel *shape"]
    masked: Bool[Tensor, "batch tokens"]
    visible: Int[Tensor, "batch visible"]
    """Places of the tokens that are kept."""


class RepRecGenerative(PretextMethod):
    """Stage 2: the transformer recovers masked features of the frozen encoder.

    Args:
        network: the hybrid network of the plan, its encoder pretrained by stage 1.
        settings: resolved.
        configuration: the plan's pretext configuration.
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

    def __init__(self, network: Any, settings: GenerativeSettings, configuration: Any) -> None:
        super().__init__()
        self.settings = settings
        self.configuration = configuration
        network.requires_grad_(False)
        self.encoder = network.encoder.eval()
        self.transformer = network.transformer
        self.transformer.embed.requires_grad_(True)
        self.transformer.blocks.requires_grad_(True)
        self.token_stage = network.token_stage
        if len(settings.mask_block) != len(configuration.tokens.grid):
            raise UserError(
                f"--set mask_block={','.join(map(str, settings.mask_block))}: the grid of tokens has "
                f"{len(configuration.tokens.grid)} axes; give one number for each"
            )
        size, channels = configuration.transformer, network.encoder.output_channels[network.token_stage]
        self.decoder = TokenDecoder(size.width, size.width, settings.decoder_depth, size.heads, channels)

    @classmethod
    def from_plan(cls, configuration: Any) -> dict[str, Any]:
        """Return mask block, depth of the decoder, crop and flips as the plan has them."""
        return {
            "mask_block": configuration.tokens.mask_block,
            "decoder_depth": configuration.transformer.decoder_depth,
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
        }

    def train(self, mode: bool = True) -> "RepRecGenerative":
        """Switch modes, leaving the frozen encoder in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> MaskedViews:
        """Return one random crop of each patch and the block mask of its tokens."""
        cropped = random_crop(volumes, generators, self.settings, self.configuration.spacing_mm)
        grid = self.configuration.tokens.grid
        mask = draw_block_mask(generators, grid, self.settings.mask_block, self.settings.mask_ratio)
        # split before it moves: counting tokens on a device would make the host wait
        visible, _ = split_tokens(mask)
        return MaskedViews(cropped, mask.to(volumes.device), visible.to(volumes.device))

    def losses(self, views: MaskedViews, progress: float) -> StepOutput:
        """Return the mean squared error of the recovered features of the masked tokens (section 4.2)."""
        with torch.no_grad():
            features = map_to_tokens(self.encoder(views.volumes)[self.token_stage])
            target = standardise_tokens(features)
        visible = views.visible
        positions = sine_cosine_positions(self.configuration.tokens.grid, self.transformer.width, features.device)
        seen = features.gather(1, visible[..., None].expand(-1, -1, features.shape[2]))
        encoded = self.transformer.encode(seen, positions[visible])
        recovered = self.decoder(encoded, visible, positions)
        return StepOutput(
            losses={"recovery": masked_token_mse(recovered, target, views.masked)},
            embeddings=encoded.float().mean(dim=1),
            monitors={"recovery_of_visible_mean": visible_mean_baseline(target, views.masked).detach()},
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return what of ``E_t`` the loss reaches, and ``D_t``."""
        return split_by_decay([*self.transformer.parameters(), *self.decoder.parameters()])

    def exported(self) -> Exported:
        """Return encoder and transformer; the gate opens, so that the transformer takes part from the first step on."""
        return Exported(
            pretrained=(*ENCODER, "transformer.embed.", "transformer.blocks."), fixed={"transformer.gate": 1.0}
        )


def random_crop(
    volumes: Float[Tensor, "batch channel *shape"],
    generators: Sequence[torch.Generator],
    settings: ContrastiveSettings | GenerativeSettings,
    spacing_mm: Sequence[float],
) -> Float[Tensor, "batch channel *shape"]:
    """Return a random part of each patch, zoomed to the patch's size and flipped (section 5.1.4, RandomResizedCrop)."""
    dimensions = volumes.ndim - 2
    ranges = AffineRange(
        crop_fraction=settings.crop_fraction,
        rotation_deg=(0.0,) * (1 if dimensions == 2 else 3),
        flip_axes=tuple(axis % dimensions for axis in settings.flip_axes),
        flip_probability=settings.flip_probability,
    )
    return apply_affine(volumes, draw_affine(generators, ranges, volumes.shape[2:], spacing_mm))
