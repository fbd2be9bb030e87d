"""The patches that a run of a stage is shown, from its current step to its end."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nnssl.data.case_store import CaseStore
from nnssl.data.loader import PatchBatch, default_workers, make_loader
from nnssl.data.patch_pairs import PairTable
from nnssl.distributed import rank, world_size
from nnssl.log import logger
from trainers.pretraining.stage_run import StageRun


def patches_of_run(
    store: CaseStore,
    run: StageRun,
    pairs: PairTable | None,
    first_step: int,
    workers: int | None,
    device: torch.device,
) -> Iterator[PatchBatch]:
    """Return the batches of this process, one for each step from ``first_step`` to the end of the stage.

    Args:
        store: The preprocessed cases.
        run: The run, which determines patch size, batch size, seed and number of steps.
        pairs: Pairs of places for stages that compare scans; None for all other stages.
        first_step: Step to start or resume from, counted from 0.
        workers: Number of processes that read patches; None for the device's default.
        device: Device that the patches will be moved to.
    """
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
        )
    )


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
