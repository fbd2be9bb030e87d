"""MAE: masked autoencoding of whole patches, by a U-Net or by Primus.

Source: He et al., Masked Autoencoders Are Scalable Vision Learners (MAE), CVPR 2022; Wald et al., Revisiting MAE Pre-training
for 3D Medical Image Segmentation, CVPR 2025, for U-Nets; Tian et al., SparK, ICLR 2023, for ``sparse``.

Most cells of a patch are masked. The network recovers the standardised voxels of the masked cells from the visible ones, and
only these voxels are compared.

* U-Net: a cell is a position of the bottleneck. Masked voxels are 0, and encoder, decoder and one convolution recover the patch.
  With ``sparse``, the encoder's convolutions see visible positions only, and learned tokens fill its maps before the decoder.
  Encoder and decoder are exported.
* Primus: a cell is a token. The transformer receives the visible tokens only, and a light decoder of transformer blocks
  predicts the voxels of all tokens. The encoder is exported.

Voxels that may not be learned from (air, padding, faces that were masked out) leave the loss, as anonymised regions do in Wald et
al., and the mean and deviation of the targets.

Deviations:
    * Targets: MAE standardises the voxels of each token, and the code of Wald et al. takes the voxels as preprocessing left
      them. Here every channel of a patch is standardised as a whole, so that patches of low contrast count as much as others and
      the differences between cells have to be recovered too. The network sees the patches as they are, as in fine-tuning.
    * Cells: blocks of 16 voxels in the code of Wald et al.; here the stride of the bottleneck.
    * Sparse: SparK's decoder is light and discarded; here it is that of the U-Net (``networks.visible_convolutions``).
    * Optimizer: SGD with nnU-Net's schedule in Wald et al. Here AdamW for all networks, as in MAE.
    * Length: 1,000 epochs of 250 steps with 39,000 scans in Wald et al.; here 400 epochs, times the share set by ``--length``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from nnssl.losses.reconstruction import counted_share, masked_token_mse, standardise_tokens
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import Count, Share, TrainingSettings
from nnssl.networks.backbone import input_channels, stage_strides
from nnssl.networks.dense import ENCODER_AND_DECODER, decode, decoder_maps, trained_up_to_segmentation
from nnssl.networks.heads import TokenDecoder
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.networks.primus_positions import is_primus
from nnssl.networks.token_encoders import PrimusTokens
from nnssl.networks.tokens import cut_into_tokens, sine_cosine_positions
from nnssl.networks.visible_convolutions import SkipTokens, enlarge, visible_maps
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.flips import apply_flips, check_flips, draw_flips
from nnssl.views.learnable import mask_of_patches
from nnssl.views.masking import check_mask, draw_block_mask, visible_tokens


@dataclass(frozen=True)
class MAESettings:
    """Settings of the stage. Sources of the defaults: Wald et al. [P], He et al. [M], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # [M]; 60 to 90 % in [P]
    """Share of the cells that are masked."""
    sparse: bool = False  # [P] compares both
    """Whether a U-Net's encoder sees visible positions only; Primus always does."""
    decoder_depth: Count = 2  # [R]; 8 for an encoder of 24 blocks in [M]
    """Number of blocks of the light decoder; Primus only."""
    flip_axes: tuple[int, ...] = (0, 1, 2)  # [P]
    """Axes along which a patch may be flipped."""
    flip_probability: Share = 0.5  # [P]


class MaskedPatches(NamedTuple):
    """Views of a batch.

    Attributes:
        patches: Patches (batch, channel, *shape), as fine-tuning shows them.
        target: The same patches, every channel standardised.
        mask: Mask that is True for masked cells (batch, cells), in C order of their grid.
        visible: Indices of the visible cells (batch, visible), ascending.
        learnable: Mask of the voxels that may be learned from (batch, *shape).
    """

    patches: Float[Tensor, "batch channel *shape"]
    target: Float[Tensor, "batch channel *shape"]
    mask: Bool[Tensor, "batch cells"]
    visible: Int[Tensor, "batch visible"]
    learnable: Bool[Tensor, " batch *shape"]


