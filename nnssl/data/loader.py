"""The choice of case and box for every training sample, and the batches of raw patches.

A sample is identified by its step and its index in the global batch. Cases come in passes: each pass takes every case
once, in an order drawn for that pass, so all cases are used equally often whatever their number. Most boxes are centred
near a voxel inside the body; the others lie anywhere. Both draws depend only on (seed, stage, step, index), the batch
size and the cases, so a sample does not change with the number of workers or ranks or after a restart. Workers only
read and crop.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import blosc2
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import usable_cores
from nnssl.data.patch_pairs import PairTable
from nnssl.draws import make_generator
from nnssl.errors import ArgumentError

FOREGROUND_SHARE = 0.9
"""Fraction of boxes that are centred near a voxel inside the body."""

GRACE_SECONDS = 60
"""Time for which a reader continues after a request to stop."""

JITTER = 0.25
"""Largest distance of a box's centre from that voxel along an axis, as a fraction of the box."""


class PatchBatch(NamedTuple):
    """Raw patches of one step; if there are several ranks, those of one rank."""

    volumes: Float[Tensor, "batch channel *shape"]
    """Intensities as float32, zero outside the image."""
    samples: list[int]
    """Indices in the global batch."""
    step: int
    cases: list[str]
    lower_vox: Int[Tensor, "batch 3"]
    """First voxel (z, y, x) of each patch in its case, also in 2D, where z is the slice; negative if a volume is smaller
    than the patch."""
    supervoxels: Int[Tensor, " batch *shape"] | None = None
    """Supervoxel of each voxel in a partition that is drawn for each patch, 0 outside the image; None if they are not read."""


def make_loader(
    store: CaseStore,
    patch_size: Sequence[int],
    batch_size: int,
    seed: int,
    stage: str,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    foreground_share: float = FOREGROUND_SHARE,
    pin_memory: bool = False,
    pairs: PairTable | None = None,
    partitions: Sequence[Path] = (),
) -> DataLoader:
    """Return a loader that yields one ``PatchBatch`` per step.

    Args:
        store: Preprocessed cases.
        patch_size: Patch size in voxels, (z, y, x), or (y, x) for patches of one slice.
        batch_size: Patches per step over all ranks.
        seed: Random seed of the run.
        stage: Pretext stage, ``method.stage``.
        first_step: Step of the first batch.
        last_step: Step after the last batch.
        rank: Rank of this process.
        world_size: Number of processes; each takes a contiguous part of the batch.
        num_workers: Number of processes that read; 0 reads in this process.
        foreground_share: Fraction of patches that are centred near a voxel inside the body, between 0 and 1. Not used
            with pairs, which determine where their patches lie.
        pin_memory: Whether to put batches into page-locked memory, for asynchronous copies to a GPU.
        pairs: Pairs of points; each two neighbouring patches of a batch show the two points of a pair. None for
            independent patches.
        partitions: Folders of partitions into supervoxels, of which one is drawn for each patch; none to read none.

    Returns:
        A loader of ``last_step - first_step`` batches.

    Raises:
        ArgumentError: If the batch cannot be divided evenly among the processes, or not into pairs.
        ValueError: If the patch is neither 2D nor 3D, or if pairs are given for 2D patches.
    """
    if batch_size % world_size:
        raise ArgumentError(
            f"batch_size must be divisible by {world_size}, the number of processes, got {batch_size}; "
            f"use {max(1, batch_size // world_size) * world_size}",
            "batch_size",
        )
    if len(patch_size) not in (2, 3):
        raise ValueError(f"patch_size must have 2 or 3 axes, got {len(patch_size)}")
    part = batch_size // world_size
    if pairs is not None and part % 2:
        raise ArgumentError(
            f"batch_size must be divisible by {2 * world_size}, since each of {world_size} process(es) needs pairs of "
            f"patches, got {batch_size}",
            "batch_size",
        )
    if pairs is not None and len(patch_size) != 3:
        raise ValueError(f"patch_size must have 3 axes for pairs, got {len(patch_size)}")
    size = as_volume(patch_size)
    boxes = (
        SingleBoxes(store, size, batch_size, seed, stage, foreground_share)
        if pairs is None
        else PairedBoxes(store, size, batch_size, seed, stage, pairs)
    )
    return DataLoader(
        PatchDataset(store, patch_size, boxes, DrawnPartition(tuple(partitions), seed, stage)),
        batch_sampler=StepSampler(range(first_step, last_step), range(rank * part, (rank + 1) * part)),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        multiprocessing_context=start_of_readers(num_workers),
        # a separate generator, so that creating workers does not change the global random state
        generator=torch.Generator(),
    )


