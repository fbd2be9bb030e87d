"""Cells of the maps of two crops of a patch: their positions, and the choice of cells that serve as queries.

A cell is one position of a map of lower resolution that covers its crop.

Source: Yan et al., SAM, TMI 2022, section III-B (queries are cells that both crops show).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.views.learnable import mask_at_points
from nnssl.views.overlap import map_across
from nnssl.views.points import are_inside, brighter_part, cell_centres_vox, draw_points, place_of
from nnssl.views.spatial import AffineParams, map_points


class Queries(NamedTuple):
    """Places in one crop whose counterparts in the other crop are compared with them; zyx in voxels.

    Attributes:
        here: Centres of cells of this crop (batch, query, d).
        there: Positions of the same places in the other crop.
        valid: Validity of each query (batch, query): 0 if no cell can be drawn, otherwise 1.
    """

    here: Float[Tensor, "batch query d"]
    there: Float[Tensor, "batch query d"]
    valid: Float[Tensor, "batch query"]


class PlacedCells(NamedTuple):
    """Positions of the cells of crops in their patch, one crop after the other.

    Attributes:
        places_mm: Positions (batch, cell, d) in mm, from the centre of the patch's first voxel.
        shown: Whether the cell shows the patch (batch, cell); other cells lie outside the patch and are empty.
        cell_mm: Length of a cell along its longest axis, in mm.
    """

    places_mm: Float[Tensor, "batch cell d"]
    shown: Bool[Tensor, "batch cell"]
    cell_mm: float


def draw_queries(
    generators: Sequence[torch.Generator],
    volumes: Float[Tensor, "batch channel *shape"],
    own: AffineParams,
    other: AffineParams,
    grid: Sequence[int],
    count: int,
    body_share: float,
    learnable: Bool[Tensor, " batch *shape"],
) -> Queries:
    """Draw cells of a crop that the other crop shows too and that may be learned from.

    Args:
        generators: One generator per sample.
        volumes: Crops whose cells are drawn.
        own: Positions of these crops in their patches.
        other: Positions of the other crops of the same patches.
        grid: Number of cells along each axis.
        count: Number of cells per sample; if fewer are shown, they are repeated.
        body_share: Share of the cells that are drawn from the brighter part, 0 to 1.
        learnable: Mask of the voxels of the patches that may be learned from; the voxel nearest to a cell's centre decides.
    """
    shape = volumes.shape[2:]
    pool: Any = F.adaptive_avg_pool3d if len(shape) == 3 else F.adaptive_avg_pool2d
    bright = pool(brighter_part(volumes).float()[:, None], tuple(grid))[:, 0] > 0.5
    centres = cell_centres_vox(grid, shape, volumes.device).expand(len(volumes), -1, -1)
    places, there = map_across(centres, own, other)
    shown = are_inside(places, shape) & are_inside(there, shape) & mask_at_points(learnable, places)
    cells = draw_points(generators, shown.unflatten(1, tuple(grid)), count, bright, body_share)
    chosen = place_of(cells, grid)
    index = chosen[..., None].expand(-1, -1, len(shape))
    return Queries(centres.gather(1, index), there.gather(1, index), shown.gather(1, chosen).float())


def place_cells(
    crops: Sequence[AffineParams], grid: Sequence[int], shape: Sequence[int], device: torch.device
) -> PlacedCells:
    """Return the positions of the cells of crops of the same patches.

    Args:
        crops: Positions of the crops in their patches, each with one record per sample.
        grid: Number of cells along each axis.
        shape: Number of voxels of the patch along each axis.
        device: Device of the result.
    """
    centres = cell_centres_vox(grid, shape, device)
    places = torch.cat(
        [map_points(centres.expand(len(each.linear), -1, -1), each, "to_input") for each in crops], dim=1
    )
    spacing = torch.tensor(crops[0].spacing_mm, device=device)
    cell_mm = max(mm * voxels / cells for mm, voxels, cells in zip(spacing.tolist(), shape, grid, strict=True))
    return PlacedCells(places * spacing, are_inside(places, shape), cell_mm)


def far_enough(
    points_vox: Float[Tensor, "query d"], own: AffineParams, cells: PlacedCells
) -> Bool[Tensor, "query cell"]:
    """Return which cells of one sample show the patch and are farther from each point than the length of a cell.

    Args:
        points_vox: Points of a crop, zyx in voxels.
        own: Position of this crop in its patch, one record.
        cells: Cells of the same sample only.
    """
    spacing = torch.tensor(own.spacing_mm, device=points_vox.device)
    place_mm = map_points(points_vox[None], own, "to_input")[0] * spacing
    return (torch.cdist(place_mm, cells.places_mm[0]) > cells.cell_mm) & cells.shown
