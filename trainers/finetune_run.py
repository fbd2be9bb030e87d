"""Fine-tuning from data set and weights to Dice: plan, preprocess, train, predict and evaluate, once per arm.

An arm is one training: the pretrained one, and on request the same network, plan, cases, seed and schedule from random
weights. Every arm has a folder of its own that nnU-Net's prediction commands take. A second call recognises finished
arms and goes on with unfinished ones.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

import nnssl
from nnssl import schema
from nnssl.data.raw import find_dataset, read_dataset
from nnssl.environment import quiet
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.paths import Folders, resolve_folders
from planners.finetune_planner import AdoptedPlan, adopt_plan
from planners.primus_rules import CLASS_NAME as PRIMUS
from trainers.adapted_weights import adapt_if_made_elsewhere
from trainers.finetune import FinetuneSettings, FinetuneTrainer, Optimizer, make_trainer
from trainers.finetune_result import (
    FILE_NAME,
    SCHEMA_VERSION,
    SCRATCH,
    ArmResult,
    FinetuneSchedule,
    comparison,
    read_dice,
    read_result,
)
from trainers.labelled_cases import Split, choose_unlabelled, find_labelled_cases, fold_split, split_cases
from trainers.labelled_data import prepare_data, prepare_unlabelled
from trainers.linear_probe import LinearProbeTrainer
from trainers.mean_teacher import MeanTeacherTrainer
from trainers.pretrained_weights import FINAL, LATEST, Weights, choose_configuration, load_weights, open_weights

Say = Callable[[str], None]
RESUMABLE = "checkpoint_latest.pth"
ARM_PREFIX = "nnssl_"


@dataclass(frozen=True)
class Mode:
    """What is trained, and the numbers that it takes where the user gives none."""

    trainer: type[FinetuneTrainer]
    learning_rate: float
    optimizers: tuple[Optimizer, ...]
    """Those it can be trained with; the first is the default."""


MODES = {
    "finetune": Mode(FinetuneTrainer, 0.01, ("sgd", "adam", "adamw")),  # nnU-Net
    "linear": Mode(LinearProbeTrainer, 0.01, ("adam",)),  # Pix2Rep
    "mean_teacher": Mode(MeanTeacherTrainer, 0.01, ("sgd", "adam", "adamw")),  # nnU-Net, and UA-MT's too
}
ADAMW_RATE = 3e-4
"""Of nnU-Net's own trainers of Primus, which learns little by SGD."""


@dataclass(frozen=True)
class Task:
    """What all arms of one call share."""

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
    """Where these lie preprocessed; None for the folder of the labelled cases."""


