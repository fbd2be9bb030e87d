"""Matching by anatomical embeddings: a point matches the place with the most similar embeddings in another scan.

Scans are embedded in tiles of the training patch size, because instance normalisation depends on its input: a whole scan would
get other embeddings than its parts.

Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings, TMI 2022, section III-C.
Deviations: coarse embeddings are normalised again after interpolation to the fine grid. A match is the centre of the best
cell and is not rounded to voxels.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.data.case_store import CaseStore
from nnssl.matching.points import Matches
from nnssl.networks.backbone import stage_strides

CPU = torch.device("cpu")
POINTS_AT_ONCE = 64
CELLS_AT_ONCE = 2**18
"""Number of points and of cells whose similarities are held in memory at once."""
CASES_KEPT, BYTES_KEPT = 3, 2**31
"""Number of embedded cases kept in memory; more are kept while all together need no more than this many bytes."""


class EmbeddedCase(NamedTuple):
    """The embeddings of a whole case in half precision, on a fine and a coarse grid that start at the same voxel.

    Attributes:
        fine: Fine embeddings, unit vectors.
        coarse: Coarse embeddings, unit vectors.
        cell_vox: Size of a fine cell along each axis in voxels.
        coarse_vox: Size of a coarse cell along each axis in voxels.
        inside: Whether the centre of a fine cell lies in the scan.
    """

    fine: Float[Tensor, "dimension z y x"]
    coarse: Float[Tensor, "dimension cz cy cx"]
    cell_vox: tuple[float, float, float]
    coarse_vox: tuple[float, float, float]
    inside: Bool[Tensor, "z y x"]

    @property
    def bytes(self) -> int:
        """Memory of the embeddings in bytes."""
        return sum(each.nbytes for each in (self.fine, self.coarse, self.inside))

    def interpolate(self, coarse_map: Float[Tensor, "value cz cy cx"], cells: Tensor) -> Float[Tensor, "value cell"]:
        """Interpolate values of the coarse grid linearly at fine cells.

        Args:
            coarse_map: Values on the coarse grid.
            cells: Indices (z, y, x) of fine cells, (cell, 3).
        """
        ratio = torch.tensor([f / c for f, c in zip(self.cell_vox, self.coarse_vox, strict=True)])
        size = torch.tensor(coarse_map.shape[1:])
        # grid_sample expects coordinates from -1 to 1 over the coarse cells.
        places = ((cells + 0.5) * ratio / size * 2 - 1).flip(1).float()
        sampled = F.grid_sample(
            coarse_map[None].float(), places[None, :, None, None], align_corners=False, padding_mode="border"
        )
        return sampled[0, :, :, 0, 0]

    def spread(self, coarse_map: Float[Tensor, "value cz cy cx"], part: slice) -> Float[Tensor, "value cell"]:
        """Interpolate values of the coarse grid linearly at all fine cells of some slices, faster than ``interpolate``.

        Args:
            coarse_map: Values on the coarse grid.
            part: Fine slices along z, from ``start`` to ``stop``.
        """
        ratio = [f / c for f, c in zip(self.cell_vox, self.coarse_vox, strict=True)]
        y, x = self.fine.shape[2:]
        last = coarse_map.shape[1] - 1
        planes = ((torch.arange(part.start, part.stop) + 0.5) * ratio[0] - 0.5).clamp(0, last)
        below = planes.floor().long()
        above = (below + 1).clamp(max=last)
        needed = slice(int(below[0]), int(above[-1]) + 1)
        wide = F.interpolate(
            coarse_map[:, needed].float(),
            scale_factor=(1 / ratio[1], 1 / ratio[2]),
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=False,
        )[..., :y, :x]
        share = (planes - below)[:, None, None].float()
        if not share.any():  # fine and coarse slices are the same
            return wide[:, below - needed.start].flatten(1)
        return torch.lerp(wide[:, below - needed.start], wide[:, above - needed.start], share).flatten(1)


class EmbeddingMatcher:
    """Matcher by fine and coarse embeddings.

    Args:
        embedding: ``AnatomicalEmbedding`` in evaluation mode on ``device``.
        store: Store of the preprocessed cases.
        tile_vox: Patch size (z, y, x) of the training in voxels.
        device: Device for the computation.
        autocast: Function that returns the context of mixed precision.
    """

    def __init__(
        self,
        embedding: Any,
        store: CaseStore,
        tile_vox: Sequence[int],
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.embedding = embedding
        self.store = store
        self.tile_vox = tuple(tile_vox)
        self.device = device
        self.autocast = autocast
        self._embedded: OrderedDict[str, EmbeddedCase] = OrderedDict()

    def match_points(self, query: str, points_mm: Float[np.ndarray, "point 3"], key: str) -> Matches:
        """Match points of a case to another case; the score is the mean of both cosines."""
        vectors = self.vectors(query, points_mm)
        other = self.embedded(key)
        cells, scores = best_cells(vectors, other, self.device)
        spacing = np.array(self.store.case(key).spacing_mm)
        grid = np.stack(np.unravel_index(cells, other.fine.shape[1:]), axis=1)
        centres_vox = (grid + 0.5) * np.array(other.cell_vox) - 0.5
        return Matches(centres_vox * spacing, scores)

    def vectors(self, name: str, points_mm: Float[np.ndarray, "point 3"]) -> Float[Tensor, "2 point dimension"]:
        """Return the fine and coarse embeddings of the cells that contain points."""
        case = self.embedded(name)
        spacing = np.array(self.store.case(name).spacing_mm)
        cells = np.floor((points_mm / spacing + 0.5) / np.array(case.cell_vox)).astype(np.int64)
        last = np.array(case.fine.shape[1:]) - 1
        z, y, x = torch.from_numpy(np.clip(cells, 0, last).T)
        places = torch.stack([z, y, x], dim=1)
        coarse = F.normalize(case.interpolate(case.coarse, places), dim=0)
        return torch.stack([case.fine[:, z, y, x].T.float(), coarse.T])

    def embedded(self, name: str) -> EmbeddedCase:
        """Return the embeddings of a case; the most recently used ones are cached."""
        if name not in self._embedded:
            self._embedded[name] = self._embed(name)
        self._embedded.move_to_end(name)
        while len(self._embedded) > CASES_KEPT and sum(each.bytes for each in self._embedded.values()) > BYTES_KEPT:
            self._embedded.popitem(last=False)
        return self._embedded[name]

    @torch.no_grad()
    def _embed(self, name: str) -> EmbeddedCase:
        case = self.store.case(name)
        fine: _Blend | None = None
        coarse: _Blend | None = None
        for lower in corners_on_cells(case.shape, self.tile_vox, self._coarsest_cell_vox()):
            volume = torch.from_numpy(case.read_box(lower, self.tile_vox))[None].to(self.device)
            with self.autocast():
                tile = self.embedding(volume)
            fine = fine or _Blend(tile.fine, self.tile_vox, case.shape)
            coarse = coarse or _Blend(tile.coarse, self.tile_vox, case.shape)
            fine.add(tile.fine, lower)
            coarse.add(tile.coarse, lower)
        assert fine is not None
        assert coarse is not None
        centres = [(torch.arange(n) + 0.5) * vox - 0.5 for n, vox in zip(fine.grid, fine.cell_vox, strict=True)]
        within = [each <= length - 1 for each, length in zip(centres, case.shape, strict=True)]
        inside = within[0][:, None, None] & within[1][:, None] & within[2]
        return EmbeddedCase(fine.blended(), coarse.blended(), fine.cell_vox, coarse.cell_vox, inside)

    def _coarsest_cell_vox(self) -> tuple[int, ...]:
        """Return the size of the coarsest cell along each axis in voxels, at multiples of which tiles start."""
        return stage_strides(self.embedding.network.encoder, 3)[-1]


@torch.no_grad()
def best_cells(
    vectors: Float[Tensor, "2 point dimension"], other: EmbeddedCase, device: torch.device = CPU
) -> tuple[np.ndarray, Float[np.ndarray, " point"]]:
    """Return the most similar cell of another case for each point, and the mean of both cosines there.

    Args:
        vectors: Fine and coarse embeddings of the points, unit vectors.
        other: Case to search.
        device: Device for the computation, which processes a part of the cells at a time.
    """
    z, y, x = other.fine.shape[1:]
    slices = max(1, CELLS_AT_ONCE // (y * x))
    best = torch.full((vectors.shape[1],), -torch.inf)
    cells = torch.zeros(vectors.shape[1], dtype=torch.int64)
    for first in range(0, z, slices):
        part = slice(first, min(first + slices, z))
        fine = other.fine[:, part].to(device).flatten(1).float()
        wide = other.spread(other.coarse, part)
        wide = (wide / wide.norm(dim=0).clamp(min=1e-6)).to(device)
        outside = ~other.inside[part].flatten()
        for start in range(0, vectors.shape[1], POINTS_AT_ONCE):
            sharp, broad = vectors[:, start : start + POINTS_AT_ONCE].to(device) / 2
            similarity = torch.addmm(broad @ wide, sharp, fine).cpu()
            found = similarity.masked_fill_(outside, -torch.inf).max(dim=1)
            chosen = slice(start, start + len(sharp))
            better = found.values > best[chosen]
            cells[chosen] = torch.where(better, found.indices + first * y * x, cells[chosen])
            best[chosen] = torch.where(better, found.values, best[chosen])
    return cells.numpy(), best.numpy()


def corners_on_cells(shape: Sequence[int], tile: Sequence[int], cell: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Return the first voxels of tiles that cover a volume, about half a tile apart and at multiples of a cell.

    The cells of all tiles therefore lie on one grid. ``nnssl.pictures.tiles`` needs no such grid and spaces its tiles evenly.
    """
    axes = []
    for length, size, unit in zip(shape, tile, cell, strict=True):
        step = max(unit, size // 2 // unit * unit)
        last = -(-max(0, length - size) // unit) * unit  # exceeds the volume by less than a cell
        axes.append([*range(0, last, step), last])
    return itertools.product(*axes)


class _Blend:
    """Weighted sum of tile maps on the grid of a volume, in which the middle of a tile weighs more than its border.

    Args:
        tile_map: Map of the first tile.
        tile_vox: Shape of a tile in voxels.
        shape: Shape of the volume in voxels.
    """

    def __init__(self, tile_map: Tensor, tile_vox: Sequence[int], shape: Sequence[int]) -> None:
        cells = tile_map.shape[2:]
        z, y, x = (voxels / count for voxels, count in zip(tile_vox, cells, strict=True))
        self.cell_vox = (z, y, x)
        self.grid = [-(-length // max(1, round(vox))) for length, vox in zip(shape, self.cell_vox, strict=True)]
        self.total = torch.zeros(tile_map.shape[1], *self.grid)
        ramps = [torch.minimum(torch.arange(count) + 1, count - torch.arange(count)).float() for count in cells]
        self.weight = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]

    def add(self, tile_map: Tensor, lower: Sequence[int]) -> None:
        """Add the map of a tile that starts at a voxel."""
        place, shown = [slice(None)], [slice(None)]
        for first, vox, count, cells in zip(lower, self.cell_vox, tile_map.shape[2:], self.grid, strict=True):
            start = round(first / vox)
            place.append(slice(start, start + count))
            shown.append(slice(0, cells - start))
        weighted = tile_map[0].float().cpu() * self.weight
        self.total[tuple(place)] += weighted[tuple(shown)]

    def blended(self) -> Tensor:
        """Return unit vectors on the grid of the volume, in half precision."""
        return torch.stack([F.normalize(part, dim=0).half() for part in self.total.unbind(1)], dim=1)
