"""Label files of a labelled data set, checked before anything is trained on them.

Each file is read once. What was found is kept in ``nnssl_labels.json`` of the preprocessed data set and used for as long as the
label and the first image of the case have not changed, whatever ``dataset.json`` says by then.

Source: nnU-Net's ``verify_dataset_integrity`` (Isensee et al., Nature Methods 2021), which users have to ask for.
Deviations: Values that are not whole numbers are refused; nnU-Net rounds them towards 0. Data sets whose labels are all
background are refused; nnU-Net trains on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nnssl.data.case_error import CaseError
from nnssl.data.dataset_labels import IGNORE, Labels, label_values
from nnssl.data.image_files import Header, check_finite, find_source_state, read_file_header, read_segmentation, unit_mm
from nnssl.data.jobs import follow_jobs, run_list
from nnssl.errors import UserError
from nnssl.files import some
from nnssl.log import logger
from nnssl.schema import STRICT, read, write

SCHEMA_VERSION = 1
FILE_NAME = "nnssl_labels.json"
MOST_VALUES = 256
"""Number of different values above which a file is an image rather than a label map."""
DIFFERENT_SPACING = 1e-3
"""Largest relative difference of spacing that is attributed to rounding."""


@dataclass(frozen=True)
class LabelFile:
    """A label file with the images of its case."""

    case: str
    label: Path
    images: tuple[Path, ...]


@dataclass(frozen=True)
class CheckedLabel:
    """What was found in a label file that fits its image."""

    __pydantic_config__: ClassVar = STRICT

    states: tuple[tuple[int, int, int], ...]
    """Size in bytes, modification time and time of the last change in ns, of the label file and of each image file."""
    channels: int
    """Number of channels of the case."""
    values: tuple[int, ...]
    """All values of the label file, ascending."""
    differs_in: tuple[str, ...]
    """What else of the geometry differs from the image, which nnU-Net does not compare: "origin", "orientation"."""


@dataclass(frozen=True)
class CheckedLabels:
    """The label files of a data set that were checked."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    reader: str
    """Name of nnU-Net's reader class."""
    cases: dict[str, CheckedLabel]


@dataclass(frozen=True)
class CheckJob:
    """One label file to read."""

    file: LabelFile
    reader: str


def check_labels(
    files: Sequence[LabelFile],
    dataset_json: Mapping[str, Any],
    dataset_name: str,
    reader: str,
    folder: Path,
    processes: int,
) -> None:
    """Check that labels can be trained on: whole numbers that ``dataset.json`` names, on the grid of the image.

    Args:
        files: Label files that are needed.
        dataset_json: Content of ``dataset.json`` as ``nnssl.data.dataset_json.read_labelled_json`` returns it.
        dataset_name: Name of the data set, for messages.
        reader: Name of nnU-Net's reader class.
        folder: Folder of the preprocessed data set, which keeps what was found.
        processes: Number of worker processes.

    Raises:
        UserError: If a file cannot be read, does not fit its image or contains other values, or if all labels are background.
    """
    found = _check_files(files, dataset_name, reader, folder, processes)
    labels: Labels = dataset_json["labels"]
    known, channels = label_values(labels), len(dataset_json["channel_names"])
    described = ", ".join(f"{name} {value}" for name, value in labels.items())
    problems = []
    for file in files:
        own = found[file.case]
        unknown = [value for value in own.values if value not in known]
        if own.channels != channels:
            problems.append(
                f"case {file.case}: {file.images[0]} and the case's other images have {own.channels} channel(s), but "
                f"dataset.json names {channels}; correct channel_names or remove the case"
            )
        elif unknown:
            problems.append(
                f"case {file.case}: {file.label} contains the value {unknown[0]}, which is not a label in dataset.json "
                f"({described}); add it there, or correct the file"
            )
    _refuse_first(dataset_name, problems, len(files))
    if not any(set(found[file.case].values) - {0, labels.get(IGNORE)} for file in files):
        raise UserError(
            f"{dataset_name}: the labels of all {len(files)} cases contain background only (case {files[0].case}: "
            f"{files[0].label}), so there is nothing to learn; annotate a structure, or choose other cases"
        )
    _tell_differing(files, found, dataset_name)
    _tell_absent(labels, {value for file in files for value in found[file.case].values}, dataset_name, len(files))


def _states(file: LabelFile) -> tuple[tuple[int, int, int], ...]:
    """Return size, modification time and time of the last change of a label file and its images.

    The last one tells a file that was replaced by another of the same size and modification time.
    """
    return tuple((*find_source_state(each), each.stat().st_ctime_ns) for each in (file.label, *file.images))


