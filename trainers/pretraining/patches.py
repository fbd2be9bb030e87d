"""The patches that a run of a stage is shown, from its current step to its end."""

from collections.abc import Iterator

import torch

from nnssl.data.case_store import CaseStore
from nnssl.data.loader import PatchBatch, default_workers, make_loader
from nnssl.data.patch_pairs import PairTable
from nnssl.distributed import rank, world_size
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
            num_workers=default_workers(device) if workers is None else workers,
            pin_memory=device.type == "cuda",
            pairs=pairs,
        )
    )
