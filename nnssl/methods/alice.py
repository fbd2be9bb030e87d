"""Alice: masked modelling, and alignment of the same anatomy in different patients.

Source: Jiang et al., Anatomical Invariance Modeling and Semantic Alignment for Self-supervised Learning in 3D Medical Image
Analysis (Alice), ICCV 2023, and the authors' code (alibaba-damo-academy/alice), which computes other losses than the paper.

Patches come in pairs, around the same place of two scans (``nnssl.matching``). A student sees a quarter of the tokens of each
patch and recovers the voxels of the others. A teacher, its moving average, sees all tokens of a strongly changed view. From
the mean over its tokens, the student must predict the teacher's mean of the *other* scan. Within a scan, student and teacher
are compared by how their tokens answer the same visible tokens (CASA). The encoder is exported. Voxels that may not be learned
from (air, padding, faces that were masked out) are not recovered.

Deviations:
    * The losses are the paper's, with a protection against collapse that it does not state: a predictor on the student's side,
      vectors of images and answers that are standardised over the batch (``networks.recent_statistics``), and CASA's moving
      average on the teacher's side, without a residual. With the paper's alternative, ``similarity=info_nce``, pairs are
      negatives of one another unless they overlap in a scan; the paper takes different body parts.
    * The decoder is as wide as the encoder, so that the teacher's projection of encoder tokens can be the moving average of the
      student's projection of decoder tokens.
    * Masked tokens are drawn at random (MAE); the code masks 16 x 16 columns through all slices.
    * Teacher views are rotated by up to 15 degrees, zoomed and changed in intensity, but not flipped: left and right differ.
    * Pairs lie around matched places and have the size of the stage's patch. Without a reliable match, they lie around the same
      place of the body's box. The code uses any match with a similarity above 0.7.
    * With a U-Net, positions of one encoder stage are the tokens (``networks.token_encoders``); a token decoder recovers voxels.
    * The norm of all gradients together is clipped to 3; the code clips the gradient of each parameter to 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from nnssl.distributed import gather, rank, standardise_over_ranks, world_size
from nnssl.draws import draw_seed
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_with_negatives
from nnssl.losses.reconstruction import (
    counted_share,
    masked_token_mse,
    standardise_tokens,
    undo_standardise_tokens,
    visible_mean_baseline,
)
from nnssl.losses.similarity import cosine_distance
from nnssl.methods import SAM
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, split_by_decay
from nnssl.methods.settings import (
    Count,
    CropFraction,
    Factor,
    NotNegative,
    Positive,
    RotationDeg,
    TrainingSettings,
    TwoOrMore,
    changes_in_common,
    rotation_within,
)
from nnssl.momentum import cosine_momentum, make_teacher, momentum_for_run
from nnssl.networks.backbone import input_channels
from nnssl.networks.heads import TokenDecoder
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.networks.recent_statistics import RecentStatistics
from nnssl.networks.token_alignment import ConditionalAlignment, Predictor, TokenProjection
from nnssl.networks.token_encoders import token_encoder, trained_up_to_tokens
from nnssl.networks.tokens import cut_into_tokens, join_tokens, sine_cosine_positions
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.learnable import mask_of_patches
from nnssl.views.masking import check_mask, draw_block_mask, visible_tokens
from nnssl.views.partners import PairedViews, check_pairs, of_other_pairs, partners_in_batch, show_same_place
from nnssl.views.spatial import AffineRange, apply_affine, check_affine, draw_affine

HIDDEN_SHARE = 4
"""Largest ratio of the projection's hidden width to the token width: DINO's 2048 costs more than an encoder of narrow tokens."""


@dataclass(frozen=True)
class AliceSettings:
    """Settings of the stage. Sources of the defaults: paper [P], authors' code [C], MAE, DINO or BYOL [D], recommended [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    reconstruction_weight: NotNegative = 1.0  # [P]
    inter_weight: NotNegative = 1.0  # [P], loss between scans
    intra_weight: NotNegative = 1.0  # [P], loss within a scan
    similarity: Literal["cosine", "info_nce"] = "cosine"  # [P], in the loss between scans
    temperature: Positive = 0.2  # [R], for info_nce
    partners: Literal["sam", "body_box"] = "sam"  # [P]
    """How the patches of different scans are paired; SAM is used only if it passes its own examination."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # [D] MAE
    mask_block: tuple[Count, ...] = (1, 1, 1)  # [D] MAE: single tokens
    decoder_depth: Count = 2  # [R]
    projection_hidden: Count = 2048  # [D] DINO
    projection_bottleneck: Count = 256  # [D] DINO
    projection_dimensions: TwoOrMore = 512  # [C]
    alignment_heads: Count = 8  # [C]
    predictor: bool = True  # [D] BYOL
    teacher_momentum: Factor = 0.996  # [C] rises to 1
    crop_fraction: CropFraction = (0.6, 1.0)  # [R]
    """Smallest and largest share of the patch that the teacher's view shows."""
    rotation_deg: RotationDeg = (15.0,)  # [C]
    intensity_views: tuple[str, ...] = ("contrast", "brightness")  # [P]


