"""One arm of a comparison, from plan and weights to Dice: trained, predicted and evaluated in its own folder.

An arm is one training. nnU-Net's prediction commands accept its folder. A second call skips a finished arm and resumes an
unfinished one.
"""

import os
import re
import shlex
import shutil
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl import schema
from nnssl.checkpoint import FINAL, LATEST
from nnssl.files import content_digest
from nnssl.log import logger, printed_output_to
from nnssl.networks.backbone import planned_configuration
from nnssl.paths import Folders
from nnssl.study.table import SCRATCH
from nnssl.version import __version__
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from planners.finetune_planner import AdoptedPlan
from trainers.finetuning.curves import final_dice
from trainers.finetuning.finetune_trainer import ArmSettings, FinetuneTrainer, make_trainer
from trainers.finetuning.labelled_cases import Split
from trainers.finetuning.linear_probe import LinearProbeTrainer
from trainers.finetuning.mean_teacher import MeanTeacherTrainer
from trainers.finetuning.pretrained_weights import load_weights
from trainers.finetuning.recipes import NetworkKind, network_kind
from trainers.finetuning.result import FILE_NAME, SCHEMA_VERSION, ArmResult, read_dice, read_result
from trainers.finetuning.schedule import FinetuneSchedule

ARM_PREFIX = "nnssl_"
TRAINERS: dict[str, type[FinetuneTrainer]] = {
    "finetune": FinetuneTrainer,
    "linear": LinearProbeTrainer,
    "mean_teacher": MeanTeacherTrainer,
}
"""Trainer of each mode."""


@dataclass(frozen=True)
class Task:
    """Data, plan and settings of an arm. The arms of one call differ in their schedules at most."""

    dataset_name: str
    dataset_json: dict[str, Any]
    plan: AdoptedPlan
    configuration: str
    split: Split
    schedule: FinetuneSchedule
    seed: int
    device: torch.device
    processes: int
    mode: str
    unlabelled: tuple[str, ...]
    unlabelled_folder: Path | None = None
    """Folder of the preprocessed unlabelled cases; None for that of the labelled cases."""
    track: tuple[str, ...] = ()
    """Trackers that curves and pictures are written to; they are no part of what an arm is."""
    mirroring: bool = True
    """Whether a prediction of the held-out cases is the mean over all mirrored images, as in nnU-Net."""

    @property
    def network_kind(self) -> NetworkKind:
        """Kind of the network that is trained."""
        architecture = planned_configuration(self.plan.content, self.configuration)["architecture"]
        return network_kind(architecture["network_class_name"])


def arm_folder(task: Task, weights: OpenedCheckpoint | None, folders: Folders) -> Path:
    """Return the model folder of an arm, ``nnssl_<arm>_<cases>_seed<seed>_<digest>__<plan>__<configuration>``.

    The digest covers everything in which two arms can differ: weights, plan, cases, seed, schedule and mode. Two arms
    therefore never share a folder. The name has nnU-Net's form ``trainer__plan__configuration``, so that
    ``nnUNetv2_predict -tr`` finds the folder as well.
    """
    identity = {
        "weights": weights.digest if weights else None,
        "plan": task.plan.content,
        "configuration": task.configuration,
        "train": sorted(task.split.train),
        "test": sorted(task.split.test),
        **({"validation": sorted(task.split.validation)} if task.split.validation else {}),
        "seed": task.seed,
        "schedule": asdict(task.schedule),
        "mode": task.mode,
        **({} if task.mirroring else {"mirroring": False}),
        **({"unlabelled": sorted(task.unlabelled)} if task.unlabelled else {}),
        **({"consistency": "labelled and unlabelled"} if task.mode == "mean_teacher" else {}),
        **({"unlabelled_in": task.unlabelled_folder.name} if task.unlabelled_folder else {}),
    }
    name = f"{ARM_PREFIX}{_arm_name(weights, task.mode)}_{task.split.name}_seed{task.seed}_{content_digest(identity)}"
    return folders.results / task.dataset_name / f"{name}__{task.plan.name}__{task.configuration}"


