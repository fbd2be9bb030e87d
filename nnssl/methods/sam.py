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
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from nnssl.distributed import gather_with_gradient, rank
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_with_negatives
from nnssl.losses.negatives import draw_hard_negatives
from nnssl.methods.protocol import Exported, ParameterGroup, PretextMethod, StepOutput
from nnssl.methods.settings import TrainingSettings
from nnssl.networks.anatomical_embedding import AnatomicalEmbedding, Embeddings, cell_centres_vox
from nnssl.schema import STRICT
from nnssl.views.intensity import IntensityRange, apply_intensity, check_intensity, draw_intensity, restrict_to
from nnssl.views.points import draw_points, foreground_mask, interpolate_at
from nnssl.views.spatial import (
    AffineParams,
    AffineRange,
    apply_affine,
    check_affine,
    draw_overlapping,
    map_points,
    pick,
)

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class SAMSettings:
    """The paper's numbers [P], those of the authors' code [C], or recommended ones [R]."""

    __pydantic_config__: ClassVar = STRICT

    training: TrainingSettings
    temperature: Positive = 0.5  # [P]
    dimensions: Annotated[int, Field(ge=2)] = 128  # [P]
    fine_stage: Annotated[int, Field(ge=0)] = 1  # [P] half the resolution
    coarse_stage: Annotated[int, Field(ge=1)] = 4  # [P] a sixteenth
    fine_queries: Count = 100  # [C]
    """Of each view."""
    fine_pool: Count = 2000  # [C]
    """Hardest cells of both views from which negatives are drawn."""
    fine_negatives: Count = 500  # [P]
    coarse_queries: Count = 50  # [R]
    coarse_pool: Count = 250  # [C]
    coarse_negatives: Count = 200  # [C]
    other_negatives: Annotated[int, Field(ge=0)] = 300  # [C]
    """Coarse cells of other patches of the batch."""
    body_share: Share = 0.9  # [R]
    """Share of the queries that lie in the brighter part of the patch."""
    crop_fraction: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.3, 1.0)
    """[C]: scales of 0.8 to 1.2; share of the patch's volume, so the cube of their ratio."""
    least_overlap: Annotated[float, Field(gt=0, le=1)] = 0.3  # [R]
    rotation_deg: tuple[Annotated[float, Field(ge=0, le=180)], ...] = (10.0,)  # [R]; none in the code
    intensity_views: tuple[str, ...] = ("contrast", "brightness", "noise", "blur")  # [R]; blur and noise in the code


class Queries(NamedTuple):
    """Places in one view that are looked for in the other; zyx in voxels.

    Attributes:
        here: (batch, query, d), centres of cells of this view.
        there: the same places in the other view.
        valid: (batch, query), 0 where two crops have no cell in common, else 1.
    """

    here: Float[Tensor, "batch query d"]
    there: Float[Tensor, "batch query d"]
    valid: Float[Tensor, "batch query"]


class Cells(NamedTuple):
    """The cells of both views of one sample.

    Attributes:
        embeddings: (cell, dimension).
        places_mm: (cell, d), in the patch that the views are crops of.
        shown: cells that show the patch; others lie outside it.
        cell_mm: length of a cell.
    """

    embeddings: Float[Tensor, "cell dimension"]
    places_mm: Float[Tensor, "cell d"]
    shown: Bool[Tensor, " cell"]
    cell_mm: float


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


