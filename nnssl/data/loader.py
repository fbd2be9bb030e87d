"""Which case and which box a training sample is, and the batches of raw patches that follow from it.

A sample is named by its step and its place in the global batch. Cases come in passes: in each pass every case is taken
once, in an order drawn for that pass, so that none is starved however many or few there are. The box is centred near a
voxel inside the body most of the time, else anywhere. Both draws depend on (seed, stage, step, place), the batch size
and the cases alone, so neither the number of workers or ranks nor a restart changes a sample. Workers only read and
crop.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
from nnssl.errors import UserError

FOREGROUND_SHARE = 0.9
"""Share of the boxes that are centred near a voxel inside the body."""

GRACE_SECONDS = 60
"""How long a reader outlives a request to stop."""

JITTER = 0.25
"""How far a box's centre may lie from that voxel along an axis, as a share of the box."""


class PatchBatch(NamedTuple):
    """Raw patches of one step; those of one rank when there are several."""

    volumes: Float[Tensor, "batch channel *shape"]
    """Float32, zero outside the image."""
    samples: list[int]
    """Places in the global batch."""
    step: int
    cases: list[str]
    lower_vox: Int[Tensor, "batch 3"]
    """First voxel of each patch in its case, (z, y, x) also in 2D, where z is the slice; negative where a volume is
    smaller than the patch."""


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
) -> DataLoader:
    """Return a loader that gives one ``PatchBatch`` per step.

    Args:
        store: the preprocessed cases.
        patch_size: (z, y, x) voxels, or (y, x) for patches of one slice.
        batch_size: patches per step over all ranks.
        seed: the run's seed.
        stage: the pretext stage, ``method.stage``.
        first_step: step of the first batch.
        last_step: step after the last batch.
        rank: of this process.
        world_size: number of processes; each takes a contiguous part of the batch.
        num_workers: processes that read; 0 reads in this process.
        foreground_share: share of the patches that are centred near a voxel inside the body, 0 to 1; pairs say where theirs lie.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
        pairs: places of which two neighbours of a batch are the two sides; None for patches that have nothing to do with one
            another.

    Returns:
        A loader of ``last_step - first_step`` batches.

    Raises:
        UserError: the batch cannot be shared out evenly, or in pairs.
        ValueError: a patch size that is neither 2D nor 3D, or pairs of slices.
    """
    if batch_size % world_size:
        raise UserError(
            f"batch size {batch_size}: cannot be shared by {world_size} processes; "
            f"take {max(1, batch_size // world_size) * world_size}"
        )
    if len(patch_size) not in (2, 3):
        raise ValueError(f"a patch has 2 or 3 axes, not {len(patch_size)}")
    part = batch_size // world_size
    if pairs is not None and part % 2:
        raise UserError(
            f"batch size {batch_size}: {world_size} process(es) get {part} patches each, and patches go in pairs"
        )
    if pairs is not None and len(patch_size) != 3:
        raise ValueError("places of slices are not paired")
    size = as_volume(patch_size)
    boxes = (
        SingleBoxes(store, size, batch_size, seed, stage, foreground_share)
        if pairs is None
        else PairedBoxes(store, size, batch_size, seed, stage, pairs)
    )
    return DataLoader(
        PatchDataset(store, patch_size, boxes),
        batch_sampler=StepSampler(range(first_step, last_step), range(rank * part, (rank + 1) * part)),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        multiprocessing_context=start_of_readers(num_workers),
        # a generator of its own, so that making workers leaves the global random state alone
        generator=torch.Generator(),
    )


def start_of_readers(num_workers: int) -> str | None:
    """Return how torch is to start processes that read; None for its default.

    On Linux they are forked, also where the training process was spawned or Python's default is the fork server (from 3.14
    on): a forked reader begins at once, shares what is imported, and its parent is the training process. torch looks at the
    parent alone, and readers of a fork server would outlive a training that was killed.

    Args:
        num_workers: number of processes; 0 for none.
    """
    return "fork" if num_workers and sys.platform == "linux" else None


def default_workers(device: torch.device) -> int:
    """Return how many processes to read in when the user does not say."""
    # a CPU that trains has no core to spare for more than one reader
    return 1 if device.type == "cpu" else max(1, min(8, usable_cores() - 1))