def examine_label(job: CheckJob) -> CheckedLabel | str:
    """Read one label file and compare it with its image.

    Returns:
        What was found, or what is wrong, beginning with the file.
    """
    label, first = job.file.label, job.file.images[0]
    try:
        states = _states(job.file)
        image = read_file_header(first, job.reader)
        segmentation, properties = read_segmentation(label, job.reader)
        own = read_file_header(label, job.reader, is_segmentation=True)
        check_finite(label)
        values = _values_of(label, segmentation)
    except CaseError as error:
        return f"{error}; replace the file"
    except OSError as error:
        return f"{error.filename} cannot be found ({error.strerror}); check the path"
    if job.reader.startswith("NibabelIO") and unit_mm(first) != 1:
        return (
            f"{first} has a header in another unit than mm, which nnU-Net's {job.reader} ignores; write it in mm, or remove "
            "overwrite_image_reader_writer from dataset.json"
        )
    if len(segmentation) != 1:
        return f"{label} has {len(segmentation)} values per voxel; write one label per voxel"
    if segmentation.shape[1:] != tuple(image.shape):
        return (
            f"{label} has {segmentation.shape[1:]} voxels (z, y, x), but its image {first} has {tuple(image.shape)}; resample "
            "one to the other"
        )
    spacing_mm = tuple(float(mm) for mm in properties["spacing"])
    if not np.allclose(spacing_mm, image.spacing_mm, rtol=DIFFERENT_SPACING, atol=0):
        return (
            f"{label} has a spacing (z, y, x) of {_rounded(spacing_mm)} mm, but its image {first} has "
            f"{_rounded(image.spacing_mm)} mm; correct the wrong header"
        )
    return CheckedLabel(states, len(job.file.images) * image.channels, values, _differences(image, own))


def _check_files(
    files: Sequence[LabelFile], dataset_name: str, reader: str, folder: Path, processes: int
) -> dict[str, CheckedLabel]:
    """Return what the label files contain; those that have not changed are not read again.

    Raises:
        UserError: If a file cannot be used.
    """
    path = folder / FILE_NAME
    kept = _read_kept(path, reader)
    jobs = [CheckJob(file, reader) for file in files if not _is_current(kept.cases.get(file.case), file)]
    if not jobs:
        return kept.cases
    logger.info(f"Checking {len(jobs)} labels of {dataset_name} ...")
    found, problems = dict(kept.cases), []
    results = follow_jobs(run_list(_examine, jobs, processes), "checking", "checked", len(jobs))
    for case, outcome in sorted(results, key=lambda result: result[0]):
        if isinstance(outcome, str):
            problems.append(f"case {case}: {outcome}")
        else:
            found[case] = outcome
    write(path, replace(kept, cases=found))
    _refuse_first(dataset_name, problems, len(files))
    return found


def _examine(job: CheckJob) -> tuple[str, CheckedLabel | str]:
    return job.file.case, examine_label(job)


def _read_kept(path: Path, reader: str) -> CheckedLabels:
    """Return what earlier checks found with the same reader."""
    if path.exists():
        try:
            kept = read(CheckedLabels, path, "record of checked labels")
        except UserError:
            logger.info(f"{path} is damaged or was written by another version of nnssl: checking the labels again")
        else:
            if kept.reader == reader:
                return kept
    return CheckedLabels(SCHEMA_VERSION, reader, {})


def _is_current(kept: CheckedLabel | None, file: LabelFile) -> bool:
    try:
        return kept is not None and kept.states == _states(file)
    except (OSError, CaseError):
        return False


def _values_of(file: Path, segmentation: np.ndarray) -> tuple[int, ...]:
    """Return all values of a label map, ascending.

    Raises:
        CaseError: If a value is not a whole number, or there are too many of them.
    """
    flat = segmentation.reshape(-1)
    # a label map is constant for long runs, so a value at each change is enough and much less to sort
    starts = np.flatnonzero(np.concatenate([np.ones(1, bool), flat[1:] != flat[:-1]]))
    values = np.unique(flat[starts]).tolist()
    wrong = [value for value in values if not float(value).is_integer()]
    if wrong:
        raise CaseError(str(file), f"contains the value {wrong[0]:g}, which is not a whole number and so no label")
    if len(values) > MOST_VALUES:
        raise CaseError(str(file), f"contains more than {MOST_VALUES} different values, so it seems to be an image")
    return tuple(int(value) for value in values)


def _refuse_first(dataset_name: str, problems: Sequence[str], total: int) -> None:
    """Raise an error for the first of several problems.

    Raises:
        UserError: If there is one.
    """
    if problems:
        also = f" ({len(problems)} of {total} cases have such labels)" if len(problems) > 1 else ""
        raise UserError(f"{dataset_name}, {problems[0]}{also}")


def _differences(image: Header, label: Header) -> tuple[str, ...]:
    """Return what differs between two grids of the same shape and spacing; what a format does not store is not compared."""
    differences = []
    if image.origin_mm and label.origin_mm:
        shift_mm = np.abs(np.subtract(image.origin_mm, label.origin_mm))
        if shift_mm.max() > min(image.spacing_mm) / 2:
            differences.append("origin")
    if image.orientation and label.orientation and image.orientation != label.orientation:
        differences.append("orientation")
    return tuple(differences)


def _tell_differing(files: Sequence[LabelFile], found: Mapping[str, CheckedLabel], dataset_name: str) -> None:
    """Print cases whose label lies elsewhere than the image according to the headers, which training ignores."""
    differing = [file for file in files if found[file.case].differs_in]
    if differing:
        first = differing[0]
        logger.info(
            f"Warning: {len(differing)} of {len(files)} label files of {dataset_name} differ in "
            f"{' and '.join(found[first.case].differs_in)} from their images (case {first.case}: {first.label}); like nnU-Net, "
            "training goes by voxels and not by these headers, so look at the labels on the images"
        )


def _tell_absent(labels: Labels, present: set[int], dataset_name: str, cases: int) -> None:
    """Print labels that no case has."""
    absent = [
        name
        for name, value in labels.items()
        if name != IGNORE and not present & set(value if isinstance(value, list) else [value])
    ]
    if absent:
        logger.info(f"Note: {some(absent)} occur in none of the {cases} label files of {dataset_name}")


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
