"""Matching by anatomical embeddings: a place is where another scan's embeddings are most like those of the point.

Whole scans are embedded in tiles of the size that the network was trained on: its instance normalisation takes statistics of
what it is given, so that a scan given whole would get other embeddings than its parts.

Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings, TMI 2022, section III-C.
Deviations: coarse embeddings are brought back to unit norm after they are interpolated to the fine grid. A match is the centre of
the best cell, and nothing is rounded to voxels.
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

POINTS_AT_ONCE = 64
CASES_KEPT = 4


class EmbeddedCase(NamedTuple):
    """The embeddings of a whole case, both on the fine grid, in half precision.

    Attributes:
        fine: unit vectors.
        coarse: unit vectors.
        cell_vox: voxels along each axis of a cell.
        inside: cells whose centre lies in the scan.
    """

    fine: Float[Tensor, "dimension z y x"]
    coarse: Float[Tensor, "dimension z y x"]
    cell_vox: tuple[float, float, float]
    inside: Bool[Tensor, "z y x"]


class EmbeddingMatcher:
    """Finds places by fine and coarse embeddings.

    Args:
        embedding: ``AnatomicalEmbedding`` in evaluation mode, on ``device``.
        store: the preprocessed cases.
        tile_vox: the patch size it was trained on, (z, y, x).
        device: where to compute.
        autocast: gives the context of mixed precision.
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
        """Return where points of a case lie in another case; the score is the mean of both cosines."""
        vectors = self.vectors(query, points_mm)
        other = self.embedded(key)
        cells, scores = best_cells(vectors, other)
        spacing = np.array(self.store.case(key).spacing_mm)
        grid = np.stack(np.unravel_index(cells, other.fine.shape[1:]), axis=1)
        centres_vox = (grid + 0.5) * np.array(other.cell_vox) - 0.5
        return Matches(centres_vox * spacing, scores)

    def vectors(self, name: str, points_mm: Float[np.ndarray, "point 3"]) -> Float[Tensor, "2 point dimension"]:
        """Return the fine and the coarse embeddings of the cells that points lie in."""
        case = self.embedded(name)
        spacing = np.array(self.store.case(name).spacing_mm)
        cells = np.floor((points_mm / spacing + 0.5) / np.array(case.cell_vox)).astype(np.int64)
        last = np.array(case.fine.shape[1:]) - 1
        z, y, x = torch.from_numpy(np.clip(cells, 0, last).T)
        return torch.stack([each[:, z, y, x].T.float() for each in (case.fine, case.coarse)])

    def embedded(self, name: str) -> EmbeddedCase:
        """Return the embeddings of a case; those used last are kept."""
        if name not in self._embedded:
            self._embedded[name] = self._embed(name)
        self._embedded.move_to_end(name)
        if len(self._embedded) > CASES_KEPT:
            self._embedded.popitem(last=False)
        return self._embedded[name]

    @torch.no_grad()
    def _embed(self, name: str) -> EmbeddedCase:
        case = self.store.case(name)
        fine: _Blend | None = None
        coarse: _Blend | None = None
        for lower in tile_corners(case.shape, self.tile_vox, self._coarsest_cell_vox()):
            volume = torch.from_numpy(case.read_box(lower, self.tile_vox))[None].to(self.device)
            with self.autocast():
                tile = self.embedding(volume)
            fine = fine or _Blend(tile.fine, self.tile_vox, case.shape)
            coarse = coarse or _Blend(tile.coarse, self.tile_vox, case.shape)
            fine.add(tile.fine, lower)
            coarse.add(tile.coarse, lower)
        assert fine is not None
        assert coarse is not None
        sharp, broad = fine.blended(), coarse.blended()
        # both grids start at the first voxel, so that cells of the coarse one are cut into cells of the fine one
        ratio = [c / f for c, f in zip(coarse.cell_vox, fine.cell_vox, strict=True)]
        size = [round(cells * each) for cells, each in zip(broad.shape[1:], ratio, strict=True)]
        wide = F.interpolate(broad[None], size, mode="trilinear", align_corners=False)[0]
        z, y, x = sharp.shape[1:]
        wide = F.normalize(_extended(wide, (z, y, x))[:, :z, :y, :x], dim=0)
        centres = [(torch.arange(n) + 0.5) * vox - 0.5 for n, vox in zip((z, y, x), fine.cell_vox, strict=True)]
        within = [each <= length - 1 for each, length in zip(centres, case.shape, strict=True)]
        inside = within[0][:, None, None] & within[1][:, None] & within[2]
        return EmbeddedCase(sharp.half().cpu(), wide.half().cpu(), fine.cell_vox, inside)

    def _coarsest_cell_vox(self) -> tuple[int, ...]:
        """Return the voxels of the longest cell along each axis, so that tiles begin where cells begin."""
        network = self.embedding.network
        total = np.ones(3, dtype=int)
        for stride in network.encoder.strides:
            total *= np.array(stride)
        return tuple(int(n) for n in total)