class Recovered(NamedTuple):
    """Result of masked modelling on a batch of patches.

    Attributes:
        seen: Patches with 0 in masked tokens (batch, channel, *shape).
        output: Patches with recovered masked tokens and unchanged visible ones (batch, channel, *shape).
        error: Mean squared error of the standardised masked tokens, over the voxels that count.
        error_of_mean: The same error for the mean of the visible tokens as prediction.
    """

    seen: Float[Tensor, "batch channel *shape"]
    output: Float[Tensor, "batch channel *shape"]
    error: Float[Tensor, ""]
    error_of_mean: Float[Tensor, ""]


class Alice(PretextMethod):
    """Masked modelling and self-distillation between and within scans.

    Args:
        network: Network of the plan: Primus or a U-Net.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the batch cannot be divided into pairs, all weights are 0, or masks or views cannot be drawn.
    """

    defaults: ClassVar[AliceSettings] = AliceSettings(
        training=TrainingSettings(
            epochs=400,  # [R] with 250 steps each; their product is [P], 100,000 steps
            iterations_per_epoch=250,  # [R]; about 28 in the paper, if an epoch is one pass over its 1,800 scans
            batch_size=16,  # [P] 8 pairs per GPU; on 8 GPUs, the paper's steps have 64 pairs
            optimizer="adamw",  # [P]
            learning_rate=1.5e-4,  # [R]; 5e-5 in the paper
            momentum=(0.9, 0.95),  # [P]
            weight_decay=0.04,  # [C], where it rises to 0.4
            learning_rate_schedule="cosine",  # [P]
            warmup_epochs=40,  # [R] a tenth of the steps; 100 epochs of about 28 steps in the paper, 3 % of them
            gradient_clip=3.0,  # [C], where it limits the gradient of each parameter
        )
    )

    def __init__(self, network: Any, settings: AliceSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_settings(settings, world_size())
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        network.requires_grad_(False)
        encoder = token_encoder(network, configuration.token_grid.stage, configuration.patch_size)
        check_mask(encoder.grid, settings.mask_block, settings.mask_ratio)
        self.student = trained_up_to_tokens(encoder)
        width, dimensions = self.student.width, settings.projection_dimensions
        self.positions: Tensor
        self.register_buffer("positions", sine_cosine_positions(self.student.grid, width), persistent=False)
        values = math.prod(self.student.token_vox) * input_channels(self.student)
        heads = next(n for n in (8, 6, 4, 3, 2, 1) if width % n == 0)
        self.decoder = TokenDecoder(width, settings.decoder_depth, heads, values)
        self.decoder.predict.requires_grad_(bool(settings.reconstruction_weight))
        if settings.training.checkpointing:
            recompute_stages(self)
        self.compares = bool(settings.inter_weight or settings.intra_weight)
        if not self.compares:
            return
        self.projection = TokenProjection(width, settings.projection_hidden, settings.projection_bottleneck, dimensions)
        self.teacher = make_teacher(self.student)
        self.teacher_projection = make_teacher(self.projection)
        if settings.inter_weight:
            self.inter_predictor = Predictor(dimensions, 2 * dimensions) if settings.predictor else nn.Identity()
            self.said_statistics, self.taught_statistics = (
                RecentStatistics(dimensions, settings.training.batch_size) for _ in range(2)
            )
        if settings.intra_weight:
            self.alignment = ConditionalAlignment(
                width, dimensions, dimensions, settings.alignment_heads, 2 * dimensions
            )
            self.teacher_alignment = make_teacher(self.alignment)
            self.intra_predictor = Predictor(dimensions, 2 * dimensions) if settings.predictor else nn.Identity()
        self._momentum = momentum_for_run(settings.teacher_momentum, settings.training.total_steps)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's rotation, intensity views, mask block, partners, and size of decoder and projection."""
        size = configuration.transformer
        return {
            "rotation_deg": rotation_within(configuration.rotation_deg, cls.defaults.rotation_deg),
            "intensity_views": changes_in_common(configuration.intensity_views, cls.defaults.intensity_views),
            "mask_block": (1,) * len(configuration.patch_size),
            "partners": configuration.anatomy.partners,
            "projection_hidden": min(cls.defaults.projection_hidden, HIDDEN_SHARE * configuration.token_grid.width),
        } | ({} if size is None else {"decoder_depth": size.decoder_depth})

    @classmethod
    def spares(cls, settings: AliceSettings) -> tuple[str, ...]:
        """Return SAM's stage if no loss needs corresponding places of other scans."""
        return () if partners_of(settings) == "sam" else (SAM,)

    def partners(self) -> str | None:
        """Return how the patches are paired; None if no loss compares scans."""
        return partners_of(self.settings)

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> PairedViews:
        """Return masks for the student and strong views for the teacher."""
        own, spacing_mm, device = self.settings, self.configuration.spacing_mm, volumes.device
        mask = draw_block_mask(generators, self.student.grid, own.mask_block, own.mask_ratio)
        visible = visible_tokens(mask)
        crop = draw_affine(generators, affine_range(own), volumes.shape[2:], spacing_mm)
        changes = draw_intensity(generators, intensity_range(own), volumes.shape[1])
        return PairedViews(
            patches=volumes,
            mask=mask.to(device),
            visible=visible.to(device),
            strong=apply_affine(apply_intensity(volumes, changes), crop),
            partner=partners_in_batch(len(volumes), device),
            learnable=mask_of_patches(learnable, volumes),
        )

    def placed(self, views: PairedViews, cases: Sequence[str], lower_vox: Int[Tensor, "batch 3"]) -> PairedViews:
        """Return the views with the scan of every patch and its place there in mm."""
        scan = torch.tensor([draw_seed(name) for name in cases])  # the same number on every process
        place_mm = lower_vox * torch.tensor(self.configuration.spacing_mm)
        return replace(views, scan=scan.to(views.mask.device), place_mm=place_mm.to(views.mask.device))

    def losses(self, views: PairedViews, progress: float) -> StepOutput:
        """Return the error of recovered voxels, and the distances of student and teacher between scans and within a scan."""
        own, losses, monitors = self.settings, {}, {}
        tensors = [views.patches, views.strong, views.visible, views.mask, views.learnable]
        found = in_pieces(self._of_piece, tensors, own.training.pieces)
        if own.reconstruction_weight:
            share = self._recovered_share(views)
            losses["reconstruction"] = own.reconstruction_weight * (found["error"] / share)
            monitors["reconstruction_of_visible_mean"] = own.reconstruction_weight * (found["error_of_mean"] / share)
        if own.inter_weight:
            said = self.said_statistics(self.inter_predictor(found["whole"]))
            taught = self.taught_statistics(found["taught_whole"]).detach()
            all_taught = gather(taught)
            others = self._of_other_places(views, len(all_taught))
            between = self._between(said, taught, all_taught, views.partner, others)
            losses["inter"] = own.inter_weight * between
            monitors["head_partner_first"] = self._partner_first(said, all_taught, views.partner, others)
        if own.intra_weight:
            loss, spread = self._within(found["answers"], found["wanted"])
            losses["intra"] = own.intra_weight * loss
            monitors["teacher_answer_std"] = spread
        # Masked modelling alone cannot collapse and has no embeddings.
        embeddings = said.detach() if own.inter_weight else found["whole"].detach() if self.compares else None
        return StepOutput(losses, embeddings, monitors)

    def _of_piece(
        self, patches: Tensor, strong: Tensor, visible: Tensor, mask: Tensor, learnable: Tensor
    ) -> dict[str, Tensor]:
        """Return the errors of recovered voxels, and the vectors and answers (S, T) of student and teacher."""
        seen = self.student(patches, visible)
        tokens = self.decoder.decode(seen, visible, self.positions)
        found = {}
        if self.settings.reconstruction_weight:
            counted = cut_into_tokens(learnable[:, None].expand_as(patches), self.student.token_vox)
            target = standardise_tokens(cut_into_tokens(patches, self.student.token_vox), counted)
            found["error"] = masked_token_mse(self.decoder.predict(tokens), target, mask, counted)
            found["error_of_mean"] = visible_mean_baseline(target, mask, counted)
        if self.compares:
            projected = self.projection(tokens)  # H
            found["whole"] = projected.mean(dim=1)
            if self.settings.intra_weight:
                found["answers"] = self.alignment(seen, projected)  # S
            with torch.no_grad():  # comes last, so that the backward pass of a piece does not repeat it
                taught = self.teacher_projection(self.teacher(strong))  # Y
                found["taught_whole"] = taught.mean(dim=1)
                if self.settings.intra_weight:
                    found["wanted"] = self.teacher_alignment(seen, taught)  # T
        return found

    def _recovered_share(self, views: PairedViews) -> Tensor:
        """Return the share of the voxels of masked tokens that count."""
        counted = cut_into_tokens(views.learnable[:, None], self.student.token_vox)
        return counted_share(counted, views.mask[..., None].expand_as(counted))

    def recover(self, views: PairedViews) -> Recovered:
        """Return what the student sees and its recovered tokens, with the mean and contrast of the true ones."""
        student = self.student
        cut = cut_into_tokens(views.patches, student.token_vox)
        counted = cut_into_tokens(views.learnable[:, None].expand_as(views.patches), student.token_vox)
        target = standardise_tokens(cut, counted)
        tokens = self.decoder.decode(student(views.patches, views.visible), views.visible, self.positions)
        made = self.decoder.predict(tokens).float()
        masked = views.mask[..., None]
        answers = torch.where(masked, undo_standardise_tokens(made, cut, counted), cut)
        seen, recovered = (
            join_tokens(each, student.grid, student.token_vox, views.patches.shape[1])
            for each in (cut.masked_fill(masked, 0), answers)
        )
        share = self._recovered_share(views)
        error = masked_token_mse(made, target, views.mask, counted) / share
        mean = visible_mean_baseline(target, views.mask, counted) / share
        return Recovered(seen, recovered, error, mean)

    def _of_other_places(self, views: PairedViews, keys: int) -> Bool[Tensor, "batch key"]:
        """Return which patches of all processes are negatives of each patch: those of pairs farther than a patch."""
        others = of_other_pairs(views.partner, keys, rank())
        scan, place_mm, partner = views.scan, views.place_mm, views.partner
        if scan is None or place_mm is None:
            return others
        sides = zip(self.configuration.patch_size, self.configuration.spacing_mm, strict=True)
        extent_mm = place_mm.new_tensor([voxels * mm for voxels, mm in sides])
        everywhere = gather(scan), gather(place_mm), gather(rank() * len(partner) + partner)
        return others & ~show_same_place(scan, place_mm, partner, *everywhere, extent_mm)

    def _between(self, said: Tensor, taught: Tensor, all_taught: Tensor, partner: Tensor, others: Tensor) -> Tensor:
        """Return the loss between scans: of the student's predictions and the teacher's vectors of the partners.

        Args:
            said: Standardised predictions of the student (batch, dimension).
            taught: Standardised vectors of the teacher (batch, dimension).
            all_taught: Vectors of the teacher on all processes.
            partner: Index of each patch's partner in the batch.
            others: Which patches of all processes are negatives of each patch (batch, key).
        """
        if self.settings.similarity == "cosine":
            return cosine_distance(said, taught[partner]).mean()
        queries, keys = F.normalize(said, dim=1), F.normalize(all_taught, dim=1)
        # The teacher's vector of the patch itself shows the same place and is therefore not a negative.
        negatives, positives = keys.expand(len(queries), -1, -1), F.normalize(taught[partner], dim=1)
        return info_nce_with_negatives(queries, positives, negatives, others, self.settings.temperature).mean()

    @torch.no_grad()
    def _partner_first(self, said: Tensor, all_taught: Tensor, partner: Tensor, others: Tensor) -> Tensor:
        """Return the share of patches whose prediction is more similar to the partner's vector than to all negatives'."""
        similarity = F.normalize(said, dim=1) @ F.normalize(all_taught, dim=1).T
        first = rank() * len(partner)
        own = similarity.gather(1, first + partner[:, None])[:, 0]
        best = similarity.masked_fill(~others, -torch.inf).amax(dim=1)
        compared = others.any(dim=1)
        return ((own > best) & compared).sum() / compared.sum().clamp(min=1)

    def _within(self, answers: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance of the student's and teacher's answers to the visible tokens, and the spread of the teacher's."""
        rows = F.normalize(wanted.flatten(0, 1), dim=1)
        spread = rows.std(dim=0).mean() * math.sqrt(rows.shape[1])
        first, second = (
            standardise_over_ranks(each.flatten(0, 1), epsilon=1e-10).unflatten(0, each.shape[:2])
            for each in (answers, wanted)
        )
        return cosine_distance(self.intra_predictor(first), second).mean(), spread

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, decoder, projection, CASA and predictors; biases, norms and single vectors have no weight decay."""
        return split_by_decay(self)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder, projection and CASA with their moving averages; no pairs for masked modelling alone."""
        if not self.compares:
            return []
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.student, self.teacher),
            (self.projection, self.teacher_projection),
        ]
        return [*pairs, (self.alignment, self.teacher_alignment)] if self.settings.intra_weight else pairs

    def momentum(self, progress: float) -> float:
        """Return BYOL's momentum, which rises to 1 by a cosine; its start is adapted to the length of the run."""
        total = self.settings.training.total_steps
        return cosine_momentum(round(progress * total), total, self._momentum)

    def exported(self) -> Exported:
        """Return the encoder."""
        return Exported(pretrained=self.student.exported)


def check_settings(settings: AliceSettings, processes: int) -> None:
    """Check that something is learned, and that both patches of a pair are in the same process.

    Raises:
        UserError: If all losses have a weight of 0, or the batch cannot be divided into pairs.
    """
    if not (settings.reconstruction_weight or settings.inter_weight or settings.intra_weight):
        raise UserError("reconstruction_weight, inter_weight or intra_weight must be above 0, got 0 for all")
    batch = settings.training.batch_size
    check_pairs(batch, processes)
    if settings.inter_weight and settings.similarity == "info_nce" and batch < 4:
        raise UserError(f"batch_size must be at least 4 for similarity=info_nce, got {batch}; set batch_size=4")


def affine_range(settings: AliceSettings) -> AffineRange:
    """Return the range of the teacher's crops and rotations; there are no flips."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg)


def intensity_range(settings: AliceSettings) -> IntensityRange:
    """Return the intensity changes of the teacher's view, with the default ranges of ``IntensityRange``."""
    return restrict_to(IntensityRange(), settings.intensity_views)


def partners_of(settings: AliceSettings) -> str | None:
    """Return how the patches are paired; None if no loss compares scans."""
    return settings.partners if settings.inter_weight else None
