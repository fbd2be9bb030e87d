"""Volume Fusion: a pseudo-segmentation of two fused patches by the coefficient of their fusion.

Source: Wang et al., MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale Unannotated
Dataset, 2023; published as Volume Fusion-based Self-supervised Pretraining for 3D Medical Image Segmentation, IEEE TIP, 2025.

Two patches are fused by a map of K + 1 discrete coefficients, constant in random boxes. The U-Net predicts the coefficient of
every voxel as a class, with the loss of segmentation. Encoder and decoder are exported, the layer of the classes is discarded.
Voxels that may not be learned from (air, padding, faces that were masked out) in one of the two patches leave both losses.

Deviations:
    * Both patches of a pair are foreground once, so that a batch of N patches gives N fused ones. They are any two patches of
      the batch; the paper takes them from two volumes.
    * Number and size of the boxes: see ``views.fusion``.
    * Loss: that of nnU-Net (Dice per image without class 0, and cross-entropy), at full resolution only. The paper's Dice
      includes all classes.
    * Optimizer: Adam with a rate that is halved in steps in the paper; here AdamW with a cosine schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from torch import Tensor

from nnssl.distributed import world_size
from nnssl.errors import UserError
from nnssl.losses.reconstruction import counted_share
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import Count, PositiveShare, Share, TrainingSettings
from nnssl.networks.dense import ENCODER_AND_DECODER, decoder_maps, trained_up_to_segmentation
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.flips import apply_flips, check_flips, draw_flips
from nnssl.views.fusion import FusionRange, draw_classes, fuse
from nnssl.views.learnable import mask_of_patches
from nnssl.views.partners import check_pairs, partners_in_batch

IGNORED = -100
"""Class of voxels that the cross-entropy leaves out."""
SMOOTH = 1e-5
"""Number that nnU-Net adds to numerator and denominator of the Dice."""


@dataclass(frozen=True)
class VolumeFusionSettings:
    """Settings of the stage. Sources of the defaults: the paper [P], Wald et al. 2025 [W], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    coefficients: Count = 4  # [P]
    """Number of steps K of the coefficient from 0 to 1; there are K + 1 classes."""
    boxes: tuple[Count, Count] = (10, 39)  # [W]
    """Smallest and largest number of boxes."""
    box_side: tuple[PositiveShare, PositiveShare] = (0.0625, 0.625)  # [W]
    """Smallest and largest side of a box, as a share of the patch along each axis."""
    flip_axes: tuple[int, ...] = (0, 1, 2)  # [W]
    """Axes along which a patch may be flipped before the fusion."""
    flip_probability: Share = 0.5  # [W]


class FusedPatches(NamedTuple):
    """Views of a batch.

    Attributes:
        fused: Fused patches (batch, channel, *shape).
        classes: Class of the coefficient of every voxel (batch, *shape).
        learnable: Mask of the voxels that may be learned from in both patches (batch, *shape).
    """

    fused: Float[Tensor, "batch channel *shape"]
    classes: Int[Tensor, " batch *shape"]
    learnable: Bool[Tensor, " batch *shape"]


class VolumeFusion(PretextMethod):
    """Segmentation of fused patches by the coefficient of their fusion.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the batch cannot be divided into pairs, or flips or boxes cannot be drawn.
    """

    defaults: ClassVar[VolumeFusionSettings] = VolumeFusionSettings(
        training=TrainingSettings(
            epochs=400,  # [P] with 250 steps each, the paper's 100,000 steps for 1,000 scans
            iterations_per_epoch=250,  # [R]
            batch_size=4,  # [P]
            optimizer="adamw",  # [R]; Adam in the paper
            learning_rate=1e-3,  # [P]
            momentum=(0.9, 0.999),  # [R]
            weight_decay=1e-5,  # [P]
            learning_rate_schedule="cosine",  # [R]; halved in steps in the paper
            warmup_epochs=0,
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: VolumeFusionSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_settings(settings)
        check_pairs(settings.training.batch_size, world_size())
        check_flips(len(configuration.patch_size), settings.flip_axes)
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        encoder = network.encoder
        self.output = encoder.conv_op(encoder.output_channels[0], settings.coefficients + 1, 1)
        self.dice_loss = MemoryEfficientSoftDiceLoss(
            apply_nonlin=softmax_helper_dim1, batch_dice=False, do_bg=False, smooth=SMOOTH, ddp=False
        )
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's flips."""
        return {"flip_axes": configuration.flip_axes}

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> FusedPatches:
        """Return every patch fused into its partner, and the classes of the coefficients."""
        own = self.settings
        flips = draw_flips(generators, volumes.ndim - 2, own.flip_axes, own.flip_probability)
        ranges = FusionRange(own.coefficients, own.boxes, own.box_side)
        classes = draw_classes(generators, ranges, volumes.shape[2:]).to(volumes.device)
        patches = apply_flips(volumes, flips)
        partner = partners_in_batch(len(patches), patches.device)
        kept = apply_flips(mask_of_patches(learnable, volumes)[:, None], flips)[:, 0]
        return FusedPatches(fuse(patches, patches[partner], classes, own.coefficients), classes, kept & kept[partner])

    def losses(self, views: FusedPatches, progress: float) -> StepOutput:
        """Return nnU-Net's loss of the predicted classes, and the share of voxels with the right class as monitor."""
        found = in_pieces(self._of_piece, list(views), self.settings.training.pieces)
        share = counted_share(views.learnable)
        losses = {"dice": found["dice"], "cross_entropy": found["cross_entropy"] / share}
        return StepOutput(losses, None, {"head_accuracy": found["accuracy"] / share})

    def _of_piece(self, fused: Tensor, classes: Tensor, learnable: Tensor) -> dict[str, Tensor]:
        logits = self.output(decoder_maps(self.network, fused)[-1])
        counted = torch.where(learnable, classes, IGNORED)
        # Both losses are computed in float32, outside of mixed precision.
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            return {
                "dice": self.dice_loss(logits, classes[:, None], learnable[:, None]),
                "cross_entropy": F.cross_entropy(logits, counted, ignore_index=IGNORED, reduction="sum")
                / classes.numel(),
                "accuracy": (logits.detach().argmax(dim=1) == counted).float().mean(),
            }

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder and the layer of the classes; biases and norms have no weight decay."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return encoder and decoder."""
        return Exported(pretrained=ENCODER_AND_DECODER)


def check_settings(settings: VolumeFusionSettings) -> None:
    """Check that boxes can be drawn.

    Raises:
        UserError: If a smallest value is above the largest.
    """
    for name in ("boxes", "box_side"):
        low, high = getattr(settings, name)
        if low > high:
            raise UserError(f"{name} must be two ascending numbers, got {low:g},{high:g}")
