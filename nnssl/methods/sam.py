"""SAM: anatomical embeddings of every voxel, learned from pairs of crops of one scan.

Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in Radiological Images, TMI 2022, and
the authors' code (alibaba-damo-academy/self-supervised-anatomical-embedding-v2).

Two crops of a patch are drawn with independent scales and rotations. The embedding of a voxel in one crop must be more similar
to that of the same place in the other crop than to those of other places. This holds for a fine embedding, whose negatives are
hard by both embeddings, and for a coarse one, with negatives from the same scan and from other scans. ``nnssl.matching`` uses
the embeddings to find corresponding points in other scans. Queries lie where the patch may be learned from (not in air, padding,
or faces that were masked out). Other cells remain negatives, because a match is searched among all cells of a scan.

Deviations:
    * The positive of a voxel is the other crop's embedding at the exact place, interpolated. In the code it is the embedding
      of the nearest voxel, up to 5 mm (fine) or 25 mm (coarse) away.
    * Negatives are farther from the query than the length of a cell, instead of 3 mm and 5 mm: with interpolated positives,
      nearer cells are part of the positive. They are left out before the hardest negatives are chosen; the code sets their
      similarity to 0, which may outrank true negatives.
    * To rank fine cells, coarse similarities are interpolated instead of coarse embeddings. This is for ranking only.
    * Crops always overlap. In the code, a fifth of the pairs do not, and each voxel is then its own positive.
    * Crops lie in the stage's patch at the plan's spacing and cover a third of it or more. They are rotated by up to 10 degrees
      (none in the code) and never flipped, because left and right are different places.
    * Optimizer: SGD with a learning rate of 0.02 in the code; here AdamW.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.distributed import gather_with_gradient, rank
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_of_similarities
from nnssl.losses.negatives import draw_hard_negatives
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput, trained_parameters
from nnssl.methods.settings import (
    Count,
    CropFraction,
    Positive,
    PositiveShare,
    RotationDeg,
    Share,
    TrainingSettings,
    TwoOrMore,
    WholeNumber,
    changes_in_common,
    rotation_within,
)
from nnssl.networks.anatomical_embedding import AnatomicalEmbedding, EmbeddingKind, Embeddings
from nnssl.networks.dense import ENCODER, decoder_parts, trained_up_to_level
from nnssl.networks.pieces import in_pieces, recompute_stages
from nnssl.plan import StageConfiguration
from nnssl.schema import STRICT
from nnssl.views.cells import PlacedCells, Queries, draw_queries, far_enough, place_cells
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.learnable import mask_of_patches
from nnssl.views.overlap import draw_overlapping
from nnssl.views.points import interpolate_at
from nnssl.views.spatial import AffineParams, AffineRange, apply_affine, check_affine, pick

KINDS: tuple[EmbeddingKind, EmbeddingKind] = ("fine", "coarse")


@dataclass(frozen=True)
class SAMSettings:
    """Settings of the stage. Sources of the defaults: the authors' code [C], recommended here [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Positive = 0.5  # [C]
    dimensions: TwoOrMore = 128  # [C]
    fine_stage: WholeNumber = 1  # [C] half the resolution
    coarse_stage: Count = 4  # [C] a sixteenth
    fine_queries: Count = 100  # [C]
    """Number of queries in each view."""
    fine_pool: Count = 2000  # [C]
    """Number of hardest cells of both views from which the negatives are drawn."""
    fine_negatives: Count = 500  # [C]
    coarse_queries: Count = 50  # [R]; 8 in the first view in the code
    coarse_pool: Count = 250  # [C]
    coarse_negatives: Count = 200  # [C]
    other_negatives: WholeNumber = 300  # [C]
    """Number of coarse cells of other patches of the batch that serve as negatives."""
    body_share: Share = 0.9  # [R]
    """Share of the queries that lie in the brighter part of the patch."""
    crop_fraction: CropFraction = (0.3, 1.0)
    """[C]: scales of 0.8 to 1.2. As a share of the patch's volume, this is the cube of their ratio."""
    least_overlap: PositiveShare = 0.3  # [R]
    rotation_deg: RotationDeg = (10.0,)  # [R]; none in the code
    intensity_views: tuple[str, ...] = ("contrast", "brightness", "noise", "blur")  # [R]; blur and noise in the code


