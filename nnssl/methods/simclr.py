"""SimCLR, the plain contrastive baseline: two views of a patch are contrasted with all other patches of the batch.

Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.

An encoder ``f`` and a projection ``g`` see two views of every patch. NT-Xent (equation 1) makes their embeddings more similar
to each other than to those of all other patches of the batch. There is no teacher and no queue. ``f`` is exported, ``g`` is
discarded.

Deviations:
    * Pooling: the paper pools the last feature map and projects it by a perceptron with one hidden layer. Here the hidden
      layer comes before the mean (``networks.heads``), because instance normalisation makes the plain mean nearly the same
      for all images.
    * Views: the paper uses crop, flip, colour distortion and blur. Here crop and flips are those of the plan, and of the
      plan's intensity changes only contrast, brightness and blur are kept. There are no colours.
    * Optimizer: LARS for batches of thousands in the paper. Here AdamW, as in the other contrastive methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.collapse import retrieval_top1
from nnssl.losses.nt_xent import nt_xent
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import CropFraction, Positive, Share, TrainingSettings, TwoOrMore, changes_in_common
from nnssl.networks.dense import ENCODER, trained_encoder
from nnssl.networks.heads import HeadNormalisation, PooledProjection
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, check_intensity, restrict_to
from nnssl.views.jittered_crops import jittered_crop_pair
from nnssl.views.spatial import AffineRange, check_affine


@dataclass(frozen=True)
class SimCLRSettings:
    """Settings of the stage. Sources of the defaults: the paper [P], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Positive = 0.1  # [P] table 5
    head_normalisation: HeadNormalisation = "batch"  # [P] as its batch normalisation
    """``batch`` standardises the head's hidden vector over the batch, ``none`` leaves it as it is."""
    embedding_dimensions: TwoOrMore = 128  # [P] section 4.2
    crop_fraction: CropFraction = (0.08, 1.0)  # [P] appendix A
    flip_axes: tuple[int, ...] = (-1,)  # [P] appendix A, horizontal
    flip_probability: Share = 0.5  # [P] appendix A
    intensity_views: tuple[str, ...] = ("brightness", "contrast", "blur")  # [P] appendix A
    """Intensity changes that correspond to the paper's colour distortion and blur."""


class SimCLR(PretextMethod):
    """Contrast of pooled encoder features between two views of every patch of the batch.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the crop, the flips or the intensity changes cannot be drawn.
    """

    learns_at_voxels: ClassVar[bool] = False
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

    def __init__(self, network: Any, settings: SimCLRSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.encoder = trained_encoder(network)
        channels = network.encoder.output_channels[-1]
        rows = 2 * settings.training.batch_size  # both views of the batch
        self.head = PooledProjection(
            channels, channels, settings.embedding_dimensions, rows, settings.head_normalisation
        )
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's crop, flips and intensity views."""
        return {
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
        """Return two views of each patch, which are cropped, flipped and changed in intensity independently."""
        crop, changes = affine_range(self.settings), intensity_range(self.settings)
        return jittered_crop_pair(volumes, generators, crop, changes, self.configuration.spacing_mm)

    def losses(self, views: tuple[Tensor, Tensor], progress: float) -> StepOutput:
        """Return NT-Xent of the projections of both views (equation 1), and the retrieval of the other view as monitor."""

        def pool(volumes: Tensor) -> Tensor:
            return self.head.pool(self.encoder(volumes)[-1])

        pooled = [in_pieces(pool, [volumes], self.settings.training.pieces) for volumes in views]
        first, second = self.head.embed(torch.cat(pooled)).chunk(2)
        monitors = {
            "head_similarity": (first * second).sum(dim=1).mean().detach(),
            "head_retrieval": retrieval_top1(first, second),
        }
        losses = {"contrast": nt_xent(first, second, self.settings.temperature)}
        return StepOutput(losses, first.detach(), monitors)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder and head; biases and norms have no weight decay (appendix B.1)."""
        return split_by_decay(self)

    def exported(self) -> Exported:
        """Return the encoder, under both names that nnU-Net has for it."""
        return Exported(pretrained=ENCODER)


def affine_range(settings: SimCLRSettings) -> AffineRange:
    """Return the range of crops and flips; there is no rotation."""
    return AffineRange(settings.crop_fraction, flip_axes=settings.flip_axes, flip_probability=settings.flip_probability)


def intensity_range(settings: SimCLRSettings) -> IntensityRange:
    """Return the intensity changes named in the settings, with the default ranges of ``IntensityRange``."""
    return restrict_to(IntensityRange(), settings.intensity_views)
