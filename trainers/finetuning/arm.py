"""One arm of a comparison, from plan and weights to Dice: trained, predicted and evaluated in its own folder.

An arm is one training. nnU-Net's prediction commands accept its folder. A second call skips a finished arm and resumes an
unfinished one.
"""

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl import schema
from nnssl.checkpoint import FINAL
from nnssl.data.contents import Content, describe_changes, read_contents, write_contents
from nnssl.files import content_digest
from nnssl.locks import only_process
from nnssl.log import logger, printed_output_to
from nnssl.networks.backbone import planned_configuration
from nnssl.paths import Folders
from nnssl.study.table import SCRATCH
from nnssl.version import __version__
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.tensor_names import HEAD
from planners.finetune_planner import AdoptedPlan
from trainers.finetuning.arm_settings import ArmSettings
from trainers.finetuning.case_contents import FILE_NAME as CONTENTS_NAME
from trainers.finetuning.case_contents import Changes, find_changes
from trainers.finetuning.curves import final_dice
from trainers.finetuning.labelled_cases import Fold, Split
from trainers.finetuning.recipes import NetworkKind, network_kind
from trainers.finetuning.result import FILE_NAME, SCHEMA_VERSION, ArmResult, read_dice, read_result
from trainers.finetuning.schedule import FinetuneSchedule
from trainers.finetuning.training import TrainingJob, train, train_in_group, trainer_for
from trainers.launch import launch

ARM_PREFIX = "nnssl_"
OUTDATED = "outdated_"
"""Prefix of the folder in which a fold is kept that was trained on cases that have changed since."""


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
    unlabelled_pool: tuple[str, ...] = ()
    """Cases of which the unlabelled ones are left over in every fold of a cross-validation; empty without folds."""
    unlabelled_folder: Path | None = None
    """Folder of the preprocessed unlabelled cases; None for that of the labelled cases."""
    track: tuple[str, ...] = ()
    """Trackers that curves and pictures are written to; they are no part of what an arm is."""
    mirroring: bool = True
    """Whether a prediction of the held-out cases is the mean over all mirrored images, as in nnU-Net."""

    keeps_head: bool = False
    """Whether pretrained segmentation layers are kept, because they were trained with the same labels."""

    num_gpus: int = 1
    """Number of training processes, one per GPU; they are no part of what an arm is."""
    save_probabilities: bool = False
    """Whether the probabilities of the held-out cases are kept, as nnU-Net's ensembles of configurations need."""
    contents: Mapping[str, Content] = field(default_factory=dict)
    """Present state of the cases; it does not belong to what an arm is, but decides whether a finished one is up to date."""

    @property
    def fold(self) -> Fold:
        """Fold after which nnU-Net names the folder of the run."""
        return 0 if self.split.fold is None else self.split.fold

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
        **_cases(task.split),
        "seed": task.seed,
        "schedule": asdict(task.schedule),
        "mode": task.mode,
        **({} if task.mirroring else {"mirroring": False}),
        **({"keeps_head": True} if task.keeps_head and weights else {}),
        **({"unlabelled": sorted(task.unlabelled_pool or task.unlabelled)} if task.unlabelled else {}),
        **({"consistency": "labelled and unlabelled"} if task.mode == "mean_teacher" else {}),
        **({"unlabelled_in": task.unlabelled_folder.name} if task.unlabelled_folder else {}),
    }
    name = f"{ARM_PREFIX}{_arm_name(weights, task.mode)}_{task.split.name}_seed{task.seed}_{content_digest(identity)}"
    return folders.results / task.dataset_name / f"{name}__{task.plan.name}__{task.configuration}"


def _cases(split: Split) -> dict[str, Any]:
    """Return the cases by which model folders differ; all folds of a cross-validation share one."""
    if split.fold is not None:
        return {"folds": split.folds_digest}
    validation = {"validation": sorted(split.validation)} if split.validation else {}
    return {"train": sorted(split.train), "test": sorted(split.test), **validation}


def result_file(task: Task, folder: Path) -> Path:
    """Return the file with the result of an arm: in its model folder, or in the folder of its fold."""
    return folder / FILE_NAME if task.split.fold is None else folder / f"fold_{task.fold}" / FILE_NAME


def changes_of_arm(task: Task, folder: Path) -> Changes:
    """Return what has changed in the cases of an arm since it was trained and scored."""
    held_out = (*task.split.test, *task.split.validation)
    fold = folder / f"fold_{task.fold}"
    return find_changes(fold, task.contents, task.split.train, task.unlabelled, held_out)


