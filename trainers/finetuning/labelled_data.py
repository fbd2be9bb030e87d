"""Preparation of a labelled data set for nnU-Net's training: dataset.json, fingerprint and preprocessed cases."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.data.case_error import last_line
from nnssl.data.contents import RECORDS, Content, changed_cases, describe_changes, read_contents, write_contents
from nnssl.data.dataset_json import read_labelled_json, spell_labelled_json
from nnssl.data.inline_pool import without_workers
from nnssl.data.jobs import follow_jobs, run_list
from nnssl.data.raw import RawDataset
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.segmentation_files import case_name
from nnssl.files import read_json, some, write_json
from nnssl.interrupts import pools_without_interrupts
from nnssl.locks import only_process
from nnssl.log import logger, printed_output_to
from nnssl.paths import Folders, make_writable
from planners.finetune_planner import AdoptedPlan
from trainers.finetuning.case_contents import (
    LabelledFiles,
    find_contents,
    find_image_contents,
    find_outdated,
    labelled_files,
    write_record,
)
from trainers.finetuning.label_checks import check_labels_of, choose_reader

REFERENCES = "gt_segmentations"
"""nnU-Net's name of the folder with copies of the labels, to which predictions are compared."""


def prepare_data(
    dataset_name: str, plan: AdoptedPlan, configuration: str, cases: Sequence[str], folders: Folders, processes: int
) -> dict[str, Content]:
    """Write the dataset.json, fingerprint and preprocessed cases that nnU-Net's training needs, unless they exist.

    Cases whose images or labels were replaced since they were preprocessed are listed and preprocessed again.

    Args:
        dataset_name: Name of the labelled data set.
        plan: Plan of the data set.
        configuration: Configuration to preprocess.
        cases: Names of the cases that are needed; others are not preprocessed.
        folders: nnU-Net's folders.
        processes: Number of worker processes.

    Returns:
        The state of the images and the label of every case, by name.

    Raises:
        UserError: If nnU-Net fails; the message names the log.
    """
    # runs of other folds or arms may prepare the same cases
    with only_process(make_writable(folders.preprocessed / dataset_name), "preparing labelled cases"):
        return _prepare(dataset_name, plan, configuration, cases, folders, processes)


def _prepare(
    dataset_name: str, plan: AdoptedPlan, configuration: str, cases: Sequence[str], folders: Folders, processes: int
) -> dict[str, Content]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = folders.preprocessed / dataset_name
    data = folder / PlansManager(plan.content).get_configuration(configuration).data_identifier
    log = folder / "nnssl_finetune_log.txt"
    check_labels_of(cases, dataset_name, plan.content["image_reader_writer"], folders, processes)
    _copy_dataset_json(folders.raw / dataset_name / "dataset.json", folder / "dataset.json", plan)
    make_fingerprint(dataset_name, folders, processes)
    known = labelled_files(dataset_name, folders)
    files = {case: known[case] for case in cases}
    contents = find_contents(dataset_name, files, folders, processes)
    missing = missing_cases(data, folder / REFERENCES, cases)
    records = _records(data, folder / REFERENCES)
    complete = {case: content for case, content in contents.items() if case not in missing}
    outdated = find_outdated(records, data, complete, files)
    if outdated:
        logger.info(
            f"{dataset_name}: {len(outdated)} cases have changed since they were preprocessed "
            f"({describe_changes(outdated)}) and are preprocessed again"
        )
    made = [case for case in dict.fromkeys(cases) if case in missing or case in outdated]
    if not made:
        logger.info(f"Preprocessed cases: all {len(cases)} exist already ({data})")
        return contents
    logger.info(f"Preprocessing {len(made)} cases for {configuration} ...")
    try:
        with printed_output_to(log):
            chosen = {case: (files[case], contents[case]) for case in made}
            _preprocess(folder, plan, configuration, data, chosen, processes)
    except RuntimeError as error:
        raise _failed(dataset_name, error, log) from error
    return contents


def _records(data: Path, references: Path) -> tuple[Path, Path]:
    """Return the folders with the state that preprocessed cases and copied labels were made from."""
    return data.parent / RECORDS / data.name, data.parent / RECORDS / references.name