class SAM(PretextMethod):
    """Fine and coarse anatomical embeddings.

    Args:
        network: the plan's U-Net.
        settings: resolved.
        configuration: the plan's pretext configuration.

    Raises:
        UserError: a batch of one patch, which has no others to compare with; or stages that the network does not have.
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

    def __init__(self, network: Any, settings: SAMSettings, configuration: Any) -> None:
        super().__init__()
        check_settings(settings, len(network.encoder.output_channels))
        check_affine(affine_range(settings), configuration.patch_size, configuration.spacing_mm)
        check_intensity(intensity_range(settings))
        self.settings = settings
        self.configuration = configuration
        network.requires_grad_(False)
        network.encoder.requires_grad_(True)
        for part in trained_decoder_parts(network, settings.fine_stage):
            network.get_submodule(part).requires_grad_(True)
        self.network = network
        self.embedding = AnatomicalEmbedding(network, settings.fine_stage, settings.coarse_stage, settings.dimensions)

    @classmethod
    def from_plan(cls, configuration: Any) -> dict[str, Any]:
        """Return stages, rotation and intensity views as the plan has them."""
        small, kept = 10.0, cls.defaults.intensity_views
        return {
            "fine_stage": configuration.anatomy.fine_stage,
            "coarse_stage": configuration.anatomy.coarse_stage,
            "rotation_deg": tuple(min(small, each) for each in configuration.rotation_deg),
            "intensity_views": tuple(name for name in configuration.intensity_views if name in kept),
        }

    def make_views(
        self, volumes: Float[Tensor, "batch channel *shape"], generators: Sequence[torch.Generator]
    ) -> PlacedViews:
        """Return two crops of each patch and the places that are compared."""
        grids = map_grids(self.network, self.settings, volumes.shape[2:])
        return make_placed_views(volumes, generators, self.settings, self.configuration.spacing_mm, *grids)

    def losses(self, views: PlacedViews, progress: float) -> StepOutput:
        """Return the contrast of the fine and of the coarse embeddings, means over the queries."""
        count = len(views.first)
        maps = self.embedding(torch.cat([views.first, views.second]))
        pair = [Embeddings(fine, coarse) for fine, coarse in zip(*(each.split(count) for each in maps), strict=True)]
        others = self._cells_of_all(pair)
        losses: dict[str, list[Tensor]] = {"fine": [], "coarse": []}
        hits: dict[str, list[Tensor]] = {"fine": [], "coarse": []}
        queries = []
        for sample in range(count):
            for kind in ("fine", "coarse"):
                cells = self._cells(kind, sample, pair, views)
                for view in (0, 1):
                    loss, hit, embedded = self._compare(kind, view, sample, pair, views, cells, others)
                    losses[kind].append(loss)
                    hits[kind].append(hit)
                    if kind == "fine" and view == 0:
                        queries.append(embedded)
        means = {kind: torch.cat(each).mean() for kind, each in losses.items()}
        monitors = {f"{kind}_top1": torch.cat(each).float().mean() for kind, each in hits.items()}
        return StepOutput(means, torch.cat(queries).detach(), monitors)

    def _cells_of_all(self, pair: Sequence[Embeddings]) -> Tensor:
        """Return the coarse cells of all patches of all processes, (patch, cell, dimension)."""
        cells = torch.cat([each.coarse.flatten(2) for each in pair], dim=2).transpose(1, 2)
        return gather_with_gradient(cells)

    def _cells(self, kind: str, sample: int, pair: Sequence[Embeddings], views: PlacedViews) -> Cells:
        """Return the cells of both views of one sample."""
        maps = [getattr(each, kind)[sample] for each in pair]
        embeddings = torch.cat([each.flatten(1) for each in maps], dim=1).T
        return Cells(embeddings, *self._places(sample, views, [each.shape[1:] for each in maps]))

    def _places(
        self, sample: int, views: PlacedViews, grids: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "cell d"], Bool[Tensor, " cell"], float]:
        """Return where the cells of both views lie in mm, which of them show the patch, and the length of a cell in mm."""
        shape, params = views.first.shape[2:], [pick(each, torch.tensor([sample])) for each in views.params]
        device = views.first.device
        spacing, last = (torch.tensor(each, device=device) for each in (self.configuration.spacing_mm, shape))
        centres = [
            map_points(cell_centres_vox(grid, shape, device)[None], each, "to_input")[0]
            for grid, each in zip(grids, params, strict=True)
        ]
        places = torch.cat(centres)
        shown = ((places >= 0) & (places <= last - 1)).all(dim=1)  # what lies outside the patch is empty
        cell_mm = max(mm * voxels / cells for mm, voxels, cells in zip(spacing.tolist(), shape, grids[0], strict=True))
        return places * spacing, shown, cell_mm

    def _compare(
        self,
        kind: str,
        view: int,
        sample: int,
        pair: Sequence[Embeddings],
        views: PlacedViews,
        both: Cells,
        others: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return for one sample the loss of a view's queries, which found their positive first, and their embeddings."""
        own, shape = self.settings, views.first.shape[2:]
        points, there, valid = (side[sample : sample + 1] for side in getattr(views, kind)[view])
        maps = [getattr(each, kind)[sample : sample + 1] for each in pair]
        query = read_unit_vectors(maps[view], points, shape)
        positive = read_unit_vectors(maps[1 - view], there, shape)
        cells = both.embeddings
        allowed = self._far_enough(points, view, sample, views, both.places_mm, both.shown, both.cell_mm)
        generator = torch.Generator(cells.device).manual_seed(views.seeds[sample] + 2 * view + (kind == "coarse"))
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            ranking = query.float() @ cells.float().T
        if kind == "fine":
            ranking += self._coarse_ranking(points, view, sample, pair, shape)
            chosen, present = draw_hard_negatives(ranking, allowed, own.fine_pool, own.fine_negatives, generator)
            negatives = cells[chosen]
        else:
            chosen, present = draw_hard_negatives(ranking, allowed, own.coarse_pool, own.coarse_negatives, generator)
            place = rank() * len(views.first) + sample
            foreign = torch.cat([others[:place], others[place + 1 :]]).flatten(0, 1)
            drawn = torch.rand(len(foreign), generator=generator, device=cells.device).argsort()[: own.other_negatives]
            negatives = torch.cat([cells[chosen], foreign[drawn].expand(len(query), -1, -1)], dim=1)
            present = torch.cat([present, present.new_ones(len(query), len(drawn))], dim=1)
        loss = info_nce_with_negatives(query, positive, negatives, present, own.temperature)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            asked = query.float()
            best = (negatives.float() @ asked[:, :, None])[..., 0].masked_fill(~present, -torch.inf).amax(dim=1)
            hit = (asked * positive.float()).sum(dim=1) > best
        return loss * valid[0], hit, query

    def _far_enough(
        self,
        points: Tensor,
        view: int,
        sample: int,
        views: PlacedViews,
        places_mm: Float[Tensor, "cell d"],
        shown: Bool[Tensor, " cell"],
        cell_mm: float,
    ) -> Bool[Tensor, "query cell"]:
        """Return which cells of both views lie farther from each query than the length of a cell, in mm."""
        spacing = torch.tensor(self.configuration.spacing_mm, device=points.device)
        params = pick(views.params[view], torch.tensor([sample]))
        place_mm = map_points(points, params, "to_input")[0] * spacing
        return (torch.cdist(place_mm, places_mm) > cell_mm) & shown

    @torch.no_grad()
    def _coarse_ranking(
        self, points: Tensor, view: int, sample: int, pair: Sequence[Embeddings], shape: Sequence[int]
    ) -> Float[Tensor, "query cell"]:
        """Return the coarse similarity of queries to the fine cells of both views."""
        maps = [each.coarse[sample : sample + 1] for each in pair]
        query = read_unit_vectors(maps[view], points, shape)
        mode = "trilinear" if len(shape) == 3 else "bilinear"
        found = []
        for each, target in zip(maps, pair, strict=True):
            similarity = torch.einsum("qd,d...->q...", query, each[0])[None]
            found.append(F.interpolate(similarity, target.fine.shape[2:], mode=mode, align_corners=False)[0].flatten(1))
        return torch.cat(found, dim=1)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return encoder, the decoder up to the fine embeddings, and both heads; all decay."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def exported(self) -> Exported:
        """Return the encoder and the decoder's stages that the fine embeddings are made of."""
        parts = trained_decoder_parts(self.network, self.settings.fine_stage)
        return Exported(pretrained=("encoder.", "decoder.encoder.", *(f"{part}." for part in parts)))


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