def run_arm(task: Task, weights: OpenedCheckpoint | None, folders: Folders, restart: bool) -> ArmResult:
    """Train, predict and evaluate one arm, except for the steps that an earlier call finished.

    Args:
        task: Data, plan and settings.
        weights: Checkpoint that the arm starts from; None for random weights.
        folders: nnU-Net's folders.
        restart: Whether to delete this arm's folder first.

    Returns:
        The arm's result, which is also written to ``finetune.json`` in its folder.

    Raises:
        UserError: If nnU-Net's loader rejects the weights.
    """
    folder = arm_folder(task, weights, folders)
    arm = _arm_name(weights, task.mode)
    if restart and folder.exists():
        shutil.rmtree(folder)
    fold = folder / "fold_0"
    if (folder / FILE_NAME).exists() and (fold / FINAL).exists():
        logger.info(f"Arm {arm}: finished already ({folder})")
        return read_result(folder / FILE_NAME)
    fold.mkdir(parents=True, exist_ok=True)
    resume = (fold / LATEST).exists()
    with printed_output_to(fold / "nnunet_output.txt"):
        trainer = make_trainer(
            task.plan.content,
            task.configuration,
            task.dataset_json,
            task.device,
            _settings(task, folder, weights),
            resume,
            TRAINERS[task.mode],
        )
        with closing(trainer.tracking):
            _train(trainer, weights, fold, arm)
            logger.info(f"Arm {arm}: predicting {len(task.split.test)} held-out cases ...")
            trainer.perform_actual_validation()
            parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
            result = _result(task, weights, folder, parameters)
            trainer.start_tracking()
            trainer.tracking.write_results(final_dice(result))
    schema.write(folder / FILE_NAME, result)
    return result


def _settings(task: Task, folder: Path, weights: OpenedCheckpoint | None) -> ArmSettings:
    return ArmSettings(
        pretrained=weights.own_provenance.pretrained if weights else (),
        schedule=task.schedule,
        seed=task.seed,
        train_cases=task.split.train,
        test_cases=(*task.split.test, *task.split.validation),
        unlabelled_cases=task.unlabelled,
        unlabelled_folder=task.unlabelled_folder,
        model_folder=folder,
        processes=task.processes,
        augmentation_processes=augmentation_processes(task.device),
        track=task.track,
        mirroring=task.mirroring,
    )


def _result(task: Task, weights: OpenedCheckpoint | None, folder: Path, num_parameters: int) -> ArmResult:
    """Return the description of an arm and its Dice, which nnU-Net's evaluation computed."""
    summary = folder / "fold_0" / "validation" / "summary.json"
    dice, mean_dice = read_dice(summary, task.dataset_json["labels"], task.split.test)
    device = "" if task.device.type == "cuda" else f" -device {task.device.type}"
    return ArmResult(
        schema_version=SCHEMA_VERSION,
        nnssl_version=__version__,
        mode=task.mode,
        arm=_arm_name(weights, task.mode),
        dataset_name=task.dataset_name,
        plans_name=task.plan.name,
        configuration=task.configuration,
        weights=str(weights.path) if weights else None,
        weights_digest=weights.digest if weights else None,
        schedule=task.schedule,
        seed=task.seed,
        train_cases=task.split.train,
        test_cases=task.split.test,
        validation_cases=task.split.validation,
        unlabelled_cases=task.unlabelled,
        mirroring=task.mirroring,
        num_parameters=num_parameters,
        dice=dice,
        mean_dice=mean_dice,
        model_folder=str(folder),
        predict_command=(
            "nnUNetv2_predict_from_modelfolder -i INPUT_FOLDER -o OUTPUT_FOLDER "
            f"-m {shlex.quote(str(folder))} -f 0{device}"
        ),
    )


def _train(trainer: FinetuneTrainer, weights: OpenedCheckpoint | None, fold: Path, arm: str) -> None:
    """Train an arm from its initial weights or its last checkpoint, unless it is trained already."""
    if trainer.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnU-Net's command does
    if (fold / FINAL).exists():
        logger.info(f"Arm {arm}: trained already, but not evaluated yet")
        trainer.load_checkpoint(str(fold / FINAL))
        return
    logger.info(f"Arm {arm}: building the network ...")
    if (fold / LATEST).exists():
        trainer.load_checkpoint(str(fold / LATEST))
        logger.info(f"Arm {arm}: resuming at epoch {trainer.current_epoch} of {trainer.num_epochs}")
    elif weights is not None:
        load_weights(trainer, weights)
    else:
        trainer.initialize()
    logger.info(f"Arm {arm}: training in {trainer.precision.name}, log and curve in {fold}")
    trainer.run_training()


def augmentation_processes(device: torch.device) -> int:
    """Return the number of processes that make batches.

    It is 0 on the CPU, where such processes compete with training, unless nnU-Net's variable is set.
    """
    if device.type == "cpu" and "nnUNet_n_proc_DA" not in os.environ:
        return 0
    return get_allowed_n_proc_DA()


def _arm_name(weights: OpenedCheckpoint | None, mode: str) -> str:
    """Return the method and the mode as part of a folder name, without underscores, because nnU-Net splits at double ones."""
    name = weights.own_provenance.method if weights else SCRATCH
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name if mode == "finetune" else f"{name}-{mode}")