def make_fingerprint(dataset_name: str, folders: Folders, processes: int) -> Path:
    """Return the fingerprint file of a labelled data set, which nnU-Net writes if it does not exist.

    One that this function made is made again if images or labels have changed since.

    Raises:
        UserError: If nnU-Net fails; the message names the log.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
    from nnunetv2.utilities import utils

    folder = folders.preprocessed / dataset_name
    path, record = folder / "dataset_fingerprint.json", folder / RECORDS / "dataset_fingerprint.json"
    before = read_contents(record)
    if path.exists() and before is None:
        return path
    contents = find_contents(dataset_name, labelled_files(dataset_name, folders), folders, processes)
    if path.exists() and before is not None:
        changes = changed_cases(before, contents)
        if not changes:
            return path
        logger.info(f"{path}: made before {describe_changes(changes)} changed")
        path.unlink()
    record.parent.mkdir(parents=True, exist_ok=True)
    dataset_json = read_labelled_json(folders.raw / dataset_name / "dataset.json")
    logger.info(f"Extracting the fingerprint of {dataset_name} ...")
    log = folder / "nnssl_finetune_log.txt"
    try:
        with printed_output_to(log):
            with without_workers(utils):
                extractor = fingerprint_extractor.DatasetFingerprintExtractor(dataset_name, processes)
            extractor.dataset_json = dataset_json
            extractor.show_progress_bar = sys.stderr.isatty()
            with pools_without_interrupts() if processes > 1 else without_workers(fingerprint_extractor):
                extractor.run()
    except (RuntimeError, AssertionError, IndexError, ValueError, OSError) as error:  # as nnU-Net's readers raise them
        # only now, because a run may need few of the cases, all of which are read here
        check_labels_of(None, dataset_name, choose_reader(dataset_name, folders), folders, processes)
        raise _failed(dataset_name, error, log) from error
    write_contents(record, contents)
    return path


def _failed(dataset_name: str, error: Exception, log: Path) -> ArgumentError:
    return ArgumentError(
        f"{dataset_name}: nnU-Net cannot prepare the data set ({last_line(error) or type(error).__name__}); see {log}, and "
        "lower processes if memory ran out",
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
    records: Path
    """Folder for the record of the content."""
    content: Content


def prepare_unlabelled(
    source: RawDataset, dataset_name: str, plan: AdoptedPlan, configuration: str, folders: Folders, processes: int
) -> tuple[Path, dict[str, Content]]:
    """Preprocess the images of an unlabelled data set as those of the labelled data set, unless that is done already.

    Images that were replaced since are preprocessed again.

    Args:
        source: Data set of the images.
        dataset_name: Name of the labelled data set.
        plan: Plan of the labelled data set.
        configuration: Configuration to preprocess.
        folders: nnU-Net's folders.
        processes: Number of worker processes.

    Returns:
        The folder of the preprocessed images, below that of the labelled data set, and the state of the images by case.

    Raises:
        ArgumentError: If the data sets have different numbers of channels.
        UserError: If nnU-Net cannot read an image.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json = read_labelled_json(folders.raw / dataset_name / "dataset.json")
    wanted = len(dataset_json["channel_names"])
    if len(source.channel_names) != wanted:
        raise ArgumentError(
            f"unlabelled must be a data set with {wanted} channel(s), as {dataset_name} has, got {source.name} with "
            f"{len(source.channel_names)}",
            "unlabelled",
        )
    data = PlansManager(plan.content).get_configuration(configuration).data_identifier
    folder = make_writable(folders.preprocessed / dataset_name / f"{data}_unlabelled" / source.name)
    records = folders.preprocessed / dataset_name / RECORDS / folder.parent.name / source.name
    contents = find_image_contents(source, folders, processes)
    # nnU-Net writes this file last
    complete = {case: content for case, content in contents.items() if (folder / f"{case}.pkl").exists()}
    outdated = find_outdated([records], folder, complete, {c.name: LabelledFiles(c.images) for c in source.cases})
    if outdated:
        logger.info(
            f"{source.name}: {len(outdated)} images have changed since they were preprocessed "
            f"({some(sorted(outdated))}) and are preprocessed again"
        )
    jobs = [
        UnlabelledJob(
            tuple(map(str, case.images)),
            folder / case.name,
            plan.content,
            configuration,
            dataset_json,
            records,
            contents[case.name],
        )
        for case in source.cases
        if case.name not in complete or case.name in outdated
    ]
    if jobs:
        logger.info(f"Preprocessing {len(jobs)} images of {source.name} for {configuration} ...")
        with printed_output_to(folders.preprocessed / dataset_name / "nnssl_finetune_log.txt"):
            made = run_list(preprocess_unlabelled, jobs, processes)
            for _ in follow_jobs(made, "preprocessing", "preprocessed", len(jobs)):
                pass
    return folder, contents


