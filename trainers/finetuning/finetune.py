"""Fine-tuning from data set and weights to Dice: plan, cases, preprocessing, and one arm after the other.

The pretrained arm comes first. On request, a second arm trains the same network with the same plan, cases, seed and schedule
from random weights. This module chooses these once for all arms, which makes the comparison fair; ``trainers.finetuning.arm``
runs a single arm.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.jobs import default_processes
from nnssl.data.raw import RawDataset, find_dataset, read_dataset
from nnssl.devices import find_device
from nnssl.errors import ArgumentError
from nnssl.evaluation.labels import ignore_label
from nnssl.files import read_json, read_names
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.networks.backbone import planned_configuration
from nnssl.paths import Folders, make_writable, use_folders
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from planners.finetune_planner import AdoptedPlan, adopt_plan, with_pyramid_segmentation
from trainers.finetuning.adapted_weights import adapt_if_made_elsewhere
from trainers.finetuning.arm import Task, run_arm
from trainers.finetuning.cross_validation import log_cross_validation
from trainers.finetuning.held_out import without_held_out
from trainers.finetuning.labelled_cases import (
    FOLDS,
    Fold,
    Split,
    choose_unlabelled,
    find_labelled_cases,
    fold_split,
    split_cases,
)
from trainers.finetuning.labelled_data import prepare_data, prepare_unlabelled
from trainers.finetuning.pretrained_weights import NEWEST, find_weights, log_weights
from trainers.finetuning.recipes import network_kind
from trainers.finetuning.result import ArmResult, comparison
from trainers.finetuning.settings import FinetuneSettings, schedule_from
from trainers.launch import is_first_process, number_of_processes
from trainers.tracking import check_trackers


def finetune(
    dataset: str | int,
    weights: str | Path = NEWEST,
    settings: FinetuneSettings | None = None,
    folders: Folders | None = None,
) -> list[ArmResult]:
    """Fine-tune pretrained weights on a labelled data set and evaluate them on its held-out cases.

    Args:
        dataset: Number or name of a labelled data set in nnU-Net's raw format.
        weights: A checkpoint of nnssl or of nnU-Net's training; a checkpoint made elsewhere in the adaptation-plan format, around
            which the data set is then planned; or ``"latest"`` for the newest finished pretraining.
        settings: How to fine-tune; None for the defaults.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        The pretrained arm, then the one from scratch if requested; for each fold in turn.

    Raises:
        UserError: If data set, weights, cases or settings do not fit one another; the message says which and what to do.

    Examples:
        >>> settings = nnssl.FinetuneSettings(labels=3, epochs=1, iterations_per_epoch=2, processes=1)
        >>> (arm,) = nnssl.finetune(4, weights, settings)
        >>> arm.arm, len(arm.train_cases), len(arm.test_cases)
        ('pix2rep', 3, 5)
    """
    settings = settings or FinetuneSettings()
    schedule_from(settings, "unet", pretrained=True)  # reports a wrong number before any file is read
    check_trackers(settings.track)
    if settings.unlabelled is not None and settings.mode != "mean_teacher":
        raise ArgumentError(
            f"unlabelled can only be given with mode mean_teacher; mode {settings.mode} learns from labels only",
            "unlabelled",
            "mode",
        )
    _check_folds(settings)
    processes = settings.processes if settings.processes is not None else default_processes()
    if processes < 1:
        raise ArgumentError(f"processes must be at least 1, got {processes}", "processes")
    with use_folders(folders) as used:
        return _finetune(dataset, weights, settings, used, processes)


def _check_folds(settings: FinetuneSettings) -> None:
    """Check folds and the number of training processes.

    Raises:
        ArgumentError: If they are out of range, or if the cases are chosen otherwise as well.
    """
    if not is_first_process() or number_of_processes(1) > 1:
        raise ArgumentError(
            "num_gpus starts the processes of a fine-tuning; run the command without torchrun", "num_gpus"
        )
    if settings.num_gpus < 1:
        raise ArgumentError(f"num_gpus must be at least 1, got {settings.num_gpus}", "num_gpus")
    if find_device(settings.device).type == "cuda" and settings.num_gpus > torch.cuda.device_count():
        raise ArgumentError(
            f"num_gpus must be at most {torch.cuda.device_count()}, the number of GPUs, got {settings.num_gpus}",
            "num_gpus",
        )
    wrong = [fold for fold in settings.folds if fold not in (*range(FOLDS), "all")]
    if wrong or len(set(settings.folds)) != len(settings.folds):
        got = " ".join(map(str, settings.folds))
        raise ArgumentError(f"folds must be different numbers from 0 to {FOLDS - 1} or all, got {got}", "folds")
    for name in ("labels", "cases", "test_cases"):
        if settings.folds and getattr(settings, name) is not None:
            raise ArgumentError(
                f"folds must not be given with {name}, because both choose what is trained on; leave one out",
                "folds",
                name,
            )


def _finetune(
    dataset: str | int, weights: str | Path, settings: FinetuneSettings, folders: Folders, processes: int
) -> list[ArmResult]:
    dataset_name = find_dataset(dataset, folders)
    origin = _open_origin(weights, dataset_name, folders, processes)
    if settings.mode == "linear" and not origin.own_provenance.pretrains("decoder.stages."):
        logger.info("Note: these weights have no pretrained decoder, so the probe sees features of a random decoder")
    finished: list[tuple[Task, ArmResult]] = []
    for fold in settings.folds or (None,):
        task = _make_task(settings, origin, dataset_name, folders, processes, fold)
        also = f", {len(task.unlabelled)} unlabelled cases" if task.unlabelled else ""
        name = "" if fold is None else f", fold {fold}"
        logger.info(
            f"{dataset_name}{name}: {len(task.split.train)} training cases{also}, {len(task.split.test)} {task.split.what}"
        )
        arms: list[tuple[Task, OpenedCheckpoint | None]] = [(task, origin)]
        if settings.scratch:
            arms.append((replace(task, schedule=schedule_from(settings, task.network_kind, pretrained=False)), None))
        results = run_arms(arms, folders, settings.restart)
        finished += zip([each for each, _ in arms], results, strict=True)
    log_cross_validation(finished)
    return [result for _, result in finished]


def _open_origin(weights: str | Path, dataset_name: str, folders: Folders, processes: int) -> OpenedCheckpoint:
    """Open the weights that a fine-tuning starts from, adapted to the data set if they were made elsewhere."""
    found = open_checkpoint(find_weights(weights, folders))
    with only_process(make_writable(folders.preprocessed / dataset_name), "planning labelled cases"):
        origin = adapt_if_made_elsewhere(found, dataset_name, folders, processes)
    log_weights(origin)
    # nnU-Net's loader reads the file again, so the content need not stay in memory during the training
    return origin.without_content()


def _make_task(
    settings: FinetuneSettings,
    origin: OpenedCheckpoint,
    dataset_name: str,
    folders: Folders,
    processes: int,
    fold: Fold | None,
) -> Task:
    """Choose the cases, network and schedule of a fine-tuning, and preprocess the cases; other processes wait meanwhile."""
    with only_process(make_writable(folders.preprocessed / dataset_name), "preparing labelled cases"):
        return _make_task_alone(settings, origin, dataset_name, folders, processes, fold)


def _make_task_alone(
    settings: FinetuneSettings,
    origin: OpenedCheckpoint,
    dataset_name: str,
    folders: Folders,
    processes: int,
    fold: Fold | None,
) -> Task:
    labelled = find_labelled_cases(dataset_name, folders)
    split = split_cases(labelled, settings.seed, settings.labels, settings.cases, settings.test_cases)
    configuration = origin.choose_configuration(settings.configuration)
    planned = planned_configuration(origin.own_provenance.plans, configuration)
    _check_no_cascade(planned, configuration, dataset_name, origin.own_provenance.plans_name, origin.path)
    network = planned["architecture"]["network_class_name"]
    plan = adopt_plan(origin.own_provenance.plans, dataset_name, folders, settings.plans_name)
    split = split or fold_split(labelled, dataset_name, folders, 0 if fold is None else fold)
    others, source = (
        _find_unlabelled(settings.unlabelled, dataset_name, labelled, split, folders)
        if settings.mode == "mean_teacher"
        else ((), None)
    )
    of_this_dataset = others if source is None else ()
    keeps_head = settings.mode != "linear" and _keeps_head(origin, dataset_name, folders)
    schedule = schedule_from(settings, network_kind(network), pretrained=True, head=keeps_head)
    _check_processes(settings, schedule.batch_size or planned["batch_size"], dataset_name, folders)
    needed = (*split.cases, *of_this_dataset)
    contents = prepare_data(dataset_name, plan, configuration, needed, folders, processes)
    others_folder = None
    if source is not None:
        others_folder, more = prepare_unlabelled(source, dataset_name, plan, configuration, folders, processes)
        contents = {**more, **contents}
    if settings.mode == "linear":
        plan = _plan_of_probe(plan, configuration, origin)
    return Task(
        dataset_name=dataset_name,
        dataset_json=read_json(folders.preprocessed / dataset_name / "dataset.json", "dataset.json"),
        plan=plan,
        configuration=configuration,
        split=split,
        schedule=schedule,
        seed=settings.seed,
        device=find_device(settings.device),
        processes=processes,
        mode=settings.mode,
        unlabelled=others,
        unlabelled_pool=_pool(settings.unlabelled, dataset_name, labelled, folders)
        if others and fold is not None
        else (),
        unlabelled_folder=others_folder,
        track=tuple(settings.track),
        mirroring=settings.mirroring,
        keeps_head=keeps_head,
        num_gpus=settings.num_gpus,
        save_probabilities=settings.save_probabilities,
        contents=contents,
    )


def _keeps_head(origin: OpenedCheckpoint, dataset_name: str, folders: Folders) -> bool:
    """Return whether the segmentation layers of supervised weights are kept, and say so."""
    keeps = origin.keeps_head(read_labelled_json(folders.raw / dataset_name / "dataset.json"))
    if keeps:
        logger.info(
            f"The segmentation layers are kept, because the weights were trained with the labels of {dataset_name}"
        )
    return keeps


def _check_no_cascade(
    planned: dict[str, Any], configuration: str, dataset_name: str, plans_name: str, weights: Path
) -> None:
    """Check that a configuration is not the second stage of a cascade, which needs predictions of the first stage.

    Raises:
        ArgumentError: If it is; the message names nnU-Net's command.
    """
    previous = planned.get("previous_stage")
    if previous:
        raise ArgumentError(
            f"configuration must not be the second stage of a cascade, got {configuration}, which needs the predictions of "
            f"{previous} for all cases; train {previous} in all folds by nnU-Net's command, and then run nnUNetv2_train "
            f"{dataset_name} {configuration} FOLD -p {plans_name} -pretrained_weights {weights}",
            "configuration",
        )


def _plan_of_probe(plan: AdoptedPlan, configuration: str, origin: OpenedCheckpoint) -> AdoptedPlan:
    """Return the plan of a linear probe, whose segmentation layer reads the features that the pretraining trained."""
    if origin.own_provenance.settings.get("features") != "pyramid":  # only dense methods have this setting
        return plan
    wide = with_pyramid_segmentation(plan, configuration)
    if wide is None:
        logger.info("The probe reads the last decoder stage only, because the network is no U-Net of nnU-Net")
        return plan
    features = planned_configuration(plan.content, configuration)["architecture"]["arch_kwargs"]["features_per_stage"]
    logger.info(
        f"The probe reads all decoder stages and the bottleneck ({sum(features):,} channels), with which these weights were "
        "pretrained (features=pyramid); nnU-Net predicts with it where nnssl is installed"
    )
    return wide


def run_arms(arms: Sequence[tuple[Task, OpenedCheckpoint | None]], folders: Folders, restart: bool) -> list[ArmResult]:
    """Run every arm and log how their results compare.

    Args:
        arms: Data, plan and settings of each arm, and the checkpoint that it starts from; None for random weights.
        folders: nnU-Net's folders.
        restart: Whether to delete the folders of these arms first.

    Raises:
        UserError: If nnU-Net's loader rejects the weights.
    """
    results = [run_arm(task, weights, folders, restart) for task, weights in arms]
    for line in comparison(results):
        logger.info(line)
    return results


def _check_processes(settings: FinetuneSettings, batch: int, dataset_name: str, folders: Folders) -> None:
    """Check that several processes can share the batch and its loss.

    Raises:
        ArgumentError: If the batch cannot be divided, or voxels are ignored, whose number differs between processes.
    """
    if batch % settings.num_gpus:
        raise ArgumentError(
            f"batch_size must be a multiple of num_gpus ({settings.num_gpus}), got {batch}; set batch_size, or fewer num_gpus",
            "batch_size",
            "num_gpus",
        )
    labels = read_labelled_json(folders.raw / dataset_name / "dataset.json")["labels"]
    if settings.num_gpus > 1 and ignore_label({"labels": labels}) is not None:
        raise ArgumentError(
            f"num_gpus must be 1 for {dataset_name}, which has an ignore label, got {settings.num_gpus}: the processes would "
            "weight the labelled voxels differently",
            "num_gpus",
        )


def _pool(
    unlabelled: str | int | None, dataset_name: str, labelled: tuple[str, ...], folders: Folders
) -> tuple[str, ...]:
    """Return the cases of which those of a mean teacher are left over in every fold."""
    if unlabelled is not None and Path(str(unlabelled)).is_file():
        return tuple(read_names(Path(str(unlabelled))))
    if unlabelled is None or find_dataset(unlabelled, folders) == dataset_name:
        return labelled
    return tuple(case.name for case in read_dataset(unlabelled, folders).cases)


def _find_unlabelled(
    unlabelled: str | int | None, dataset_name: str, labelled: tuple[str, ...], split: Split, folders: Folders
) -> tuple[tuple[str, ...], RawDataset | None]:
    """Return the cases that the mean teacher sees besides the training cases, and their data set.

    The data set is None for the labelled one.
    """
    if unlabelled is not None and Path(str(unlabelled)).is_file():
        return choose_unlabelled(labelled, split, Path(str(unlabelled))), None
    if unlabelled is None or find_dataset(unlabelled, folders) == dataset_name:
        return choose_unlabelled(labelled, split), None
    source = without_held_out(read_dataset(unlabelled, folders), read_dataset(dataset_name, folders), split.test)
    return tuple(case.name for case in source.cases), source