def start_of_readers(num_workers: int) -> str | None:
    """Return the start method for processes that read, or None for torch's default.

    On Linux, readers are forked even if the training process was spawned or if Python's default is the fork server (from
    3.14 on). A forked reader starts immediately, shares imported modules, and is a child of the training process. torch
    ends readers by watching their parent, so readers started by a fork server would outlive a killed training.

    Args:
        num_workers: Number of processes that read; 0 for none.
    """
    return "fork" if num_workers and sys.platform == "linux" else None


def default_workers(device: torch.device) -> int:
    """Return the default number of processes that read."""
    # when the CPU trains, only one reader can be spared a core
    return 1 if device.type == "cpu" else max(1, min(8, usable_cores() - 1))


class PatchDataset(Dataset):
    """Patches, indexed by (step, index in the global batch).

    Args:
        store: Preprocessed cases.
        patch_size: Patch size in voxels, (z, y, x), or (y, x) for slices.
        boxes: Function that returns the case and the first voxel (z, y, x) of a sample.
        partition: Choice of the partition into supervoxels that is read with a sample; None for no supervoxels.
    """

    def __init__(
        self,
        store: CaseStore,
        patch_size: Sequence[int],
        boxes: Callable[[int, int], tuple[str, Sequence[int]]],
        partition: "DrawnPartition | None" = None,
    ) -> None:
        self.partition = partition
        self.store = store
        self.patch_size = tuple(patch_size)
        self.boxes = boxes

    def __getitem__(self, key: tuple[int, int]) -> PatchBatch:
        """Return one sample as a batch of one."""
        step, sample = key
        name, lower = self.boxes(step, sample)
        size = as_volume(self.patch_size)
        volume = torch.from_numpy(self.store.case(name).read_box(lower, size))
        if len(self.patch_size) == 2:
            volume = volume.squeeze(1)
        parts = None
        if self.partition is not None and self.partition.folders:
            folder = self.partition(step, sample)
            parts = torch.from_numpy(self.store.case(name).read_supervoxels(folder, lower, size))
            parts = parts if len(self.patch_size) == 2 else parts[None]
        return PatchBatch(volume[None], [sample], step, [name], torch.tensor([lower]), parts)


@dataclass(frozen=True)
class DrawnPartition:
    """Function that returns the folder of the partition into supervoxels for a sample.

    Attributes:
        folders: Folders to draw from with equal probability.
        seed: Random seed of the run.
        stage: Pretext stage.
    """

    folders: tuple[Path, ...]
    seed: int
    stage: str

    def __call__(self, step: int, sample: int) -> Path:
        """Return the folder; it depends only on seed, stage, step and sample."""
        generator = make_generator(self.seed, f"{self.stage}/partition", step, sample)
        return self.folders[int(torch.randint(len(self.folders), (1,), generator=generator))]


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


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Keys of the samples that one rank takes in each step.

    Args:
        steps: Steps.
        samples: Indices of the rank's samples in the global batch.
    """

    def __init__(self, steps: range, samples: range) -> None:
        self.steps = steps
        self.samples = samples

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            yield [(step, sample) for sample in self.samples]


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


def _collate(samples: list[PatchBatch]) -> PatchBatch:
    """Join batches of one sample into one batch."""
    parts = [sample.supervoxels for sample in samples if sample.supervoxels is not None]
    return PatchBatch(
        volumes=torch.cat([sample.volumes for sample in samples]),
        samples=[sample.samples[0] for sample in samples],
        step=samples[0].step,
        cases=[sample.cases[0] for sample in samples],
        lower_vox=torch.cat([sample.lower_vox for sample in samples]),
        supervoxels=torch.cat(parts) if parts else None,
    )


def _start_worker(worker: int) -> None:
    """Limit a worker to one core, and keep it running when the whole process group is asked to stop.

    torch has already limited its own threads. A scheduler sends SIGTERM to every process of a job. The trainer then saves
    and ends its workers itself, which would fail if the workers had ended first. A worker that still runs after
    ``GRACE_SECONDS`` ends by itself, so that no process waits for it forever.
    """
    blosc2.set_nthreads(1)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