def preprocess_unlabelled(job: UnlabelledJob) -> None:
    """Preprocess one image with nnU-Net. Its label is background everywhere and is never read.

    Raises:
        UserError: If nnU-Net cannot read the image.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    _remove_case(job.output)
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
    write_record(job.records, job.output.name, job.content)


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
    records: tuple[Path, ...]
    """Folders for the record of the content."""
    content: Content


def _preprocess(
    folder: Path,
    plan: AdoptedPlan,
    configuration: str,
    data: Path,
    cases: Mapping[str, tuple[LabelledFiles, Content]],
    processes: int,
) -> None:
    """Preprocess some cases with nnU-Net and copy their labels, as nnU-Net's command does for all."""
    dataset_json = read_json(folder / "dataset.json", "dataset.json")
    for made in (data, folder / REFERENCES):
        made.mkdir(parents=True, exist_ok=True)
    jobs = [
        LabelledJob(
            images=tuple(map(str, files.images)),
            label=str(files.label),
            output=data / case,
            reference=folder / REFERENCES / f"{case}{dataset_json['file_ending']}",
            plan=plan.content,
            configuration=configuration,
            dataset_json=dataset_json,
            records=_records(data, folder / REFERENCES),
            content=content,
        )
        for case, (files, content) in cases.items()
    ]
    for _ in follow_jobs(run_list(preprocess_labelled, jobs, processes), "preprocessing", "preprocessed", len(jobs)):
        pass


def preprocess_labelled(job: LabelledJob) -> None:
    """Preprocess one labelled case with nnU-Net and copy its label, after deleting what an interrupted run left."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    _remove_case(job.output)
    plan = PlansManager(job.plan)
    configuration = plan.get_configuration(job.configuration)
    shutil.copy(job.label, job.reference)
    configuration.preprocessor_class(verbose=False).run_case_save(
        str(job.output), list(job.images), job.label, plan, configuration, job.dataset_json
    )
    for folder in job.records:
        write_record(folder, job.output.name, job.content)


def _remove_case(output: Path) -> None:
    for ending in (".pkl", ".b2nd", "_seg.b2nd"):
        output.with_name(f"{output.name}{ending}").unlink(missing_ok=True)


def _copy_dataset_json(raw: Path, copy: Path, plan: AdoptedPlan) -> None:
    """Copy dataset.json as nnU-Net's planning does, after deleting data of the plan that were preprocessed with other labels.

    What the keys mean is compared, not how they are spelt, because nnU-Net copies the file as it is.
    """
    content = read_labelled_json(raw)
    before = read_json(copy, "dataset.json") if copy.exists() else None
    if before is not None and _meaning(before, copy) != _meaning(content, raw):
        for configuration in plan.content["configurations"].values():
            if "data_identifier" in configuration:
                shutil.rmtree(copy.parent / configuration["data_identifier"], ignore_errors=True)
    if content != before:
        write_json(copy, content)


def _meaning(content: dict[str, Any], path: Path) -> list[Any]:
    """Return what preprocessed cases depend on of a dataset.json."""
    with suppress(UserError):  # what nnU-Net accepted before, but nnssl does not, counts as different
        content = spell_labelled_json(content, str(path))
    return [content.get(key) for key in ("labels", "channel_names", "regions_class_order")]
