"""The training of an arm, from its initial weights or its last checkpoint, in one process or several."""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnssl.checkpoint import FINAL, LATEST
from nnssl.distributed import rank
from nnssl.log import logger, printed_output_to, silence
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from trainers.finetuning.arm_settings import ArmSettings
from trainers.finetuning.finetune_trainer import FinetuneTrainer, make_trainer
from trainers.finetuning.labelled_cases import Fold
from trainers.finetuning.linear_probe import LinearProbeTrainer
from trainers.finetuning.mean_teacher import MeanTeacherTrainer
from trainers.finetuning.pretrained_weights import load_weights

TRAINERS: dict[str, type[FinetuneTrainer]] = {
    "finetune": FinetuneTrainer,
    "linear": LinearProbeTrainer,
    "mean_teacher": MeanTeacherTrainer,
}
"""Trainer of each mode."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a process needs to train an arm, as plain values that can be sent to other processes.

    Attributes:
        arm: Name of the arm.
        plans: Content of the plans file.
        configuration: Configuration of the plan.
        dataset_json: Content of ``dataset.json``.
        device: Device to train on; with several GPUs each process uses its own.
        settings: Schedule, cases, seed and folder.
        mode: Mode of fine-tuning.
        fold: Fold, after which the folder of the run is named.
        weights: Checkpoint that the arm starts from; None for random weights.
    """

    arm: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    device: torch.device
    settings: ArmSettings
    mode: str
    fold: Fold
    weights: OpenedCheckpoint | None

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.settings.model_folder / f"fold_{self.fold}"


def trainer_for(job: TrainingJob) -> FinetuneTrainer:
    """Make the trainer of a job. Its network is not built yet."""
    return make_trainer(
        job.plans,
        job.configuration,
        job.dataset_json,
        job.device,
        job.settings,
        (job.folder / LATEST).exists(),
        TRAINERS[job.mode],
        job.fold,
    )


def train(trainer: FinetuneTrainer, job: TrainingJob) -> None:
    """Train an arm from its initial weights or its last checkpoint, unless it is trained already.

    Raises:
        UserError: If nnU-Net's loader rejects the weights.
    """
    if trainer.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnU-Net's command does
    if (job.folder / FINAL).exists():
        logger.info(f"Arm {job.arm}: trained, but not evaluated yet")
        trainer.load_checkpoint(str(job.folder / FINAL))
        return
    logger.info(f"Arm {job.arm}: building the network ...")
    if (job.folder / LATEST).exists():
        trainer.load_checkpoint(str(job.folder / LATEST))
        logger.info(f"Arm {job.arm}: resuming at epoch {trainer.current_epoch} of {trainer.num_epochs}")
    elif job.weights is not None:
        load_weights(trainer, job.weights)
    else:
        trainer.initialize()
    logger.info(f"Arm {job.arm}: training in {trainer.precision.name}, log and curve in {job.folder}")
    trainer.run_training()


def train_in_group(job: TrainingJob) -> None:
    """Train an arm as one process of a group; only the first one writes files and messages."""
    first = rank() == 0
    printed = job.folder / ("nnunet_output.txt" if first else f"nnunet_output_{rank()}.txt")
    with printed_output_to(printed), nullcontext() if first else silence():
        trainer = trainer_for(job)
        with closing(trainer.tracking):
            train(trainer, job)