def trained_decoder_parts(network: Any, fine_stage: int) -> list[str]:
    """Return the names of the decoder's parts that a map of an encoder stage's resolution is made of."""
    count = len(network.decoder.stages) - fine_stage
    return [f"decoder.{kind}.{index}" for kind in ("transpconvs", "stages") for index in range(count)]


def map_grids(network: Any, settings: SAMSettings, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the cells of the fine and of the coarse map of a patch."""
    grid, grids = list(shape), []
    for stride in network.encoder.strides:
        steps = stride if isinstance(stride, (list, tuple)) else [stride] * len(shape)
        grid = [-(-cells // step) for cells, step in zip(grid, steps, strict=True)]
        grids.append(tuple(grid))
    return grids[settings.fine_stage], grids[settings.coarse_stage]


def make_placed_views(
    volumes: Float[Tensor, "batch channel *shape"],
    generators: Sequence[torch.Generator],
    settings: SAMSettings,
    spacing_mm: Sequence[float],
    fine_grid: Sequence[int],
    coarse_grid: Sequence[int],
) -> PlacedViews:
    """Return two crops of each patch and the places that are compared: cells of each view that the other shows too.

    Args:
        volumes: raw patches.
        generators: one per sample.
        settings: of the method.
        spacing_mm: of the patches' voxels.
        fine_grid: cells of the fine map.
        coarse_grid: cells of the coarse map.
    """
    shape, channels = volumes.shape[2:], volumes.shape[1]
    params = draw_overlapping(generators, affine_range(settings), shape, spacing_mm, settings.least_overlap)
    intensity = intensity_range(settings)
    views = [
        apply_affine(apply_intensity(volumes, draw_intensity(generators, intensity, channels)), each) for each in params
    ]
    queries: dict[str, list[Queries]] = {"fine": [], "coarse": []}
    for kind, grid, count in (
        ("fine", fine_grid, settings.fine_queries),
        ("coarse", coarse_grid, settings.coarse_queries),
    ):
        for view, (here, there) in enumerate((params, params[::-1])):
            body: Any = F.adaptive_avg_pool3d if len(shape) == 3 else F.adaptive_avg_pool2d
            bright = body(foreground_mask(views[view]).float()[:, None], tuple(grid))[:, 0] > 0.5
            centres = cell_centres_vox(grid, shape, volumes.device).expand(len(volumes), -1, -1)
            in_patch = map_points(centres, here, "to_input")
            reached = map_points(in_patch, there, "to_output")
            last = torch.tensor(shape, device=volumes.device) - 1
            shown = ((in_patch >= 0) & (in_patch <= last) & (reached >= 0) & (reached <= last)).all(dim=2)
            cells = draw_points(generators, shown.unflatten(1, tuple(grid)), bright, count, settings.body_share)
            flat = torch.zeros_like(cells[..., 0])
            for axis, length in enumerate(grid):
                flat = flat * length + cells[..., axis]
            index = flat[..., None].expand(-1, -1, len(shape))
            valid = shown.gather(1, flat).float()
            queries[kind].append(Queries(centres.gather(1, index), reached.gather(1, index), valid))
    seeds = tuple(int(torch.randint(2**60, (1,), generator=each)) for each in generators)
    fine, coarse = ((each[0], each[1]) for each in (queries["fine"], queries["coarse"]))
    return PlacedViews(views[0], views[1], params, fine, coarse, seeds)


def read_unit_vectors(
    maps: Float[Tensor, "1 dimension *grid"], points_vox: Float[Tensor, "1 points d"], shape: Sequence[int]
) -> Float[Tensor, "points dimension"]:
    """Return embeddings of one sample between its cells, brought back to unit norm."""
    return F.normalize(interpolate_at(maps, points_vox, shape)[0], dim=1)


def affine_range(settings: SAMSettings) -> AffineRange:
    """Return what crops and rotations are drawn from; nothing is flipped."""
    return AffineRange(settings.crop_fraction, settings.rotation_deg, (), 0.0)


def intensity_range(settings: SAMSettings) -> IntensityRange:
    """Return the intensity changes of the settings, as the views' defaults have them."""
    return restrict_to(IntensityRange(), settings.intensity_views)