@dataclass(frozen=True)
class PlacedViews:
    """Two crops of each patch, and the places at which their embeddings are compared.

    Attributes:
        first: First crop (batch, channel, *shape).
        second: Second crop, of the same shape.
        params: Positions of the two crops in the patch.
        fine: Queries of each view for the fine embeddings.
        coarse: Queries of each view for the coarse embeddings.
        seeds: Random seed of each sample for the choice of negatives.
    """

    first: Float[Tensor, "batch channel *shape"]
    second: Float[Tensor, "batch channel *shape"]
    params: tuple[AffineParams, AffineParams]
    fine: tuple[Queries, Queries]
    coarse: tuple[Queries, Queries]
    seeds: tuple[int, ...]


class Pair(NamedTuple):
    """Both crops of one sample.

    Attributes:
        maps: Embeddings of each crop (1, dimension, *grid), by kind of embedding.
        params: Position of each crop in the patch, one record each.
        queries: Queries of each crop, by kind of embedding.
        cells: Cells of both crops, by kind of embedding.
        place: Index of the sample in the batch of all processes.
        seed: Random seed for the choice of negatives.
    """

    maps: dict[EmbeddingKind, tuple[Tensor, Tensor]]
    params: tuple[AffineParams, AffineParams]
    queries: dict[EmbeddingKind, tuple[Queries, Queries]]
    cells: dict[EmbeddingKind, PlacedCells]
    place: int
    seed: int


class Compared(NamedTuple):
    """Result of comparing the queries of one view of one sample.

    Attributes:
        losses: Loss of each query (query,).
        hits: Whether the positive is more similar to the query than every negative (query,).
        queries: Embeddings of the queries (query, dimension).
    """

    losses: Float[Tensor, " query"]
    hits: Bool[Tensor, " query"]
    queries: Float[Tensor, "query dimension"]


