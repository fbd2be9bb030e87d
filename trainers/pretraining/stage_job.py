"""A stage as a job for one or several processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnssl.checkpoint import LATEST
from nnssl.files import read_json
from trainers.pretraining import pretext
from trainers.pretraining.pretrain_trainer import PretrainTrainer
from trainers.pretraining.stage_run import RunOptions


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
