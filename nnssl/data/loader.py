"""The batches of raw patches of a run, with what methods need beside the voxels: supervoxels, and where they may learn.

A sample is identified by its step and its index in the global batch, which determine its case and box
(``nnssl.data.patch_boxes``). Workers only read and crop.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import blosc2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import usable_cores
from nnssl.data.patch_boxes import FOREGROUND_SHARE, PairedBoxes, SingleBoxes, as_volume
from nnssl.data.patch_pairs import PairTable
from nnssl.draws import make_generator
from nnssl.errors import ArgumentError

GRACE_SECONDS = 60
"""Time for which a reader continues after a request to stop."""


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
    learnable: Bool[Tensor, " batch *shape"] | None = None
    """Whether a method may learn from each voxel, false outside the image; None if the masks are not read."""


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
    learnable: bool = False,
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
        learnable: Whether to read where a method may learn.

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
        PatchDataset(store, patch_size, boxes, DrawnPartition(tuple(partitions), seed, stage), learnable),
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
        learnable: Whether to read where a method may learn.
    """

    def __init__(
        self,
        store: CaseStore,
        patch_size: Sequence[int],
        boxes: Callable[[int, int], tuple[str, Sequence[int]]],
        partition: "DrawnPartition | None" = None,
        learnable: bool = False,
    ) -> None:
        self.partition = partition
        self.learnable = learnable
        self.store = store
        self.patch_size = tuple(patch_size)
        self.boxes = boxes

    def __getitem__(self, key: tuple[int, int]) -> PatchBatch:
        """Return one sample as a batch of one."""
        step, sample = key
        name, lower = self.boxes(step, sample)
        case, size = self.store.case(name), as_volume(self.patch_size)
        volume = self._of_patch(case.read_box(lower, size))
        parts, learnable = None, None
        if self.partition is not None and self.partition.folders:
            parts = self._of_patch(case.read_supervoxels(self.partition(step, sample), lower, size)[None])
        if self.learnable:
            learnable = self._of_patch(case.read_learnable(lower, size)[None])
        return PatchBatch(volume[None], [sample], step, [name], torch.tensor([lower]), parts, learnable)

    def _of_patch(self, box: np.ndarray) -> Tensor:
        """Return a box (channel, z, y, x) as a patch (channel, *shape)."""
        found = torch.from_numpy(box)
        return found.squeeze(1) if len(self.patch_size) == 2 else found


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


def _collate(samples: list[PatchBatch]) -> PatchBatch:
    """Join batches of one sample into one batch."""
    parts = [sample.supervoxels for sample in samples if sample.supervoxels is not None]
    masks = [sample.learnable for sample in samples if sample.learnable is not None]
    return PatchBatch(
        volumes=torch.cat([sample.volumes for sample in samples]),
        samples=[sample.samples[0] for sample in samples],
        step=samples[0].step,
        cases=[sample.cases[0] for sample in samples],
        lower_vox=torch.cat([sample.lower_vox for sample in samples]),
        supervoxels=torch.cat(parts) if parts else None,
        learnable=torch.cat(masks) if masks else None,
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