class MAE(PretextMethod):
    """Recovery of masked voxels.

    Args:
        network: Network of the plan: a U-Net or Primus.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the flips or masks cannot be drawn.
    """

    defaults: ClassVar[MAESettings] = MAESettings(
        training=TrainingSettings(
            epochs=400,  # [R]
            iterations_per_epoch=250,  # [P]
            batch_size=6,  # [P]
            optimizer="adamw",  # [M]; SGD in [P]
            learning_rate=1e-3,  # [R]; 1.5e-4 for each 256 images in [M], 1e-2 for SGD in [P]
            momentum=(0.9, 0.95),  # [M]
            weight_decay=0.05,  # [M]
            learning_rate_schedule="cosine",  # [M]
            warmup_epochs=20,  # [M] a twentieth
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: MAESettings, configuration: StageConfiguration) -> None:
        super().__init__()
        shape = configuration.patch_size
        check_flips(len(shape), settings.flip_axes)
        self.settings = settings
        self.configuration = configuration
        recomputes = settings.training.checkpointing
        if is_primus(network):
            network.requires_grad_(False)
            self.tokens = PrimusTokens(network).requires_grad_(True)
            self.cell_vox, self.grid, width = self.tokens.token_vox, self.tokens.grid, self.tokens.width
            self.positions: Tensor
            self.register_buffer("positions", sine_cosine_positions(self.grid, width), persistent=False)
            heads = next(n for n in (8, 6, 4, 3, 2, 1) if width % n == 0)
            values = math.prod(self.cell_vox) * input_channels(self.tokens)
            self.decoder = TokenDecoder(width, settings.decoder_depth, heads, values)
            if recomputes:
                recompute_stages(self)
        else:
            self.network = trained_up_to_segmentation(network)
            encoder = network.encoder
            self.cell_vox = stage_strides(encoder, len(shape))[-1]
            self.grid = tuple(n // size for n, size in zip(shape, self.cell_vox, strict=True))
            self.output = encoder.conv_op(encoder.output_channels[0], input_channels(encoder), 1)
            if settings.sparse:
                self.skip_tokens = SkipTokens(encoder.output_channels)
            if recomputes and settings.sparse:
                network.decoder.recomputes = True  # ``visible_maps`` recomputes the encoder with its masks
            elif recomputes:
                recompute_stages(self)
        check_mask(self.grid, (1,) * len(shape), settings.mask_ratio)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's flips and the depth of the token decoder."""
        size = configuration.transformer
        return {"flip_axes": configuration.flip_axes} | ({} if size is None else {"decoder_depth": size.decoder_depth})

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> MaskedPatches:
        """Return the flipped patches, their standardised voxels as targets, and their masks."""
        own, device = self.settings, volumes.device
        flips = draw_flips(generators, volumes.ndim - 2, own.flip_axes, own.flip_probability)
        mask = draw_block_mask(generators, self.grid, (1,) * len(self.grid), own.mask_ratio)
        patches = apply_flips(volumes, flips)
        counted = apply_flips(mask_of_patches(learnable, volumes)[:, None], flips).expand_as(patches)
        # a channel of a patch is one token
        target = standardise_tokens(patches.flatten(2), counted.flatten(2)).view(volumes.shape)
        return MaskedPatches(patches, target, mask.to(device), visible_tokens(mask).to(device), counted[:, 0])

    def losses(self, views: MaskedPatches, progress: float) -> StepOutput:
        """Return the mean squared error of the masked voxels that count, and that of a constant patch as monitor."""
        found = in_pieces(self._of_piece, list(views), self.settings.training.pieces)
        counted = cut_into_tokens(views.learnable[:, None], self.cell_vox)
        share = counted_share(counted, views.mask[..., None].expand_as(counted))
        return StepOutput(
            {"recovery": found["error"] / share}, None, {"recovery_of_constant": found["error_of_constant"] / share}
        )

    def _of_piece(
        self, patches: Tensor, target: Tensor, mask: Tensor, visible: Tensor, learnable: Tensor
    ) -> dict[str, Tensor]:
        recovered, wanted = self.recover(patches, mask, visible), cut_into_tokens(target, self.cell_vox)
        counted = cut_into_tokens(learnable[:, None].expand_as(target), self.cell_vox)
        return {
            "error": masked_token_mse(recovered, wanted, mask, counted),
            "error_of_constant": masked_token_mse(torch.zeros_like(wanted), wanted, mask, counted),
        }

    def recover(
        self,
        patches: Float[Tensor, "batch channel *shape"],
        mask: Bool[Tensor, "batch cells"],
        visible: Int[Tensor, "batch visible"],
    ) -> Float[Tensor, "batch cells values"]:
        """Return the recovered, standardised voxels of every cell, from the visible cells of patches."""
        if hasattr(self, "tokens"):
            prediction: Tensor = self.decoder(self.tokens(patches, visible), visible, self.positions)
            return prediction
        shown = ~mask.unflatten(1, self.grid)
        if self.settings.sparse:
            recomputes = self.settings.training.checkpointing
            maps = visible_maps(self.network.encoder, patches, shown, recomputes)
            last = decode(self.network.decoder, self.skip_tokens(maps, shown))[-1]
        else:
            last = decoder_maps(self.network, patches * enlarge(shown, patches.shape[2:]))[-1]
        return cut_into_tokens(self.output(last), self.cell_vox)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return all that is trained; biases, norms and single vectors have no weight decay."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return encoder and decoder of a U-Net, or the encoder of Primus."""
        return Exported(pretrained=PrimusTokens.exported if hasattr(self, "tokens") else ENCODER_AND_DECODER)
