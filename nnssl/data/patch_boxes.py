"""The choice of case and box for every training sample.

Cases come in passes: each pass takes every case once, in an order drawn for that pass, so all cases are used equally often
whatever their number. Most boxes are centred near a voxel inside the body; the others lie anywhere. Both draws depend only on
(seed, stage, step, index in the global batch), the batch size and the cases, so a sample does not change with the number of
workers or ranks or after a restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int

from nnssl.data.case_store import CaseStore
from nnssl.data.patch_pairs import PairTable
from nnssl.draws import make_generator

FOREGROUND_SHARE = 0.9
"""Fraction of boxes that are centred near a voxel inside the body."""

JITTER = 0.25
"""Largest distance of a box's centre from that voxel along an axis, as a fraction of the box."""


@dataclass(frozen=True)
class SingleBoxes:
    """Boxes of independent samples: cases take turns, and most boxes lie near a voxel inside the body.

    Attributes:
        store: Preprocessed cases.
        size: Box size (z, y, x) in voxels.
        batch_size: Global batch size.
        seed: Random seed of the run.
        stage: Pretext stage.
        foreground_share: See ``make_loader``.
    """

    store: CaseStore
    size: tuple[int, ...]
    batch_size: int
    seed: int
    stage: str
    foreground_share: float

    def __call__(self, step: int, sample: int) -> tuple[str, Sequence[int]]:
        """Return the case of a sample and the first voxel of its box."""
        name = self.store.names[draw_case(len(self.store), self.batch_size, self.seed, self.stage, step, sample)]
        case = self.store.case(name)
        generator = make_generator(self.seed, f"{self.stage}/boxes", step, sample)
        return name, draw_box(case.shape, self.size, case.foreground_vox, self.foreground_share, generator)


@dataclass(frozen=True)
class PairedBoxes:
    """Boxes around both points of a pair; neighbouring samples of a batch belong to one pair.

    Attributes:
        store: Preprocessed cases, those of the table.
        size: Box size (z, y, x) in voxels.
        batch_size: Global batch size, even.
        seed: Random seed of the run.
        stage: Pretext stage.
        pairs: Pairs of points, which determine where the boxes lie.
    """

    store: CaseStore
    size: tuple[int, ...]
    batch_size: int
    seed: int
    stage: str
    pairs: PairTable

    def __call__(self, step: int, sample: int) -> tuple[str, Sequence[int]]:
        """Return the case of a sample and the first voxel of its box.

        If boxes would extend beyond their scans, both are moved by the same amount. The two points thus keep the same
        position within their boxes, and as little as possible lies outside the scans.
        """
        case = draw_case(len(self.pairs.cases), self.batch_size // 2, self.seed, self.stage, step, sample // 2)
        rows = self.pairs.of_case(case)
        choice = float(torch.rand((), generator=make_generator(self.seed, f"{self.stage}/pairs", step, sample // 2)))
        row = rows[int(choice * len(rows))]
        cases = [self.store.case(self.pairs.cases[index]) for index in (case, self.pairs.key[row])]
        corners = [
            [round(float(place)) - length // 2 for place, length in zip(places[row], self.size, strict=True)]
            for places in (self.pairs.query_vox, self.pairs.key_vox)
        ]
        side = sample % 2
        lower = []
        for axis, length in enumerate(self.size):
            rooms = [each.shape[axis] - length for each in cases]
            lower.append(corners[side][axis] + shared_move([each[axis] for each in corners], rooms))
        return cases[side].name, lower


def as_volume(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the size (z, y, x) of a patch; a 2D patch (y, x) is one voxel thick."""
    return (*[1] * (3 - len(patch_size)), *patch_size)


def shared_move(corners: Sequence[int], rooms: Sequence[int]) -> int:
    """Return the shift in voxels along an axis with which the least of two patches lies outside their scans.

    Args:
        corners: First voxel of each patch.
        rooms: Length of each scan minus that of the patch in voxels; negative for a shorter scan.
    """
    # a patch longer than its scan extends beyond it by the same amount wherever it covers the whole scan
    ranges = [sorted((-corner, room - corner)) for corner, room in zip(corners, rooms, strict=True)]
    low, high = max(first for first, _ in ranges), min(last for _, last in ranges)
    return min(max(0, min(low, high)), max(low, high))  # between disjoint ranges, all shifts cost the same


def draw_case(cases: int, batch_size: int, seed: int, stage: str, step: int, sample: int) -> int:
    """Return the index of a sample's case; each pass takes every case once."""
    number, place = divmod(step * batch_size + sample, cases)
    return int(_order_of_pass(cases, seed, stage, number)[place])


@lru_cache(maxsize=2)
def _order_of_pass(cases: int, seed: int, stage: str, number: int) -> Int[np.ndarray, " case"]:
    """Return the order of the cases in one pass over all of them."""
    return torch.randperm(cases, generator=make_generator(seed, f"{stage}/cases", number)).numpy()


def draw_box(
    shape: Sequence[int],
    size: Sequence[int],
    foreground_vox: Int[np.ndarray, "point 3"],
    foreground_share: float,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Return the lower corner of a random box.

    Along an axis where the volume is at least as large as the box, the box stays inside the volume. Along the other
    axes, the volume lies in the centre of the box.

    Args:
        shape: Shape (z, y, x) of the volume in voxels.
        size: Size (z, y, x) of the box in voxels.
        foreground_vox: Coordinates (z, y, x) of voxels inside the body; if empty, the box may lie anywhere.
        foreground_share: Probability that the box is centred near one of these voxels.
        generator: Random generator.

    Returns:
        First voxel (z, y, x) of the box.
    """
    # always draw the same numbers in the same order, even if some are not used
    choice, point, *place = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    near = choice < foreground_share and len(foreground_vox) > 0
    centre = foreground_vox[int(point * len(foreground_vox))].tolist() if near else None
    lower = []
    for axis, (extent, length) in enumerate(zip(shape, size, strict=True)):
        room = extent - length
        if room < 0:
            lower.append(-(-room // 2))
        elif centre is None:
            lower.append(int(place[axis] * (room + 1)))
        else:
            reach = int(JITTER * length)
            jitter = int(place[axis] * (2 * reach + 1)) - reach
            lower.append(min(max(centre[axis] - length // 2 + jitter, 0), room))
    return tuple(lower)