def finetune(
    dataset: str | int,
    weights: str | Path = LATEST,
    *,
    configuration: str | None = None,
    scratch: bool = False,
    labels: int | None = None,
    cases: Path | None = None,
    test_cases: Path | None = None,
    seed: int = 0,
    epochs: int = 1000,
    iterations_per_epoch: int = 250,
    warmup_epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer | None = None,
    device: torch.device | None = None,
    processes: int | None = None,
    plans_name: str | None = None,
    mode: str = "finetune",
    unlabelled: str | int | None = None,
    restart: bool = False,
    say: Say = lambda line: None,
) -> list[ArmResult]:
    """Fine-tune pretrained weights on a labelled data set and evaluate them on its held-out cases.

    Args:
        dataset: number or name of a labelled data set in nnU-Net's raw format.
        weights: a checkpoint of nnssl, or one made elsewhere in the adaptation-plan format, around which the data set is then
            planned; or ``"latest"`` for the newest finished pretraining.
        configuration: configuration of the weights' plan; None for the one they were pretrained with.
        scratch: also train the same from random weights.
        labels: number of training cases, drawn by ``seed`` so that smaller numbers are subsets of larger ones; all
            others are held out. Without it and without lists: nnU-Net's fold 0.
        cases: file with the training cases, one name per line, in place of ``labels``.
        test_cases: file with the held-out cases.
        seed: decides label subset, random weights and batches.
        epochs: epochs in all, warm-up included; nnU-Net's default.
        iterations_per_epoch: optimizer steps per epoch.
        warmup_epochs: epochs of rising learning rate; None for one in twenty.
        learning_rate: the highest one; None for the mode's, 0.01 in each, or 3e-4 with AdamW.
        batch_size: patches per step; None for the plan's.
        optimizer: ``"sgd"`` as nnU-Net, or ``"adam"``, which needs fewer steps and another learning rate; None for the
            mode's, Adam for ``"linear"`` and else SGD; ``"adamw"`` as nnU-Net trains Primus, whose default it is.
        device: where to compute; None for the GPU if there is one.
        processes: processes for preprocessing and evaluation; None for as many as there are cores, 8 at most.
        plans_name: name for the plan in the data set's folder; None to choose.
        mode: ``"finetune"`` trains all weights, ``"linear"`` the last segmentation layer alone, ``"mean_teacher"`` all weights
            with a consistency term on unlabelled cases.
        unlabelled: file with these cases, one name per line, or a data set (number or name), all of whose images are taken;
            None for all labelled cases that are neither trained on nor held out.
        restart: delete these arms first and train them again.
        say: called with lines for the user.

    Returns:
        The pretrained arm, then the one from scratch if asked for.

    Raises:
        UserError: data set, weights, cases or settings do not fit one another; the message says which and what to do.
    """
    if mode not in MODES:
        raise UserError(f"--mode {mode}: is not known; take one of {', '.join(MODES)}")
    check_schedule(mode, epochs, iterations_per_epoch, warmup_epochs, learning_rate, batch_size, optimizer)
    if unlabelled is not None and mode != "mean_teacher":
        raise UserError(f"--unlabelled {unlabelled}: is for --mode mean_teacher; --mode {mode} learns from labels only")
    processes = processes if processes is not None else min(8, os.cpu_count() or 1)
    if processes < 1:
        raise UserError(f"--processes {processes}: at least one process does the work; give 1 or more")
    folders = resolve_folders(say)
    dataset_name = find_dataset(dataset, folders)
    weights = adapt_if_made_elsewhere(weights, dataset_name, folders, processes, say)
    origin = open_weights(weights, folders, say)
    labelled = find_labelled_cases(dataset_name, folders)
    split = split_cases(labelled, seed, labels, cases, test_cases)
    configuration = choose_configuration(configuration, origin)
    network = origin.provenance.plans["configurations"][configuration].get("architecture", {}).get("network_class_name")
    schedule = check_schedule(
        mode, epochs, iterations_per_epoch, warmup_epochs, learning_rate, batch_size, optimizer, network == PRIMUS
    )
    plan = adopt_plan(origin.provenance.plans, dataset_name, folders, say, plans_name)
    split = split or fold_split(labelled, dataset_name, folders)
    others: tuple[str, ...] = ()
    source = None
    if mode == "mean_teacher" and unlabelled is not None and not Path(str(unlabelled)).exists():
        source = read_dataset(unlabelled, folders, say)
        others = tuple(case.name for case in source.cases)
    elif mode == "mean_teacher":
        others = choose_unlabelled(labelled, split, None if unlabelled is None else Path(str(unlabelled)))
    prepare_data(dataset_name, plan, configuration, labelled, folders, processes, say)
    others_folder = None
    if source is not None:
        others_folder = prepare_unlabelled(source, dataset_name, plan, configuration, folders, processes, say)
    task = Task(
        dataset_name=dataset_name,
        dataset_json=read_json(folders.preprocessed / dataset_name / "dataset.json", "dataset.json"),
        plan=plan,
        configuration=configuration,
        split=split,
        schedule=schedule,
        seed=seed,
        device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        processes=processes,
        mode=mode,
        unlabelled=others,
        unlabelled_folder=others_folder,
    )
    also = f", {len(others)} without their labels" if others else ""
    say(f"{dataset_name}: {len(split.train)} cases to train on{also}, {len(split.test)} held out")
    if mode == "linear" and not origin.provenance.pretrains("decoder.stages."):
        say("Note: these weights have no pretrained decoder; the probe sees features of a random one")
    arms: list[Weights | None] = [origin, None] if scratch else [origin]
    results = [run_arm(task, arm, folders, restart, say) for arm in arms]
    for line in comparison(results):
        say(line)
    say("Predict other images with")
    for result in results:
        say(f"  {result.predict_command}")
    return results


