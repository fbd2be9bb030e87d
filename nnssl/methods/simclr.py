"""SimCLR: two views of a patch are told from those of all other patches of the batch. The plain baseline of contrast.

Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.

An encoder ``f`` and a projection ``g`` see two views of every patch; NT-Xent (equation 1) pulls the two together and pushes
the views of other patches away. There is no teacher and no queue. ``f`` leaves, ``g`` does not.

Deviations:
    * Pooling: the paper pools the last feature map and projects by a perceptron with one hidden layer. Here the hidden layer
      comes before the mean (``networks.heads``), since instance normalisation leaves the plain mean nearly the same for all
      images.
    * Views: crop, flip, colour distortion and blur in the paper. Here crop and flips as the plan has them for the data, and of
      the plan's intensity changes those that answer to colour distortion and blur; there are no colours to drop.
    * Optimizer: LARS for batches of thousands. Here AdamW, as for the other contrasts of this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from nnssl.collapse import retrieval_top1
from nnssl.losses.nt_xent import nt_xent
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import TrainingSettings
from nnssl.networks.dense import ENCODER
from nnssl.networks.heads import PooledProjection
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity, restrict_to
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_affine

Share = Annotated[float, Field(gt=0, le=1)]

INTENSITY = ("brightness", "contrast", "blur")
"""What answers to the paper's colour distortion and blur."""


@dataclass(frozen=True)
class SimCLRSettings:
    """The paper's numbers [P], or recommended ones [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Annotated[float, Field(gt=0)] = 0.1  # [P] table 5
    embedding_dimensions: Annotated[int, Field(ge=2)] = 128  # [P] section 4.2
    crop_fraction: tuple[Share, Share] = (0.08, 1.0)  # [P] appendix A
    flip_axes: tuple[int, ...] = (-1,)  # [P] appendix A, horizontal
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # [P] appendix A
    intensity_views: tuple[str, ...] = INTENSITY  # [P] appendix A


class SimCLR(PretextMethod):
    """Contrast of pooled features of the encoder between two views of every patch of the batch.

    Args:
        network: the U-Net of the plan.
        settings: resolved.
        configuration: the plan's pretext configuration.

    Raises:
        ValueError: the crop or the flips do not fit the plan's patch.
    """

    defaults: ClassVar[SimCLRSettings] = SimCLRSettings(
        training=TrainingSettings(
            epochs=100,  # [P] section 2.2
            iterations_per_epoch=250,
            batch_size=4096,  # [P] section 2.2
            optimizer="adamw",  # [R]; LARS in the paper
            learning_rate=1e-3,  # [R]
            momentum=(0.9, 0.999),  # [R]
            weight_decay=1e-6,  # [P] section 2.2
            learning_rate_schedule="cosine",  # [P] section 2.2
            warmup_epochs=10,  # [P] section 2.2
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: SimCLRSettings, configuration: Any) -> None:
        super().__init__()
        check_affine(affine_range(settings, configuration), configuration.patch_size, configuration.spacing_mm)
        self.settings = settings
        self.configuration = configuration
        network.requires_grad_(False)
        self.encoder = network.encoder.requires_grad_(True)
        channels = network.encoder.output_channels[-1]
        self.head = PooledProjection(channels, channels, settings.embedding_dimensions)

    @classmethod
    def from_plan(cls, configuration: Any) -> dict[str, Any]:
        """Return crop, flips and intensity views as the plan has them."""
        return {
            "crop_fraction": configuration.crop_fraction,
            "flip_axes": configuration.flip_axes,
            "intensity_views": tuple(name for name in configuration.intensity_views if name in INTENSITY),
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> tuple[Float[Tensor, "batch channel *shape"], Float[Tensor, "batch channel *shape"]]:
        """Return two views of each patch, each cropped, flipped and changed in intensity on its own."""
        return self._view(volumes, generators), self._view(volumes, generators)

    def _view(self, volumes: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        spacing_mm, shape = self.configuration.spacing_mm, volumes.shape[2:]
        crop = draw_affine(generators, affine_range(self.settings, self.configuration), shape, spacing_mm)
        ranges = restrict_to(IntensityRange(), self.settings.intensity_views)
        return apply_intensity(apply_affine(volumes, crop), draw_intensity(generators, ranges, volumes.shape[1]))

    def losses(self, views: tuple[Tensor, Tensor], progress: float) -> StepOutput:
        """Return NT-Xent of the projections of both views (equation 1), and how often the other view is the nearest."""
        first, second = (self.head(self.encoder(volumes)[-1]) for volumes in views)
        with torch.no_grad():
            monitors = {
                "positive_similarity": (first * second).sum(dim=1).mean(),
                "retrieval_top1": retrieval_top1(first.detach(), second.detach()),
            }
        contrast = nt_xent(first, second, self.settings.temperature)
        return StepOutput(losses={"contrast": contrast}, embeddings=first, monitors=monitors)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder and head; biases and norms do not decay (appendix B.1)."""
        return split_by_decay([*self.encoder.parameters(), *self.head.parameters()])

    def exported(self) -> Exported:
        """Return the encoder, under both names that nnU-Net gives it."""
        return Exported(pretrained=ENCODER)


def affine_range(settings: SimCLRSettings, configuration: Any) -> AffineRange:
    """Return what crops and flips are drawn from; nothing is turned."""
    dimensions = len(configuration.patch_size)
    return AffineRange(
        crop_fraction=settings.crop_fraction,
        rotation_deg=(0.0,) * (1 if dimensions == 2 else 3),
        flip_axes=tuple(axis % dimensions for axis in settings.flip_axes),
        flip_probability=settings.flip_probability,
    )
