"""The patches that a run of a stage is shown, from its current step to its end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import default_processes
from nnssl.data.loader import PatchBatch, default_workers, make_loader
from nnssl.data.patch_pairs import PairTable
from nnssl.data.supervoxels import folder_of, missing_supervoxels, prepare_supervoxels
from nnssl.distributed import rank, world_size
from nnssl.log import logger
from nnssl.methods.protocol import PretextMethod
from trainers.pretraining.stage_run import StageRun

MOST_PROCESSES = 4
"""Largest number of processes that partition cases; each holds a whole case several times."""
SECONDS_BETWEEN_LOOKS = 2.0


def patches_of_run(
    store: CaseStore,
    run: StageRun,
    pairs: PairTable | None,
    method: PretextMethod,
    first_step: int,
    workers: int | None,
    device: torch.device,
) -> Iterator[PatchBatch]:
    """Return the batches of this process, one for each step from ``first_step`` to the end of the stage.

    Args:
        store: The preprocessed cases.
        run: The run, which determines patch size, batch size, seed and number of steps.
        pairs: Pairs of places for stages that compare scans; None for all other stages.
        method: The method, which says whether supervoxels and the voxels that may be learned from are read too.
        first_step: Step to start or resume from, counted from 0.
        workers: Number of processes that read patches; None for the device's default.
        device: Device that the patches will be moved to.
    """
    edges_mm = method.supervoxel_edges_mm()
    partition_cases(store, edges_mm)
    training = run.settings.training
    readers = default_workers(device) if workers is None else workers
    if readers:
        processes = "1 process that reads" if readers == 1 else f"{readers} processes that read"
        logger.info(f"Starting {processes} patches of {len(store.names)} cases ...")
    return iter(
        make_loader(
            store,
            run.own.patch_size,
            training.batch_size,
            seed=run.seed,
            stage=run.stage.name,
            first_step=first_step,
            last_step=training.total_steps,
            rank=rank(),
            world_size=world_size(),
            num_workers=readers,
            pin_memory=device.type == "cuda",
            pairs=pairs,
            partitions=[folder_of(store.folder, edge) for edge in edges_mm],
            learnable=method.learns_at_voxels,
        )
    )


def partition_cases(store: CaseStore, edges_mm: Sequence[float]) -> None:
    """Compute the supervoxels of all cases that lack them, in the first process; the others wait for the files.

    Waiting in a barrier would end with the time limit of the process group, which nnU-Net leaves at ten minutes.

    Args:
        store: The preprocessed cases.
        edges_mm: Edges of the supervoxels in mm; none for a stage that needs no supervoxels.
    """
    if not edges_mm:
        return
    if rank() == 0:
        count = prepare_supervoxels(store, edges_mm, min(MOST_PROCESSES, default_processes()))
        if count:
            edges = ", ".join(f"{edge:g}" for edge in edges_mm)
            logger.info(
                f"Partitioned {count} cases into supervoxels with edges of {edges} mm, stored in {store.folder}"
            )
    else:
        while missing_supervoxels(store, edges_mm):
            time.sleep(SECONDS_BETWEEN_LOOKS)


def views_of_batch(
    method: PretextMethod, batch: PatchBatch, volumes: Tensor, generators: Sequence[torch.Generator]
) -> Any:
    """Return the views of a batch, with the mask, places and supervoxels of its patches for methods that need them.

    Args:
        method: The method of the run.
        batch: The batch as it was read.
        volumes: Its patches on the device of the run.
        generators: One generator per sample.
    """
    learnable = None if batch.learnable is None else batch.learnable.to(volumes.device, non_blocking=True)
    views = method.placed(method.make_views(volumes, generators, learnable), batch.cases, batch.lower_vox)
    if batch.supervoxels is None:
        return views
    return method.partitioned(views, batch.supervoxels.to(volumes.device, non_blocking=True))


@contextmanager
def reading(batches: Iterator[PatchBatch]) -> Iterator[Iterator[PatchBatch]]:
    """Yield batches for a ``with`` block, at whose end the processes that read them end, if there are any.

    After an error the traceback keeps the iterator alive, and the interpreter would wait for its readers.
    """
    try:
        yield batches
    finally:
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