def arm_folder(task: Task, weights: Weights | None, folders: Folders) -> Path:
    """Return the model folder of an arm, ``nnssl_<arm>_<cases>_seed<seed>_<digest>__<plan>__<configuration>``.

    The digest is over everything that makes two arms differ: weights, plan, cases, seed, schedule, mode. So two arms
    never share a folder, and a folder never holds another arm than the one asked for. The name has nnU-Net's form
    ``trainer__plan__configuration``, so ``nnUNetv2_predict -tr`` finds it too.
    """
    identity = {
        "weights": weights.digest if weights else None,
        "plan": task.plan.content,
        "configuration": task.configuration,
        "train": sorted(task.split.train),
        "test": sorted(task.split.test),
        "seed": task.seed,
        "schedule": {key: value for key, value in asdict(task.schedule).items() if value not in (None, "sgd")},
        "mode": task.mode,
        **({"unlabelled": sorted(task.unlabelled)} if task.unlabelled else {}),
        **({"unlabelled_in": task.unlabelled_folder.name} if task.unlabelled_folder else {}),
    }
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    name = f"{ARM_PREFIX}{_arm_name(weights, task.mode)}_{task.split.name}_seed{task.seed}_{digest}"
    return folders.results / task.dataset_name / f"{name}__{task.plan.name}__{task.configuration}"


def run_arm(task: Task, weights: Weights | None, folders: Folders, restart: bool, say: Say) -> ArmResult:
    """Train, predict and evaluate one arm, or what is left to do of it.

    Args:
        task: what the arms share.
        weights: where the arm starts; None for random weights.
        folders: nnU-Net's folders.
        restart: delete what there is of this arm first.
        say: called with lines for the user.

    Returns:
        The arm's result, which stands in ``finetune.json`` of its folder too.

    Raises:
        UserError: nnU-Net's loader refuses the weights.
    """
    folder = arm_folder(task, weights, folders)
    arm = _arm_name(weights, task.mode)
    if restart and folder.exists():
        shutil.rmtree(folder)
    fold = folder / "fold_0"
    if (folder / FILE_NAME).exists() and (fold / FINAL).exists():
        say(f"Arm {arm}: finished already ({folder})")
        return read_result(folder / FILE_NAME)
    fold.mkdir(parents=True, exist_ok=True)
    settings = FinetuneSettings(
        **asdict(task.schedule),
        seed=task.seed,
        train_cases=task.split.train,
        test_cases=task.split.test,
        unlabelled_cases=task.unlabelled,
        unlabelled_folder=task.unlabelled_folder,
        model_folder=folder,
        processes=task.processes,
        augmentation_processes=_augmentation_processes(task.device),
    )
    resume = (fold / RESUMABLE).exists()
    with quiet(fold / "nnunet_output.txt", say) as aloud:
        trainer = make_trainer(
            task.plan.content,
            task.configuration,
            task.dataset_json,
            task.device,
            settings,
            aloud,
            resume,
            MODES[task.mode].trainer,
        )
        _train(trainer, weights, fold, arm, aloud)
        aloud(f"Arm {arm}: predicting {len(task.split.test)} held-out cases ...")
        trainer.perform_actual_validation()
    dice, mean_dice = read_dice(fold / "validation" / "summary.json", task.dataset_json["labels"])
    device = "" if task.device.type == "cuda" else f" -device {task.device.type}"
    result = ArmResult(
        schema_version=SCHEMA_VERSION,
        nnssl_version=nnssl.__version__,
        mode=task.mode,
        arm=arm,
        dataset_name=task.dataset_name,
        plans_name=task.plan.name,
        configuration=task.configuration,
        weights=str(weights.path) if weights else None,
        weights_digest=weights.digest if weights else None,
        schedule=task.schedule,
        seed=task.seed,
        train_cases=task.split.train,
        test_cases=task.split.test,
        unlabelled_cases=task.unlabelled,
        num_parameters=sum(parameter.numel() for parameter in trainer.network.parameters()),
        dice=dice,
        mean_dice=mean_dice,
        model_folder=str(folder),
        predict_command=(
            "nnUNetv2_predict_from_modelfolder -i INPUT_FOLDER -o OUTPUT_FOLDER "
            f"-m {shlex.quote(str(folder))} -f 0{device}"
        ),
    )
    schema.write(folder / FILE_NAME, result)
    return result


