"""Models Genesis: restoration of patches whose intensities, local texture and context were corrupted.

Source: Zhou et al., Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis, MICCAI 2019, extended in
Medical Image Analysis 67, 2021, and the authors' code (MrGiovanni/ModelsGenesis).

A patch is corrupted by four transformations, each with its own probability: local voxels are shuffled, intensities follow a
random monotone curve, and noise fills small boxes (inpainting) or everything outside large
boxes (outpainting).
The U-Net restores the patch as it was. Encoder and decoder are exported, the output layer is discarded. Voxels that may not be
learned from (air, padding, faces that were masked out) leave the loss.

Deviations:
    * Intensities lie in [0, 1] in the paper, and the output passes a sigmoid. Here voxels are standardised, so that there is
      no sigmoid, and the curves act between two percentiles of the patch (``views.tone_curves``).
    * Noise, windows and boxes: see ``views.corruption``. The order is as in the paper: painting comes last, after
      shuffling and the curve.
    * Patches: in the paper, 64 x 64 x 32 voxels of chest CT; here those of the plan.
    * Optimizer: SGD with a learning rate of 1 in the paper, for a loss on intensities in [0, 1]. Here AdamW, as in PCRL.
    * Length: in the paper, until the loss of held-out patches has not improved for 50 epochs. Here the run has a fixed length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.losses.reconstruction import counted_mse, counted_share
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import Share, TrainingSettings
from nnssl.networks.backbone import input_channels
from nnssl.networks.dense import ENCODER_AND_DECODER, decoder_maps, trained_up_to_segmentation
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.corruption import CorruptionRange, apply_corruption, draw_corruption
from nnssl.views.flips import apply_flips, check_flips, draw_flips
from nnssl.views.learnable import mask_of_patches
from nnssl.views.tone_curves import apply_tone_curves, draw_tone_curves


@dataclass(frozen=True)
class ModelsGenesisSettings:
    """Settings of the stage. Sources of the defaults: the paper [P], the authors' code [C], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    curve_probability: Share = 0.9  # [C]
    """Probability that the intensities of a patch follow a random curve."""
    falling_share: Share = 0.5  # [C]
    """Share of the curves that invert the order of the intensities."""
    shuffle_probability: Share = 0.5  # [C]
    paint_probability: Share = 0.9  # [C]
    inpainting_share: Share = 0.2  # [C]
    flip_axes: tuple[int, ...] = (0, 1, 2)  # [C]
    """Axes along which a patch, with its target, may be flipped."""
    flip_probability: Share = 0.4  # [C]


class Restorations(NamedTuple):
    """Views of a batch.

    Attributes:
        seen: Corrupted patches (batch, channel, *shape).
        clean: The same patches as they were.
        learnable: Mask of the voxels that may be learned from (batch, *shape).
    """

    seen: Float[Tensor, "batch channel *shape"]
    clean: Float[Tensor, "batch channel *shape"]
    learnable: Bool[Tensor, " batch *shape"]


class ModelsGenesis(PretextMethod):
    """Restoration of corrupted patches by encoder and decoder.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the flips cannot be drawn.
    """

    defaults: ClassVar[ModelsGenesisSettings] = ModelsGenesisSettings(
        training=TrainingSettings(
            epochs=400,  # [R]; early stopping in the paper
            iterations_per_epoch=250,
            batch_size=6,  # [C]
            optimizer="adamw",  # [R]; SGD in the paper
            learning_rate=1e-3,  # [R]
            momentum=(0.9, 0.999),  # [R]
            weight_decay=1e-4,  # [R]
            learning_rate_schedule="cosine",  # [R]; in steps in the code
            warmup_epochs=0,
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: ModelsGenesisSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_flips(len(configuration.patch_size), settings.flip_axes)
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_segmentation(network)
        encoder = network.encoder
        self.output = encoder.conv_op(encoder.output_channels[0], input_channels(encoder), 1)
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
    ) -> Restorations:
        """Return the flipped patches, corrupted and as they were."""
        own, shape = self.settings, volumes.shape[2:]
        flips = draw_flips(generators, len(shape), own.flip_axes, own.flip_probability)
        curves = draw_tone_curves(generators, volumes.shape[1], own.curve_probability, own.falling_share)
        drawn = draw_corruption(generators, corruption_range(own), shape, self.configuration.spacing_mm)
        clean = apply_flips(volumes, flips)
        # Shuffling permutes voxels, so that it may come after the curve, which is the same for all voxels.
        seen = apply_corruption(apply_tone_curves(clean, curves), drawn)
        return Restorations(seen, clean, apply_flips(mask_of_patches(learnable, volumes)[:, None], flips)[:, 0])

    def losses(self, views: Restorations, progress: float) -> StepOutput:
        """Return the mean squared error of the voxels that count, and that of the corrupted patch as it is as monitor."""
        found = in_pieces(self._of_piece, list(views), self.settings.training.pieces)
        share = counted_share(views.learnable)
        unchanged = counted_mse(views.seen, views.clean, views.learnable) / share
        return StepOutput({"restoration": found["error"] / share}, None, {"restoration_of_unchanged": unchanged})

    def _of_piece(self, seen: Tensor, clean: Tensor, learnable: Tensor) -> dict[str, Tensor]:
        restored = self.output(decoder_maps(self.network, seen)[-1])
        return {"error": counted_mse(restored, clean, learnable)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder and output layer; biases and norms have no weight decay."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return encoder and decoder."""
        return Exported(pretrained=ENCODER_AND_DECODER)


def corruption_range(settings: ModelsGenesisSettings) -> CorruptionRange:
    """Return the range of shuffling and painting."""
    return replace(
        CorruptionRange(),
        paint_probability=settings.paint_probability,
        inpainting_share=settings.inpainting_share,
        shuffle_probability=settings.shuffle_probability,
    )