class SAM(PretextMethod):
    """Fine and coarse anatomical embeddings.

    Args:
        network: U-Net of the plan.
        settings: Resolved settings of the stage.
        configuration: The plan's pretext configuration.

    Raises:
        UserError: If the batch has one patch and none to compare it with, the network does not have the stages, or crops,
            rotations or intensity changes cannot be drawn.
    """

    defaults: ClassVar[SAMSettings] = SAMSettings(
        training=TrainingSettings(
            epochs=80,  # [R] with 250 steps each; their product is [C], 20,000 steps
            iterations_per_epoch=250,  # nnU-Net's
            batch_size=4,  # [C] 3 to 6 pairs of crops per GPU
            optimizer="adamw",  # [R]; SGD in the code
            learning_rate=1e-3,  # [R]
            momentum=(0.9, 0.999),  # [R] Adam's
            weight_decay=1e-4,  # [C]
            learning_rate_schedule="cosine",  # [R]; constant in the code
            warmup_epochs=2,  # [C] 500 steps
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: SAMSettings, configuration: StageConfiguration) -> None:
        super().__init__()
        check_settings(settings, len(network.encoder.output_channels))
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_level(network, settings.fine_stage)
        self.embedding = AnatomicalEmbedding(network, settings.fine_stage, settings.coarse_stage, settings.dimensions)
        if settings.training.checkpointing:
            recompute_stages(self)

    @classmethod
    def from_plan(cls, configuration: StageConfiguration) -> dict[str, Any]:
        """Return the plan's stages, rotation and intensity views."""
        return {
            "fine_stage": configuration.anatomy.fine_stage,
            "coarse_stage": configuration.anatomy.coarse_stage,
            "rotation_deg": rotation_within(configuration.rotation_deg, cls.defaults.rotation_deg),
            "intensity_views": changes_in_common(configuration.intensity_views, cls.defaults.intensity_views),
        }

    def make_views(
        self,
        volumes: Float[Tensor, "batch channel *shape"],
        generators: Sequence[torch.Generator],
        learnable: Bool[Tensor, " batch *shape"] | None = None,
    ) -> PlacedViews:
        """Return two crops of each patch and the places to compare: cells of each view that the other view shows too."""
        own, shape, channels = self.settings, volumes.shape[2:], volumes.shape[1]
        params = draw_overlapping(
            generators, affine_range(own), shape, self.configuration.spacing_mm, own.least_overlap
        )
        ranges = intensity_range(own)
        first, second = (
            apply_affine(apply_intensity(volumes, draw_intensity(generators, ranges, channels)), each)
            for each in params
        )
        kept = mask_of_patches(learnable, volumes)
        grids, counts = self.embedding.grids(shape), {"fine": own.fine_queries, "coarse": own.coarse_queries}
        fine, coarse = (
            (
                draw_queries(generators, first, *params, grids[kind], counts[kind], own.body_share, kept),
                draw_queries(generators, second, *params[::-1], grids[kind], counts[kind], own.body_share, kept),
            )
            for kind in KINDS
        )
        seeds = tuple(int(torch.randint(2**60, (1,), generator=each)) for each in generators)
        return PlacedViews(first, second, params, fine, coarse, seeds)

    def losses(self, views: PlacedViews, progress: float) -> StepOutput:
        """Return InfoNCE of the fine and of the coarse embeddings, each averaged over the queries."""
        samples = torch.arange(len(views.first))
        fine = in_pieces(
            partial(self._compare_fine, views), [views.first, views.second, samples], self.settings.training.pieces
        )
        maps = fine["coarse_first"], fine["coarse_second"]
        all_cells = gather_with_gradient(torch.cat([each.flatten(2) for each in maps], dim=2).transpose(1, 2))
        compared = self._compare_all("coarse", {"coarse": maps}, samples, views, all_cells)
        losses = {"fine": fine["losses"].mean(), "coarse": torch.cat([each.losses for each in compared]).mean()}
        hits = {"fine": fine["hits"], "coarse": torch.cat([each.hits for each in compared])}
        monitors = {f"head_{kind}_top1": each.float().mean() for kind, each in hits.items()}
        return StepOutput(losses, fine["queries"].detach(), monitors)

    def _compare_fine(self, views: PlacedViews, first: Tensor, second: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """Return what comparing the fine embeddings of some samples gives, and their coarse embeddings.

        Fine embeddings are compared within a scan only, so those of the whole batch never exist at once.

        Args:
            views: Views of the step.
            first: First crops of the samples.
            second: Second crops.
            samples: Indices of the samples in the batch.
        """
        embedded = self.embedding(torch.cat([first, second]))
        one, other = (Embeddings(*each) for each in zip(*(each.split(len(first)) for each in embedded), strict=True))
        maps: dict[EmbeddingKind, tuple[Tensor, Tensor]] = {
            "fine": (one.fine, other.fine),
            "coarse": (one.coarse, other.coarse),
        }
        compared = self._compare_all("fine", maps, samples, views)
        return {
            "losses": torch.cat([each.losses for each in compared]),
            "hits": torch.cat([each.hits for each in compared]),
            "queries": torch.cat([each.queries for each in compared[::2]]),  # of the first view
            "coarse_first": one.coarse,
            "coarse_second": other.coarse,
        }

    def _compare_all(
        self,
        kind: EmbeddingKind,
        maps: dict[EmbeddingKind, tuple[Tensor, Tensor]],
        samples: Tensor,
        views: PlacedViews,
        all_cells: Tensor | None = None,
    ) -> list[Compared]:
        """Compare the queries of samples, first view first; see ``Pair`` and ``_compare`` for the arguments."""
        compared = []
        for place, sample in enumerate(samples.tolist()):
            own = {each: (one[place : place + 1], other[place : place + 1]) for each, (one, other) in maps.items()}
            pair = self._pair(sample, own, views)
            cells = torch.cat([each[0].movedim(0, -1).flatten(0, -2) for each in pair.maps[kind]])
            compared += [self._compare(kind, view, pair, cells, all_cells) for view in (0, 1)]
        return compared

    def _pair(self, sample: int, maps: dict[EmbeddingKind, tuple[Tensor, Tensor]], views: PlacedViews) -> Pair:
        """Return both crops of one sample, with the embeddings that are given."""
        shape, device = views.first.shape[2:], views.first.device
        chosen = slice(sample, sample + 1)
        params = (pick(views.params[0], torch.tensor([sample])), pick(views.params[1], torch.tensor([sample])))
        queries: dict[EmbeddingKind, tuple[Queries, Queries]] = {}
        for kind in maps:
            mine, theirs = (Queries(*(each[chosen] for each in drawn)) for drawn in getattr(views, kind))
            queries[kind] = (mine, theirs)
        grids = self.embedding.grids(shape)
        cells = {kind: place_cells(params, grids[kind], shape, device) for kind in maps}
        place = rank() * len(views.first) + sample
        return Pair(maps, params, queries, cells, place, views.seeds[sample])

    def _compare(
        self,
        kind: EmbeddingKind,
        view: int,
        pair: Pair,
        cells: Float[Tensor, "cell dimension"],
        all_cells: Float[Tensor, "patch coarse_cell dimension"] | None,
    ) -> Compared:
        """Compare the queries of one view with their positives and negatives.

        Args:
            kind: Kind of embedding.
            view: Index of the view, 0 or 1.
            pair: Both crops of a sample.
            cells: Embeddings of the cells of both crops.
            all_cells: Coarse embeddings of the cells of all patches of all processes; not used by the fine kind.
        """
        own, shape = self.settings, pair.params[0].shape
        here, there, valid = pair.queries[kind][view]
        query = read_unit_vectors(pair.maps[kind][view], here, shape)
        positive = read_unit_vectors(pair.maps[kind][1 - view], there, shape)
        generator = torch.Generator(cells.device).manual_seed(pair.seed + 2 * view + (kind == "coarse"))
        allowed = far_enough(here[0], pair.params[view], pair.cells[kind])
        with torch.autocast(query.device.type, enabled=False):
            # one product with all cells: copies of the chosen ones for every query would cost far more
            similarity, right = query.float() @ cells.float().T, (query.float() * positive.float()).sum(dim=1)
            if kind == "fine":
                ranking = similarity.detach() + coarse_ranking(here, view, pair)
                chosen, present = draw_hard_negatives(ranking, allowed, own.fine_pool, own.fine_negatives, generator)
                wrong = similarity.gather(1, chosen)
            else:
                assert all_cells is not None
                pool, count = own.coarse_pool, own.coarse_negatives
                chosen, present = draw_hard_negatives(similarity.detach(), allowed, pool, count, generator)
                foreign = torch.cat([all_cells[: pair.place], all_cells[pair.place + 1 :]]).flatten(0, 1)
                numbers = torch.rand(len(foreign), generator=generator, device=cells.device)
                drawn = numbers.argsort()[: own.other_negatives]
                wrong = torch.cat([similarity.gather(1, chosen), query.float() @ foreign[drawn].float().T], dim=1)
                present = torch.cat([present, present.new_ones(len(query), len(drawn))], dim=1)
        losses = info_nce_of_similarities(right, wrong, present, own.temperature)
        best = wrong.detach().masked_fill(~present, -torch.inf).amax(dim=1)
        return Compared(losses * valid[0], right.detach() > best, query)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, the decoder up to the fine embeddings, and both heads; all have weight decay."""
        return [ParameterGroup(trained_parameters(self))]

    def exported(self) -> Exported:
        """Return the encoder and the decoder stages from which the fine embeddings are computed."""
        parts = decoder_parts(self.network, self.settings.fine_stage)
        return Exported(pretrained=(*ENCODER, *(f"{part}." for part in parts)))


def check_settings(settings: SAMSettings, stages: int) -> None:
    """Check that there are patches to compare and stages to read.

    Args:
        settings: Settings of the stage.
        stages: Number of encoder stages of the network.

    Raises:
        UserError: If the batch has one patch, or the network does not have the two stages in this order.
    """
    if settings.training.batch_size < 2 and settings.other_negatives:
        raise UserError(
            "batch_size must be at least 2, got 1: coarse embeddings are compared with other patches of the batch; "
            "set batch_size=2"
        )
    if not settings.fine_stage < settings.coarse_stage:
        raise UserError(f"fine_stage must be below coarse_stage={settings.coarse_stage}, got {settings.fine_stage}")
    if not settings.coarse_stage < stages:
        raise UserError(
            f"coarse_stage must be at most {stages - 1}, the last encoder stage of the network, got {settings.coarse_stage}"
        )


def affine_range(settings: SAMSettings) -> AffineRange:
    """Return the range of crops and rotations; there are no flips."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg)


def intensity_range(settings: SAMSettings) -> IntensityRange:
    """Return the intensity changes named in the settings, with the default ranges of ``IntensityRange``."""
    return restrict_to(IntensityRange(), settings.intensity_views)


def read_unit_vectors(
    maps: Float[Tensor, "1 dimension *grid"], points_vox: Float[Tensor, "1 points d"], shape: Sequence[int]
) -> Float[Tensor, "points dimension"]:
    """Return embeddings of one sample interpolated between its cells and normalised again to unit norm."""
    return F.normalize(interpolate_at(maps, points_vox, shape)[0], dim=1)


@torch.no_grad()
def coarse_ranking(here: Float[Tensor, "1 query d"], view: int, pair: Pair) -> Float[Tensor, "query cell"]:
    """Return the coarse similarity of a view's queries to the fine cells of both views."""
    shape = pair.params[0].shape
    query = read_unit_vectors(pair.maps["coarse"][view], here, shape)
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    found = []
    for coarse, fine in zip(pair.maps["coarse"], pair.maps["fine"], strict=True):
        similarity = torch.einsum("qd,d...->q...", query, coarse[0])[None]
        found.append(F.interpolate(similarity, fine.shape[2:], mode=mode, align_corners=False)[0].flatten(1))
    return torch.cat(found, dim=1)