def _train(trainer: FinetuneTrainer, weights: Weights | None, fold: Path, arm: str, say: Say) -> None:
    """Train from where the arm stands: not at all, from its last checkpoint, or from its first weights."""
    if trainer.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnU-Net's command
    if (fold / FINAL).exists():
        say(f"Arm {arm}: trained already, not evaluated yet")
        trainer.load_checkpoint(str(fold / FINAL))
        return
    if (fold / RESUMABLE).exists():
        trainer.load_checkpoint(str(fold / RESUMABLE))
        say(f"Arm {arm}: goes on at epoch {trainer.current_epoch} of {trainer.num_epochs}")
    elif weights is not None:
        load_weights(trainer, weights)
    else:
        trainer.initialize()
    say(f"Arm {arm}: training in {trainer.precision.name}, log and curve in {fold}")
    trainer.run_training()


def _augmentation_processes(device: torch.device) -> int:
    """None on the CPU, where they would compete with training, unless nnU-Net's variable asks for them."""
    if device.type == "cpu" and "nnUNet_n_proc_DA" not in os.environ:
        return 0
    return get_allowed_n_proc_DA()


def _arm_name(weights: Weights | None, mode: str) -> str:
    """Method and mode, fit for a folder name: nnU-Net splits at double underscores."""
    name = weights.provenance.method if weights else SCRATCH
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name if mode == "finetune" else f"{name}-{mode}")


def check_schedule(
    mode: str,
    epochs: int,
    iterations: int,
    warmup: int | None,
    learning_rate: float | None,
    batch_size: int | None,
    optimizer: Optimizer | None,
    transformer: bool = False,
) -> FinetuneSchedule:
    """Return the schedule of a mode, with the mode's numbers where None is given, or those of Primus for a transformer.

    Raises:
        UserError: a number or the optimizer does not fit.
    """
    if transformer and optimizer is None and "adamw" in MODES[mode].optimizers:
        optimizer = "adamw"
    optimizer = optimizer or MODES[mode].optimizers[0]
    if learning_rate is None:
        learning_rate = ADAMW_RATE if optimizer == "adamw" else MODES[mode].learning_rate
    if optimizer not in MODES[mode].optimizers:
        raise UserError(
            f"--optimizer {optimizer}: --mode {mode} takes {' or '.join(MODES[mode].optimizers)}; leave it out"
        )
    warmup = epochs // 20 if warmup is None else warmup
    if epochs < 1 or iterations < 1:
        raise UserError(f"--epochs {epochs}, --iterations-per-epoch {iterations}: each is 1 or more")
    if not 0 <= warmup < epochs:
        raise UserError(f"--warmup-epochs {warmup}: is not within 0 to {epochs - 1}; it is part of the {epochs} epochs")
    if learning_rate <= 0:
        raise UserError(f"--learning-rate {learning_rate}: is above 0")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: is 1 or more")
    return FinetuneSchedule(epochs, iterations, warmup, learning_rate, batch_size, optimizer)
