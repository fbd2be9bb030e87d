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
from nnssl.networks.backbone import stage_strides

CPU = torch.device("cpu")
POINTS_AT_ONCE = 64
CELLS_AT_ONCE = 2**18
"""Cells whose similarity to so many points is held at a time."""
CASES_KEPT, BYTES_KEPT = 3, 2**31
"""So many embedded cases are kept, and more as long as they take no more memory than this together."""


class EmbeddedCase(NamedTuple):
    """The embeddings of a whole case, in half precision; coarse ones on their own grid, which starts at the same voxel.

    Attributes:
        fine: unit vectors.
        coarse: unit vectors.
        cell_vox: voxels along each axis of a fine cell.
        coarse_vox: voxels along each axis of a coarse cell.
        inside: fine cells whose centre lies in the scan.
    """

    fine: Float[Tensor, "dimension z y x"]
    coarse: Float[Tensor, "dimension cz cy cx"]
    cell_vox: tuple[float, float, float]
    coarse_vox: tuple[float, float, float]
    inside: Bool[Tensor, "z y x"]

    @property
    def bytes(self) -> int:
        """Bytes of memory that the embeddings take."""
        return sum(each.nbytes for each in (self.fine, self.coarse, self.inside))

    def interpolate(self, coarse_map: Float[Tensor, "value cz cy cx"], cells: Tensor) -> Float[Tensor, "value cell"]:
        """Return values of the coarse grid at fine cells, linearly between coarse ones.

        Args:
            coarse_map: values.
            cells: (cell, 3), zyx indices of fine cells.
        """
        ratio = torch.tensor([f / c for f, c in zip(self.cell_vox, self.coarse_vox, strict=True)])
        size = torch.tensor(coarse_map.shape[1:])
        # from -1 to 1 over the coarse cells, as grid_sample counts
        places = ((cells + 0.5) * ratio / size * 2 - 1).flip(1).float()
        sampled = F.grid_sample(
            coarse_map[None].float(), places[None, :, None, None], align_corners=False, padding_mode="border"
        )
        return sampled[0, :, :, 0, 0]


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
        cells, scores = best_cells(vectors, other, self.device)
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
        places = torch.stack([z, y, x], dim=1)
        coarse = F.normalize(case.interpolate(case.coarse, places), dim=0)
        return torch.stack([case.fine[:, z, y, x].T.float(), coarse.T])

    def embedded(self, name: str) -> EmbeddedCase:
        """Return the embeddings of a case; those used last are kept, as many as there is room for."""
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
        """Return the voxels of the longest cell along each axis, so that tiles begin where cells begin."""
        return stage_strides(self.embedding.network.encoder, 3)[-1]


@torch.no_grad()
def best_cells(
    vectors: Float[Tensor, "2 point dimension"], other: EmbeddedCase, device: torch.device = CPU
) -> tuple[np.ndarray, Float[np.ndarray, " point"]]:
    """Return for each point the cell of another case that is most like it, and the mean of both cosines there.

    Args:
        vectors: fine and coarse, of unit norm.
        other: where to look.
        device: where to compute, a part of the cells at a time.
    """
    z, y, x = other.fine.shape[1:]
    slices = max(1, CELLS_AT_ONCE // (y * x))
    best = torch.full((vectors.shape[1],), -torch.inf)
    cells = torch.zeros(vectors.shape[1], dtype=torch.int64)
    for first in range(0, z, slices):
        part = slice(first, min(first + slices, z))
        places = torch.cartesian_prod(torch.arange(part.start, part.stop), torch.arange(y), torch.arange(x))
        fine = other.fine[:, part].to(device).flatten(1).float()
        length = other.interpolate(other.coarse, places).norm(dim=0)
        outside = ~other.inside[part].flatten()
        for start in range(0, vectors.shape[1], POINTS_AT_ONCE):
            sharp, broad = vectors[:, start : start + POINTS_AT_ONCE]
            similar = (broad @ other.coarse.flatten(1).float()).unflatten(1, other.coarse.shape[1:])
            coarse = other.interpolate(similar, places) / length.clamp(min=1e-6)
            similarity = ((sharp.to(device) @ fine).cpu() + coarse) / 2
            found = similarity.masked_fill(outside, -torch.inf).max(dim=1)
            chosen = slice(start, start + len(sharp))
            better = found.values > best[chosen]
            cells[chosen] = torch.where(better, found.indices + first * y * x, cells[chosen])
            best[chosen] = torch.where(better, found.values, best[chosen])
    return cells.numpy(), best.numpy()


def corners_on_cells(shape: Sequence[int], tile: Sequence[int], cell: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Return the first voxels of tiles that cover a volume, half a tile apart, and at multiples of a cell.

    So cells of all tiles lie on one grid; the tiles of ``nnssl.pictures.tiles``, whose values are of voxels, are spread evenly.
    """
    axes = []
    for length, size, unit in zip(shape, tile, cell, strict=True):
        step = max(unit, size // 2 // unit * unit)
        last = -(-max(0, length - size) // unit) * unit  # reaches beyond the volume by less than a cell
        axes.append([*range(0, last, step), last])
    return itertools.product(*axes)


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
        self.total = torch.zeros(tile_map.shape[1], *self.grid)
        ramps = [torch.minimum(torch.arange(count) + 1, count - torch.arange(count)).float() for count in cells]
        self.weight = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]

    def add(self, tile_map: Tensor, lower: Sequence[int]) -> None:
        """Add the map of a tile that begins at a voxel."""
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