@torch.no_grad()
def best_cells(
    vectors: Float[Tensor, "2 point dimension"], other: EmbeddedCase
) -> tuple[np.ndarray, Float[np.ndarray, " point"]]:
    """Return for each point the cell of another case that is most like it, and the mean of both cosines there."""
    fine, coarse = (each.flatten(1).float() for each in (other.fine, other.coarse))
    outside = ~other.inside.flatten()
    cells, scores = [], []
    for start in range(0, vectors.shape[1], POINTS_AT_ONCE):
        part = vectors[:, start : start + POINTS_AT_ONCE]
        similarity = ((part[0] @ fine + part[1] @ coarse) / 2).masked_fill(outside, -torch.inf)
        best = similarity.max(dim=1)
        cells.append(best.indices)
        scores.append(best.values)
    return torch.cat(cells).numpy(), torch.cat(scores).numpy()


def tile_corners(shape: Sequence[int], tile: Sequence[int], cell: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Return the first voxels of tiles that cover a volume, half a tile apart, and at multiples of a cell."""
    axes = []
    for length, size, unit in zip(shape, tile, cell, strict=True):
        step = max(unit, size // 2 // unit * unit)
        count = 1 if length <= size else -(-(length - size) // step) + 1
        axes.append([index * step for index in range(count)])
    return itertools.product(*axes)


def _extended(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map at least as large as wanted, its last cells repeated."""
    missing = [max(0, wanted - have) for wanted, have in zip(size, volume.shape[1:], strict=True)]
    padding = [amount for each in reversed(missing) for amount in (0, each)]
    return F.pad(volume[None], padding, mode="replicate")[0] if any(padding) else volume


class _Blend:
    """Sums maps of tiles on the grid of a whole volume; the middle of a tile weighs more than its border.

    Args:
        tile_map: of the first tile.
        tile_vox: voxels of a tile.
        shape: voxels of the volume.
    """

    def __init__(self, tile_map: Tensor, tile_vox: Sequence[int], shape: Sequence[int]) -> None:
        cells = tile_map.shape[2:]
        z, y, x = (voxels / count for voxels, count in zip(tile_vox, cells, strict=True))
        self.cell_vox = (z, y, x)
        self.grid = [-(-length // max(1, round(vox))) for length, vox in zip(shape, self.cell_vox, strict=True)]
        room = [n + count for n, count in zip(self.grid, cells, strict=True)]
        self.total = torch.zeros(tile_map.shape[1], *room, device=tile_map.device)
        ramps = [
            torch.minimum(torch.arange(count) + 1, count - torch.arange(count)).float().to(tile_map.device)
            for count in cells
        ]
        self.weight = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]

    def add(self, tile_map: Tensor, lower: Sequence[int]) -> None:
        """Add the map of a tile that begins at a voxel."""
        place = [slice(None)]
        for first, vox, count in zip(lower, self.cell_vox, tile_map.shape[2:], strict=True):
            start = round(first / vox)
            place.append(slice(start, start + count))
        self.total[tuple(place)] += tile_map[0] * self.weight

    def blended(self) -> Tensor:
        """Return unit vectors on the grid of the volume."""
        z, y, x = self.grid
        return F.normalize(self.total[:, :z, :y, :x], dim=0)
