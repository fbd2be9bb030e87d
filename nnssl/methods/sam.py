"""SAM: every voxel of a scan learns where in the body it is, from pairs of crops of one scan.

Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in Radiological Images, TMI 2022, and
the authors' code (alibaba-damo-academy/self-supervised-anatomical-embedding-v2).

Two crops of a patch at scales and angles of their own. A voxel's embedding in one crop has to be more like that of the same
place in the other than like those of other places: a fine embedding, whose negatives are hard ones by both embeddings,
and a coarse one, with negatives of the same scan and of other scans. ``nnssl.matching`` finds points in other scans with them.

Deviations:
    * The positive of a voxel is the other crop's embedding at the very place, interpolated; in the code it is the nearest
      voxel's, up to 5 mm (fine) or 25 mm (coarse) away.
    * Cells within the length of one cell of a query are no negatives, instead of 3 mm and 5 mm: with interpolated positives they
      are part of the positive. What is not allowed is left out before the hardest are chosen; the code sets its
      similarity to 0, which may outrank true negatives.
    * For ranking alone, the coarse similarity at a fine cell is interpolated between coarse cells, not made of interpolated
      embeddings.
    * Crops always overlap; the code also has pairs that do not, a fifth, with each voxel its own positive.
    * Crops lie in the plan's patch at the plan's spacing and cover a third of it or more. They may be turned by up to 10 degrees
      (none in the code); never flipped, since left and right are different places.
    * Optimizer: SGD with a rate of 0.02 in the code; here AdamW.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.distributed import gather_with_gradient, rank
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_with_negatives
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
from nnssl.plan import PretextConfiguration
from nnssl.schema import STRICT
from nnssl.views.cells import PlacedCells, Queries, draw_queries, far_enough, place_cells
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.overlap import draw_overlapping
from nnssl.views.points import interpolate_at
from nnssl.views.spatial import AffineParams, AffineRange, apply_affine, check_affine, pick

KINDS: tuple[EmbeddingKind, EmbeddingKind] = ("fine", "coarse")


@dataclass(frozen=True)
class SAMSettings:
    """The paper's numbers [P], those of the authors' code [C], or recommended ones [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Positive = 0.5  # [P]
    dimensions: TwoOrMore = 128  # [P]
    fine_stage: WholeNumber = 1  # [P] half the resolution
    coarse_stage: Count = 4  # [P] a sixteenth
    fine_queries: Count = 100  # [C]
    """Of each view."""
    fine_pool: Count = 2000  # [C]
    """Hardest cells of both views from which negatives are drawn."""
    fine_negatives: Count = 500  # [P]
    coarse_queries: Count = 50  # [R]
    coarse_pool: Count = 250  # [C]
    coarse_negatives: Count = 200  # [C]
    other_negatives: WholeNumber = 300  # [C]
    """Coarse cells of other patches of the batch."""
    body_share: Share = 0.9  # [R]
    """Share of the queries that lie in the brighter part of the patch."""
    crop_fraction: CropFraction = (0.3, 1.0)
    """[C]: scales of 0.8 to 1.2; share of the patch's volume, so the cube of their ratio."""
    least_overlap: PositiveShare = 0.3  # [R]
    rotation_deg: RotationDeg = (10.0,)  # [R]; none in the code
    intensity_views: tuple[str, ...] = ("contrast", "brightness", "noise", "blur")  # [R]; blur and noise in the code


@dataclass(frozen=True)
class PlacedViews:
    """Two crops of each patch, and the places where their embeddings are compared.

    Attributes:
        first: (batch, channel, *shape).
        second: the other crop.
        params: where the crops lie.
        fine: the queries of each view.
        coarse: the same for the coarse embeddings.
        seeds: one per sample, of the choice of negatives.
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
        maps: of each crop, (1, dimension, *grid).
        params: where each crop lies, one record.
        queries: of each crop, by kind of embedding.
        cells: of both crops, by kind.
        place: of the sample in the batch of all processes.
        seed: of the choice of negatives.
    """

    maps: tuple[Embeddings, Embeddings]
    params: tuple[AffineParams, AffineParams]
    queries: dict[EmbeddingKind, tuple[Queries, Queries]]
    cells: dict[EmbeddingKind, PlacedCells]
    place: int
    seed: int


class Compared(NamedTuple):
    """What became of the queries of one view of one sample.

    Attributes:
        losses: (query,).
        hits: (query,), whether the positive is more like the query than all negatives.
        queries: (query, dimension), their embeddings.
    """

    losses: Float[Tensor, " query"]
    hits: Bool[Tensor, " query"]
    queries: Float[Tensor, "query dimension"]


class SAM(PretextMethod):
    """Fine and coarse anatomical embeddings.

    Args:
        network: the plan's U-Net.
        settings: resolved.
        configuration: the plan's pretext configuration.

    Raises:
        UserError: a batch of one patch, which has no others to compare with; stages that the network does not have; or crops,
            rotations or intensity changes that cannot be drawn.
    """

    defaults: ClassVar[SAMSettings] = SAMSettings(
        training=TrainingSettings(
            epochs=80,  # [C] 20,000 steps
            iterations_per_epoch=250,
            batch_size=4,  # [C]
            optimizer="adamw",  # [R]; SGD in the code
            learning_rate=1e-3,  # [R]
            momentum=(0.9, 0.999),
            weight_decay=1e-4,  # [C]
            learning_rate_schedule="cosine",  # [R]; constant in the code
            warmup_epochs=2,  # [C] 500 steps
            gradient_clip=12.0,  # nnU-Net's
        )
    )

    def __init__(self, network: Any, settings: SAMSettings, configuration: PretextConfiguration) -> None:
        super().__init__()
        check_settings(settings, len(network.encoder.output_channels))
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        self.network = trained_up_to_level(network, settings.fine_stage)
        self.embedding = AnatomicalEmbedding(network, settings.fine_stage, settings.coarse_stage, settings.dimensions)

    @classmethod
    def from_plan(cls, configuration: PretextConfiguration) -> dict[str, Any]:
        """Return stages, rotation and intensity views as the plan has them."""
        return {
            "fine_stage": configuration.anatomy.fine_stage,
            "coarse_stage": configuration.anatomy.coarse_stage,
            "rotation_deg": rotation_within(configuration.rotation_deg, cls.defaults.rotation_deg),
            "intensity_views": changes_in_common(configuration.intensity_views, cls.defaults.intensity_views),
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> PlacedViews:
        """Return two crops of each patch and the places that are compared: cells of each view that the other shows too."""
        own, shape, channels = self.settings, volumes.shape[2:], volumes.shape[1]
        params = draw_overlapping(
            generators, affine_range(own), shape, self.configuration.spacing_mm, own.least_overlap
        )
        ranges = intensity_range(own)
        first, second = (
            apply_affine(apply_intensity(volumes, draw_intensity(generators, ranges, channels)), each)
            for each in params
        )
        grids, counts = self.embedding.grids(shape), {"fine": own.fine_queries, "coarse": own.coarse_queries}
        fine, coarse = (
            (
                draw_queries(generators, first, *params, grids[kind], counts[kind], own.body_share),
                draw_queries(generators, second, *params[::-1], grids[kind], counts[kind], own.body_share),
            )
            for kind in KINDS
        )
        seeds = tuple(int(torch.randint(2**60, (1,), generator=each)) for each in generators)
        return PlacedViews(first, second, params, fine, coarse, seeds)

    def losses(self, views: PlacedViews, progress: float) -> StepOutput:
        """Return the contrast of the fine and of the coarse embeddings, means over the queries."""
        count = len(views.first)
        maps = self.embedding(torch.cat([views.first, views.second]))
        first, second = (Embeddings(*each) for each in zip(*(each.split(count) for each in maps), strict=True))
        coarse_cells = torch.cat([each.coarse.flatten(2) for each in (first, second)], dim=2).transpose(1, 2)
        all_cells = gather_with_gradient(coarse_cells)  # (patch of all processes, cell, dimension)
        compared: dict[EmbeddingKind, list[Compared]] = {kind: [] for kind in KINDS}
        for sample in range(count):
            pair = self._pair(sample, (first, second), views)
            for kind in KINDS:
                cells = torch.cat([getattr(each, kind)[0].flatten(1) for each in pair.maps], dim=1).T
                compared[kind] += [self._compare(kind, view, pair, cells, all_cells) for view in (0, 1)]
        losses = {str(kind): torch.cat([each.losses for each in found]).mean() for kind, found in compared.items()}
        monitors = {
            f"{kind}_top1": torch.cat([each.hits for each in found]).float().mean() for kind, found in compared.items()
        }
        queries = torch.cat([each.queries for each in compared["fine"][::2]])  # of the first view
        return StepOutput(losses, queries.detach(), monitors)

    def _pair(self, sample: int, maps: tuple[Embeddings, Embeddings], views: PlacedViews) -> Pair:
        """Return both crops of one sample."""
        shape, device = views.first.shape[2:], views.first.device
        chosen = slice(sample, sample + 1)
        one, other = (Embeddings(*(each[chosen] for each in embeddings)) for embeddings in maps)
        params = (pick(views.params[0], torch.tensor([sample])), pick(views.params[1], torch.tensor([sample])))
        queries: dict[EmbeddingKind, tuple[Queries, Queries]] = {}
        for kind in KINDS:
            mine, theirs = (Queries(*(each[chosen] for each in drawn)) for drawn in getattr(views, kind))
            queries[kind] = (mine, theirs)
        cells = {kind: place_cells(params, grid, shape, device) for kind, grid in self.embedding.grids(shape).items()}
        place = rank() * len(views.first) + sample
        return Pair((one, other), params, queries, cells, place, views.seeds[sample])

    def _compare(
        self,
        kind: EmbeddingKind,
        view: int,
        pair: Pair,
        cells: Float[Tensor, "cell dimension"],
        all_cells: Float[Tensor, "patch coarse_cell dimension"],
    ) -> Compared:
        """Compare the queries of one view with their positives and negatives.

        Args:
            kind: of embedding.
            view: 0 or 1.
            pair: both crops of a sample.
            cells: embeddings of the cells of both crops.
            all_cells: coarse embeddings of the cells of all patches of all processes.
        """
        own, shape = self.settings, pair.params[0].shape
        here, there, valid = pair.queries[kind][view]
        query = read_unit_vectors(getattr(pair.maps[view], kind), here, shape)
        positive = read_unit_vectors(getattr(pair.maps[1 - view], kind), there, shape)
        generator = torch.Generator(cells.device).manual_seed(pair.seed + 2 * view + (kind == "coarse"))
        allowed = far_enough(here[0], pair.params[view], pair.cells[kind])
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            ranking = query.float() @ cells.float().T
        if kind == "fine":
            ranking += coarse_ranking(here, view, pair)
            chosen, present = draw_hard_negatives(ranking, allowed, own.fine_pool, own.fine_negatives, generator)
            negatives = cells[chosen]
        else:
            chosen, present = draw_hard_negatives(ranking, allowed, own.coarse_pool, own.coarse_negatives, generator)
            foreign = torch.cat([all_cells[: pair.place], all_cells[pair.place + 1 :]]).flatten(0, 1)
            drawn = torch.rand(len(foreign), generator=generator, device=cells.device).argsort()[: own.other_negatives]
            negatives = torch.cat([cells[chosen], foreign[drawn].expand(len(query), -1, -1)], dim=1)
            present = torch.cat([present, present.new_ones(len(query), len(drawn))], dim=1)
        losses = info_nce_with_negatives(query, positive, negatives, present, own.temperature)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            asked = query.float()
            best = (negatives.float() @ asked[:, :, None])[..., 0].masked_fill(~present, -torch.inf).amax(dim=1)
            hits = (asked * positive.float()).sum(dim=1) > best
        return Compared(losses * valid[0], hits, query)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, the decoder up to the fine embeddings, and both heads; all decay."""
        return [ParameterGroup(trained_parameters(self))]

    def exported(self) -> Exported:
        """Return the encoder and the decoder's stages that the fine embeddings are made of."""
        parts = decoder_parts(self.network, self.settings.fine_stage)
        return Exported(pretrained=(*ENCODER, *(f"{part}." for part in parts)))


def check_settings(settings: SAMSettings, stages: int) -> None:
    """Check that there are patches to compare, and stages to read.

    Raises:
        UserError: a batch of one, or stages that a network of so many does not have in this order.
    """
    if settings.training.batch_size < 2 and settings.other_negatives:
        raise UserError(
            "batch_size=1: coarse embeddings are compared with other patches of the batch; --set batch_size=2"
        )
    if not settings.fine_stage < settings.coarse_stage < stages:
        raise UserError(
            f"fine_stage={settings.fine_stage} coarse_stage={settings.coarse_stage}: the network has stages 0 to {stages - 1}, "
            "and the fine one comes first"
        )


def affine_range(settings: SAMSettings) -> AffineRange:
    """Return what crops and rotations are drawn from; nothing is flipped."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg)


def intensity_range(settings: SAMSettings) -> IntensityRange:
    """Return the intensity changes of the settings, as the views' defaults have them."""
    return restrict_to(IntensityRange(), settings.intensity_views)


def read_unit_vectors(
    maps: Float[Tensor, "1 dimension *grid"], points_vox: Float[Tensor, "1 points d"], shape: Sequence[int]
) -> Float[Tensor, "points dimension"]:
    """Return embeddings of one sample between its cells, brought back to unit norm."""
    return F.normalize(interpolate_at(maps, points_vox, shape)[0], dim=1)


@torch.no_grad()
def coarse_ranking(here: Float[Tensor, "1 query d"], view: int, pair: Pair) -> Float[Tensor, "query cell"]:
    """Return the coarse similarity of the queries of a view to the fine cells of both views."""
    shape = pair.params[0].shape
    query = read_unit_vectors(pair.maps[view].coarse, here, shape)
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    found = []
    for each in pair.maps:
        similarity = torch.einsum("qd,d...->q...", query, each.coarse[0])[None]
        found.append(F.interpolate(similarity, each.fine.shape[2:], mode=mode, align_corners=False)[0].flatten(1))
    return torch.cat(found, dim=1)
