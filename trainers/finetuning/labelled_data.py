"""Preparation of a labelled data set for nnU-Net's training: dataset.json, fingerprint and preprocessed cases."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nnssl.data.jobs import follow_jobs, run_list
from nnssl.data.raw import RawDataset
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.segmentation_files import case_name
from nnssl.files import read_json, write_json
from nnssl.log import logger, printed_output_to
from nnssl.paths import Folders, make_writable
from planners.finetune_planner import AdoptedPlan


def prepare_data(
    dataset_name: str, plan: AdoptedPlan, configuration: str, cases: Sequence[str], folders: Folders, processes: int
) -> None:
    """Write the dataset.json, fingerprint and preprocessed cases that nnU-Net's training needs, unless they exist.

    Args:
        dataset_name: Name of the labelled data set.
        plan: Plan of the data set.
        configuration: Configuration to preprocess.
        cases: Names of the cases that are needed; others are not preprocessed.
        folders: nnU-Net's folders.
        processes: Number of worker processes.

    Raises:
        UserError: If nnU-Net fails; the message names the log.
    """
    folder = make_writable(folders.preprocessed / dataset_name)
    with FileLock(folder / "nnssl_finetune.lock"):  # runs of other folds or arms may prepare the same cases
        _prepare(dataset_name, plan, configuration, cases, folders, processes)


def _prepare(
    dataset_name: str, plan: AdoptedPlan, configuration: str, cases: Sequence[str], folders: Folders, processes: int
) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = folders.preprocessed / dataset_name
    labels_changed = _copy_dataset_json(folders.raw / dataset_name / "dataset.json", folder / "dataset.json")
    data = folder / PlansManager(plan.content).get_configuration(configuration).data_identifier
    log = folder / "nnssl_finetune_log.txt"
    make_fingerprint(dataset_name, folders, processes)
    if labels_changed and data.exists():
        shutil.rmtree(data)
    missing = missing_cases(data, folder / "gt_segmentations", cases)
    if not missing:
        logger.info(f"Preprocessed cases: all {len(cases)} exist already ({data})")
        return
    logger.info(f"Preprocessing {len(missing)} cases for {configuration} ...")
    try:
        with printed_output_to(log):
            _preprocess(dataset_name, plan, configuration, data, missing, folders, processes)
    except RuntimeError as error:
        raise _failed(dataset_name, error, log) from error


def make_fingerprint(dataset_name: str, folders: Folders, processes: int) -> Path:
    """Return the fingerprint file of a labelled data set, which nnU-Net writes if it does not exist.

    Raises:
        UserError: If nnU-Net fails; the message names the log.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    folder = folders.preprocessed / dataset_name
    path = folder / "dataset_fingerprint.json"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    logger.info(f"Extracting the fingerprint of {dataset_name} ...")
    log = folder / "nnssl_finetune_log.txt"
    try:
        with printed_output_to(log):
            extractor = DatasetFingerprintExtractor(dataset_name, processes)
            extractor.show_progress_bar = sys.stderr.isatty()
            extractor.run()
    except RuntimeError as error:
        raise _failed(dataset_name, error, log) from error
    return path


def _failed(dataset_name: str, error: RuntimeError, log: Path) -> ArgumentError:
    return ArgumentError(
        f"{dataset_name}: nnU-Net cannot prepare the data set ({str(error).splitlines()[0]}); see {log}, and lower processes if "
        "memory ran out",
        "processes",
    )


