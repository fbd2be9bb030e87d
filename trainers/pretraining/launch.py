"""Starts a stage in this process, in the processes that torchrun started, or in new processes."""

import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnssl.checkpoint import LATEST
from nnssl.files import read_json
from trainers.pretraining import pretext
from trainers.pretraining.pretrain_trainer import PretrainTrainer
from trainers.pretraining.stage_run import RunOptions

LONGEST_WAIT = timedelta(hours=24)
"""Timeout of the process group: all processes wait while the first one pairs or examines whole scans."""


@dataclass(frozen=True)
class StageJob:
    """Everything that a process needs to run a stage, as plain values that can be sent to other processes.

    Attributes:
        plan: Plans file.
        trainer: Name of a class in ``trainers.pretraining.pretext``.
        configuration: Configuration of the plan that the stage runs in.
        options: Options of the run.
        device: Device to train on; with several GPUs each process uses its own.
    """

    plan: Path
    trainer: str
    configuration: str
    options: RunOptions
    device: torch.device


def launch(job: StageJob, processes: int) -> None:
    """Run a stage in the processes that torchrun started, or else in ``processes`` processes on this machine."""
    if _launched():
        _run_in_group(job, *(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    elif processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_run_rank, args=(job, processes, port), nprocs=processes)
    else:
        run_stage(job)


def number_of_processes(wanted: int) -> int:
    """Return the number of processes that a stage will run in: that of torchrun, or else the wanted number."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else wanted


def is_first_process() -> bool:
    """Return whether this is the only process so far, or the first one that torchrun started."""
    return not _launched() or os.environ["RANK"] == "0"


def _launched() -> bool:
    """Return whether torchrun started this process, perhaps on several nodes."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_stage(job: StageJob) -> None:
    """Run a stage in this process, resuming from its last checkpoint if there is one."""
    trainer_class: type[PretrainTrainer] = getattr(pretext, job.trainer)
    plans: dict[str, Any] = read_json(job.plan, "plan")
    plans["continue_training"] = True
    dataset_json = read_json(job.plan.parent / "dataset.json", "description of the data set")
    trainer = trainer_class(plans, job.configuration, "all", dataset_json, job.device)
    trainer.options = job.options
    latest = Path(trainer.output_folder) / LATEST
    if latest.exists():
        trainer.load_checkpoint(str(latest))
    trainer.run_training()


def _run_rank(rank: int, job: StageJob, processes: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    _run_in_group(job, rank, rank, processes)


def _run_in_group(job: StageJob, rank: int, local_rank: int, processes: int) -> None:
    """Join the process group and run a stage as one of its processes; ``MASTER_ADDR`` and ``MASTER_PORT`` must be set."""
    if job.device.type == "cuda":
        torch.cuda.set_device(local_rank)
        job = replace(job, device=torch.device("cuda", local_rank))
    backend = "nccl" if job.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=processes, timeout=LONGEST_WAIT)
    try:
        run_stage(job)
        # The first process writes the files that the next stage reads.
        dist.barrier()
    finally:
        dist.destroy_process_group()