class PatchDataset(Dataset):
    """Patches keyed by (step, place in the global batch).

    Args:
        store: the cases.
        patch_size: (z, y, x), or (y, x) for slices.
        boxes: says which case a sample is of, and where its first voxel lies, (z, y, x).
    """

    def __init__(
        self, store: CaseStore, patch_size: Sequence[int], boxes: Callable[[int, int], tuple[str, Sequence[int]]]
    ) -> None:
        self.store = store
        self.patch_size = tuple(patch_size)
        self.boxes = boxes

    def __getitem__(self, key: tuple[int, int]) -> PatchBatch:
        """Return one sample as a batch of one."""
        step, sample = key
        name, lower = self.boxes(step, sample)
        volume = torch.from_numpy(self.store.case(name).read_box(lower, as_volume(self.patch_size)))
        if len(self.patch_size) == 2:
            volume = volume.squeeze(1)
        return PatchBatch(volume[None], [sample], step, [name], torch.tensor([lower]))


@dataclass(frozen=True)
class SingleBoxes:
    """Boxes of cases that take turns, most of them near a voxel inside the body.

    Attributes:
        store: the cases.
        size: (z, y, x) of a box.
        batch_size: global.
        seed: the run's seed.
        stage: the pretext stage.
        foreground_share: see ``make_loader``.
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
    """Boxes around both places of a pair; neighbours in a batch are of one pair.

    Attributes:
        store: the cases, those of the table.
        size: (z, y, x) of a box.
        batch_size: global, even.
        seed: the run's seed.
        stage: the pretext stage.
        pairs: of places; they say where boxes lie.
    """

    store: CaseStore
    size: tuple[int, ...]
    batch_size: int
    seed: int
    stage: str
    pairs: PairTable

    def __call__(self, step: int, sample: int) -> tuple[str, Sequence[int]]:
        """Return the case of a sample and the first voxel of its box.

        Boxes that would reach beyond their scans are moved, both by as much, so that both places stay at the same place of
        their boxes, and so that as little as can be lies outside.
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
    """Return the size (z, y, x) of a patch; one of slices, (y, x), is one voxel thick."""
    return (*[1] * (3 - len(patch_size)), *patch_size)


def shared_move(corners: Sequence[int], rooms: Sequence[int]) -> int:
    """Return by how many voxels to move patches of two scans along an axis, so that the least of both lies outside.

    Args:
        corners: first voxel of each patch.
        rooms: how many voxels longer than the patch each scan is; below 0 where it is shorter.
    """
    # a patch longer than its scan reaches beyond it anyway, by as much wherever it covers all of it
    ranges = [sorted((-corner, room - corner)) for corner, room in zip(corners, rooms, strict=True)]
    low, high = max(first for first, _ in ranges), min(last for _, last in ranges)
    return min(max(0, min(low, high)), max(low, high))  # between two that do not meet all moves cost the same


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Keys of the samples of each step that one rank takes.

    Args:
        steps: the steps.
        samples: the rank's places in the global batch.
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
    """Return the index of the case that a sample comes from; each pass takes every case once."""
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

    Along an axis where the volume is at least as large as the box, the box stays inside; where it is smaller, the
    volume is in the middle of the box.

    Args:
        shape: (z, y, x) of the volume.
        size: (z, y, x) of the box.
        foreground_vox: voxels inside the body; empty if there are none, then the box may be anywhere.
        foreground_share: probability that the box is centred near one of them.
        generator: where the draw comes from.

    Returns:
        (z, y, x) of the box's first voxel.
    """
    # always the same numbers in the same order, whatever is done with them
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
    """Join batches of one."""
    return PatchBatch(
        volumes=torch.cat([sample.volumes for sample in samples]),
        samples=[sample.samples[0] for sample in samples],
        step=samples[0].step,
        cases=[sample.cases[0] for sample in samples],
        lower_vox=torch.cat([sample.lower_vox for sample in samples]),
    )


def _start_worker(worker: int) -> None:
    """Keep a worker to one core, and leave it running when the whole group of processes is asked to stop.

    torch has limited its own threads already. A scheduler sends SIGTERM to every process of a job; the trainer saves and
    then ends its workers itself, and it could do neither if they were gone first. A worker that is still there after
    ``GRACE_SECONDS`` ends by itself, so that nobody waits for it forever.
    """
    blosc2.set_nthreads(1)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