@dataclass(frozen=True)
class UnlabelledJob:
    """Preprocessing of one image without a label."""

    images: tuple[str, ...]
    output: Path
    """Output path without file ending."""
    plan: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def prepare_unlabelled(
    source: RawDataset, dataset_name: str, plan: AdoptedPlan, configuration: str, folders: Folders, processes: int
) -> Path:
    """Preprocess the images of an unlabelled data set as those of the labelled data set, unless that is done already.

    Args:
        source: Data set of the images.
        dataset_name: Name of the labelled data set.
        plan: Plan of the labelled data set.
        configuration: Configuration to preprocess.
        folders: nnU-Net's folders.
        processes: Number of worker processes.

    Returns:
        The folder of the preprocessed images, below that of the labelled data set.

    Raises:
        ArgumentError: If the data sets have different numbers of channels.
        UserError: If nnU-Net cannot read an image.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json = read_json(folders.raw / dataset_name / "dataset.json", "dataset.json of a labelled data set")
    wanted = len(dataset_json["channel_names"])
    if len(source.channel_names) != wanted:
        raise ArgumentError(
            f"unlabelled must be a data set with {wanted} channel(s), as {dataset_name} has, got {source.name} with "
            f"{len(source.channel_names)}",
            "unlabelled",
        )
    data = PlansManager(plan.content).get_configuration(configuration).data_identifier
    folder = make_writable(folders.preprocessed / dataset_name / f"{data}_unlabelled" / source.name)
    jobs = [
        UnlabelledJob(tuple(map(str, case.images)), folder / case.name, plan.content, configuration, dataset_json)
        for case in source.cases
        if not (folder / f"{case.name}.pkl").exists()  # nnU-Net writes this file last
    ]
    if jobs:
        logger.info(f"Preprocessing {len(jobs)} images of {source.name} for {configuration} ...")
        with printed_output_to(folders.preprocessed / dataset_name / "nnssl_finetune_log.txt"):
            for _ in run_list(preprocess_unlabelled, jobs, processes):
                pass
    return folder


def preprocess_unlabelled(job: UnlabelledJob) -> None:
    """Preprocess one image with nnU-Net. Its label is background everywhere and is never read.

    Raises:
        UserError: If nnU-Net cannot read the image.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plan = PlansManager(job.plan)
    configuration = plan.get_configuration(job.configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        volume, _, properties = preprocessor.run_case(list(job.images), None, plan, configuration, job.dataset_json)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{job.images[0]}: nnU-Net cannot preprocess the image ({reason}); repair or remove it"
        ) from error
    volume = volume.astype(np.float32, copy=False)
    background = np.zeros((1, *volume.shape[1:]), np.int16)
    patch = tuple(configuration.patch_size)
    blocks, chunks = comp_blosc2_params(volume.shape, patch, volume.itemsize)
    label_blocks, label_chunks = comp_blosc2_params(background.shape, patch, background.itemsize)
    nnUNetDatasetBlosc2.save_case(
        volume,
        background,
        {**properties, "class_locations": {}},
        str(job.output),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=label_chunks,
        blocks_seg=label_blocks,
    )


def missing_cases(data: Path, references: Path, cases: Sequence[str]) -> list[str]:
    """Return the cases that a folder of preprocessed data does not hold completely, or whose reference is missing.

    Args:
        data: Folder of one configuration.
        references: Folder ``gt_segmentations`` of the data set.
        cases: Names of the cases.
    """
    files = {path.name for path in data.iterdir()} if data.is_dir() else set()
    copied = {case_name(path) for path in references.iterdir()} if references.is_dir() else set()
    # nnU-Net writes the .pkl of a case last
    return [
        case for case in cases if case not in copied or not {f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.pkl"} <= files
    ]


@dataclass(frozen=True)
class LabelledJob:
    """Preprocessing of one labelled case."""

    images: tuple[str, ...]
    label: str
    output: Path
    """Output path without file ending."""
    reference: Path
    """Path of the copied label, to which predictions are compared."""
    plan: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def _preprocess(
    dataset_name: str,
    plan: AdoptedPlan,
    configuration: str,
    data: Path,
    cases: Sequence[str],
    folders: Folders,
    processes: int,
) -> None:
    """Preprocess some cases with nnU-Net and copy their labels, as nnU-Net's command does for all."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    raw, folder = folders.raw / dataset_name, folders.preprocessed / dataset_name
    dataset_json = read_json(folder / "dataset.json", "dataset.json")
    files = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    for made in (data, folder / "gt_segmentations"):
        made.mkdir(parents=True, exist_ok=True)
    jobs = [
        LabelledJob(
            images=tuple(files[case]["images"]),
            label=files[case]["label"],
            output=data / case,
            reference=folder / "gt_segmentations" / f"{case}{dataset_json['file_ending']}",
            plan=plan.content,
            configuration=configuration,
            dataset_json=dataset_json,
        )
        for case in cases
    ]
    for _ in follow_jobs(run_list(preprocess_labelled, jobs, processes), "preprocessing", "preprocessed", len(jobs)):
        pass


def preprocess_labelled(job: LabelledJob) -> None:
    """Preprocess one labelled case with nnU-Net and copy its label, after deleting what an interrupted run left."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for ending in (".pkl", ".b2nd", "_seg.b2nd"):
        job.output.with_name(f"{job.output.name}{ending}").unlink(missing_ok=True)
    plan = PlansManager(job.plan)
    configuration = plan.get_configuration(job.configuration)
    shutil.copy(job.label, job.reference)
    configuration.preprocessor_class(verbose=False).run_case_save(
        str(job.output), list(job.images), job.label, plan, configuration, job.dataset_json
    )


def _copy_dataset_json(raw: Path, copy: Path) -> bool:
    """Copy dataset.json as nnU-Net's planning does; return whether data preprocessed with the old one are outdated."""
    content = read_json(raw, "dataset.json of a labelled data set")
    before = read_json(copy, "dataset.json") if copy.exists() else None
    if content != before:
        write_json(copy, content)
    keys = ("labels", "channel_names", "regions_class_order")
    return before is not None and any(content.get(key) != before.get(key) for key in keys)