def _settle_changes(task: Task, arm: str, folder: Path) -> None:
    """Set aside a training on cases that have changed since, or the scores of held-out cases that have, and say so."""
    fold, result = folder / f"fold_{task.fold}", result_file(task, folder)
    changes = changes_of_arm(task, folder)
    if changes.trained:
        kept = folder / f"{OUTDATED}fold_{task.fold}"
        logger.info(
            f"Arm {arm}: cases that it was trained on have changed since ({describe_changes(changes.trained)}); it is trained "
            f"again, and the earlier training is kept in {kept}"
        )
    elif changes.held_out:
        logger.info(
            f"Arm {arm}: {task.split.what} have changed since they were scored ({describe_changes(changes.held_out)}); they are "
            "predicted and scored again"
        )
    if changes:
        outdated = [result, fold / "validation" / "summary.json"]
        if task.split.fold is None:
            outdated += folder.glob("metrics_*.csv")  # of a study
        for path in outdated:
            path.unlink(missing_ok=True)
    if changes.trained:
        shutil.rmtree(kept, ignore_errors=True)
        fold.rename(kept)


def _remember(task: Task, fold: Path) -> None:
    """Write the state of the cases of an arm, unless it is written already."""
    unlabelled = set(task.unlabelled)
    cases = {case: task.contents[case] for case in {*task.split.cases, *unlabelled} if case in task.contents}
    if cases and read_contents(fold / CONTENTS_NAME) != cases:
        write_contents(fold / CONTENTS_NAME, cases)


def run_arm(task: Task, weights: OpenedCheckpoint | None, folders: Folders, restart: bool) -> ArmResult:
    """Train, predict and evaluate one arm, or one of its folds, except for the steps that an earlier call finished.

    An arm is trained again if images or labels that it was trained on have changed since, and scored again if those of held-out
    cases have.

    Args:
        task: Data, plan and settings.
        weights: Checkpoint that the arm starts from; None for random weights.
        folders: nnU-Net's folders.
        restart: Whether to delete this arm's folder, or that of the fold, first.

    Returns:
        The result, which is also written to ``finetune.json`` (``result_file``).

    Raises:
        UserError: If nnU-Net's loader rejects the weights.
        ArgumentError: If another process works on this arm, for a restart; otherwise this one waits.
    """
    folder = arm_folder(task, weights, folders)
    own = folder if task.split.fold is None else folder / f"fold_{task.fold}"
    own.parent.mkdir(parents=True, exist_ok=True)
    with only_process(own, "fine-tuning", wait=not restart):
        if restart and own.exists():
            shutil.rmtree(own)
        return _run_arm_alone(task, weights, folder)


def _run_arm_alone(task: Task, weights: OpenedCheckpoint | None, folder: Path) -> ArmResult:
    arm = _arm_name(weights, task.mode)
    fold = folder / f"fold_{task.fold}"
    file = result_file(task, folder)
    _settle_changes(task, arm, folder)
    if file.exists() and (fold / FINAL).exists() and _has_probabilities(task, fold):
        logger.info(f"Arm {arm}: finished already ({fold})")
        _remember(task, fold)
        return read_result(file)
    fold.mkdir(parents=True, exist_ok=True)
    _remember(task, fold)
    job = TrainingJob(
        arm,
        task.plan.content,
        task.configuration,
        task.dataset_json,
        task.device,
        _settings(task, folder, weights),
        task.mode,
        task.fold,
        weights.without_content() if weights else None,
    )
    if task.num_gpus > 1 and not (fold / FINAL).exists():
        launch(train_in_group, job, task.num_gpus)
    with printed_output_to(fold / "nnunet_output.txt"):
        trainer = trainer_for(job)
        with closing(trainer.tracking):
            train(trainer, job)
            logger.info(f"Arm {arm}: predicting {len(task.split.test)} {task.split.what} ...")
            trainer.perform_actual_validation(task.save_probabilities)
            parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
            result = _result(task, weights, folder, parameters)
            trainer.start_tracking()
            trainer.tracking.write_results(final_dice(result))
    schema.write(file, result)
    return result


def _has_probabilities(task: Task, fold: Path) -> bool:
    """Return whether the probabilities of all held-out cases exist, if they are wanted."""
    wanted = task.split.test if task.save_probabilities else ()
    return all((fold / "validation" / f"{case}.npz").exists() for case in wanted)


def _settings(task: Task, folder: Path, weights: OpenedCheckpoint | None) -> ArmSettings:
    return ArmSettings(
        pretrained=_pretrained(task, weights),
        schedule=task.schedule,
        validation_iterations=task.schedule.held_out_batches,
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


def _pretrained(task: Task, weights: OpenedCheckpoint | None) -> tuple[str, ...]:
    """Return the prefixes of pretrained parameters, with the segmentation layers only if they are kept."""
    if weights is None:
        return ()
    listed = tuple(prefix for prefix in weights.own_provenance.pretrained if not prefix.startswith(HEAD))
    return (*listed, HEAD) if task.keeps_head else listed


def _result(task: Task, weights: OpenedCheckpoint | None, folder: Path, num_parameters: int) -> ArmResult:
    """Return the description of an arm and its Dice, which nnU-Net's evaluation computed."""
    summary = folder / f"fold_{task.fold}" / "validation" / "summary.json"
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
        fold=task.split.fold,
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
            f"-m {shlex.quote(str(folder))} -f {task.fold}{device}"
        ),
    )


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
