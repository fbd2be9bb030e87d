"""Fine-tuning from data set and weights to Dice: plan, cases, preprocessing, and one arm after the other.

The pretrained arm comes first, and on request the same network, plan, cases, seed and schedule from random weights. What makes a
comparison fair is decided here, once for all arms; ``trainers.finetuning.arm`` does one.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from nnssl.data.jobs import default_processes
from nnssl.data.raw import RawDataset, find_dataset, read_dataset
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.log import logger
from nnssl.networks.backbone import planned_configuration
from nnssl.paths import Folders, resolve_folders
from planners.finetune_planner import adopt_plan
from planners.primus_rules import CLASS_NAME as PRIMUS
from trainers.finetuning.adapted_weights import adapt_if_made_elsewhere
from trainers.finetuning.arm import Task, run_arm
from trainers.finetuning.labelled_cases import Split, choose_unlabelled, find_labelled_cases, fold_split, split_cases
from trainers.finetuning.labelled_data import prepare_data, prepare_unlabelled
from trainers.finetuning.pretrained_weights import NEWEST, Weights, configuration_to_train, open_weights
from trainers.finetuning.result import ArmResult, comparison
from trainers.finetuning.schedule import Optimizer, check_mode, make_schedule


def finetune(
    dataset: str | int,
    weights: str | Path = NEWEST,
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

    Returns:
        The pretrained arm, then the one from scratch if asked for.

    Raises:
        UserError: data set, weights, cases or settings do not fit one another; the message says which and what to do.
    """
    check_mode(mode)
    schedule_for = partial(
        make_schedule, mode, epochs, iterations_per_epoch, warmup_epochs, learning_rate, batch_size, optimizer
    )
    schedule_for(transformer=False)  # a wrong number is told before anything is read
    if unlabelled is not None and mode != "mean_teacher":
        raise UserError(f"--unlabelled {unlabelled}: is for --mode mean_teacher; --mode {mode} learns from labels only")
    processes = processes if processes is not None else default_processes()
    if processes < 1:
        raise UserError(f"--processes {processes}: at least one process does the work; give 1 or more")
    folders = resolve_folders()
    dataset_name = find_dataset(dataset, folders)
    weights = adapt_if_made_elsewhere(weights, dataset_name, folders, processes)
    origin = open_weights(weights, folders)
    labelled = find_labelled_cases(dataset_name, folders)
    split = split_cases(labelled, seed, labels, cases, test_cases)
    configuration = configuration_to_train(configuration, origin)
    network = planned_configuration(origin.provenance.plans, configuration)["architecture"]["network_class_name"]
    schedule = schedule_for(transformer=network == PRIMUS)
    plan = adopt_plan(origin.provenance.plans, dataset_name, folders, plans_name)
    split = split or fold_split(labelled, dataset_name, folders)
    others, source = _find_unlabelled(unlabelled, labelled, split, folders) if mode == "mean_teacher" else ((), None)
    prepare_data(dataset_name, plan, configuration, labelled, folders, processes)
    others_folder = None
    if source is not None:
        others_folder = prepare_unlabelled(source, dataset_name, plan, configuration, folders, processes)
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
    logger.info(f"{dataset_name}: {len(split.train)} cases to train on{also}, {len(split.test)} held out")
    if mode == "linear" and not origin.provenance.pretrains("decoder.stages."):
        logger.info("Note: these weights have no pretrained decoder; the probe sees features of a random one")
    arms: list[Weights | None] = [origin, None] if scratch else [origin]
    return run_arms(task, arms, folders, restart)


def run_arms(task: Task, arms: Sequence[Weights | None], folders: Folders, restart: bool) -> list[ArmResult]:
    """Do every arm, and say how they compare and how to predict with them.

    Args:
        task: what the arms share.
        arms: where each starts; None for random weights.
        folders: nnU-Net's folders.
        restart: delete what there is of these arms first.

    Raises:
        UserError: nnU-Net's loader refuses the weights.
    """
    results = [run_arm(task, arm, folders, restart) for arm in arms]
    for line in comparison(results):
        logger.info(line)
    return results


def _find_unlabelled(
    unlabelled: str | int | None, labelled: tuple[str, ...], split: Split, folders: Folders
) -> tuple[tuple[str, ...], RawDataset | None]:
    """Return the cases of which the mean teacher sees the images, and their data set, None for the labelled one."""
    if unlabelled is None or Path(str(unlabelled)).exists():
        return choose_unlabelled(labelled, split, None if unlabelled is None else Path(str(unlabelled))), None
    source = read_dataset(unlabelled, folders)
    return tuple(case.name for case in source.cases), source
