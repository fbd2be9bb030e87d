"""Finding and reading the cases of a raw data set in nnU-Net's layout; labels are neither needed nor opened.

A data set is a folder ``DatasetXXX_Name`` below ``nnUNet_raw`` with images ``imagesTr/CASE_0000.nii.gz`` (one file per
channel, ``_0001`` and so on). ``dataset.json`` is optional; missing information is inferred and printed.
"""

import contextlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from nnssl.data.case_error import CaseError, SetAside
from nnssl.data.dataset_json import channel_names_in, complete_dataset_json, read_dataset_json
from nnssl.data.dicom_series import DICOM_READER, SERIES_ENDING
from nnssl.data.image_files import ENDINGS, read_file_header, read_images
from nnssl.data.raw_files import group_folder_files, group_listed_files
from nnssl.errors import UserError
from nnssl.files import read_names
from nnssl.log import logger
from nnssl.paths import Folders

UNKNOWN_CHANNEL = "unknown"
"""Name of an unnamed channel, whose modality the fingerprint determines from intensities."""

READER_TRIALS = 5
"""Number of cases to try when choosing a reader, since the first ones may be damaged."""


@dataclass(frozen=True)
class RawCase:
    """A case of a raw data set, such as a patient or a scan."""

    name: str
    images: tuple[Path, ...]
    """Image files in channel order: one per channel, or one with several channels (RGB, 4D)."""


@dataclass(frozen=True)
class RawDataset:
    """Content of the folder of a raw data set."""

    name: str
    folder: Path
    file_ending: str
    channel_names: tuple[str, ...]
    """Channel names; ``UNKNOWN_CHANNEL`` if neither dataset.json nor the user names a channel."""
    cases: tuple[RawCase, ...]
    """Cases, sorted by name."""
    reader: str
    """Name of nnU-Net's reader class, or of the reader for DICOM series."""
    dataset_json: dict[str, Any]
    """Content of a dataset.json that nnU-Net accepts, completed if the data set's own is missing or incomplete."""
    set_aside: tuple[SetAside, ...]
    """Files that are not used, sorted by case."""


def find_dataset(dataset: str | int, folders: Folders) -> str:
    """Return the name of a data set, searched among the raw data sets and then among the preprocessed ones.

    Args:
        dataset: Number (``501`` or ``"501"``) or full name (``"Dataset501_Name"``).
        folders: nnU-Net's folders.

    Returns:
        The full name.

    Raises:
        UserError: If no data set or several match; the message lists the data sets found.
    """
    wanted = str(dataset).strip().rstrip("/")
    present: list[str] = []
    for folder in (folders.raw, folders.preprocessed):
        names = sorted(path.name for path in folder.glob("Dataset*") if path.is_dir()) if folder.is_dir() else []
        if wanted.isdecimal():
            numbers = {name: re.match(r"Dataset(\d+)", name) for name in names}
            found = [name for name, number in numbers.items() if number and int(number[1]) == int(wanted)]
        else:
            found = [name for name in names if name == wanted]
        if len(found) > 1:
            several = ", ".join(found)
            raise UserError(f"several data sets in {folder} have the number {wanted} ({several}); give the full name")
        if found:
            return found[0]
        present += [name for name in names if name not in present]
    found_names = f"found: {', '.join(present)}" if present else "it contains no folder DatasetXXX_Name"
    raise UserError(
        f"data set {wanted} was not found in {folders.raw} ({found_names}); copy it there or set nnUNet_raw"
    )


def read_dataset(dataset: str | int, folders: Folders, channel_names: tuple[str, ...] | None = None) -> RawDataset:
    """List the cases of a raw data set. Images are not read, except for a few to choose the reader and count channels.

    Hidden files are skipped. Symbolic links are followed. Files that do not form a case (a different number of channels
    than the data set's, no channel suffix, another file ending) are listed in ``set_aside``.

    Args:
        dataset: Number or name of the data set.
        folders: nnU-Net's folders.
        channel_names: Names to use instead of those in dataset.json; None to use the latter.

    Returns:
        The data set.

    Raises:
        UserError: If the data set does not exist, has no images or several file endings, or if channel names do not fit.
    """
    name = find_dataset(dataset, folders)
    folder = folders.raw / name
    content = read_dataset_json(folder)
    if "dataset" in content:
        ending, groups, set_aside = group_listed_files(content, folder)
    else:
        ending, groups, set_aside = group_folder_files(content, folder)
    reader = _choose_reader(content, ending, groups)
    given = channel_names or channel_names_in(content, str(folder / "dataset.json"))
    if channel_names is not None:
        logger.info(f"{name}: using the given channel names {', '.join(channel_names)}")
    files_per_case, channels_per_file = _count_channels(groups, reader, given, name)
    if given is None:
        given = (UNKNOWN_CHANNEL,) * (files_per_case * channels_per_file)
        logger.info(f"{name}: found {len(given)} unnamed channel(s); their modality is determined from intensities")
    cases = []
    for case, files in sorted(groups.items()):
        if sorted(files) == list(range(files_per_case)):
            cases.append(RawCase(case, tuple(files[channel] for channel in range(files_per_case))))
            continue
        has = ", ".join(f"_{channel:04d}" for channel in sorted(files))
        reason = f"belongs to a case with the channel files {has}, but the data set has {files_per_case} per case"
        set_aside.append(SetAside(case, str(files[min(files)]), reason))
    if not cases:
        raise UserError(f"{folder}: no case has {files_per_case} channel files; fix channel_names in dataset.json")
    set_aside.sort(key=lambda entry: (entry.case, entry.file))
    completed = complete_dataset_json(content, ending, given, len(cases), name)
    return RawDataset(name, folder, ending, given, tuple(cases), reader, completed, tuple(set_aside))


def leave_out(dataset: RawDataset, path: Path) -> RawDataset:
    """Return the data set without the cases listed in a file, one per line. This keeps a test set unseen.

    Args:
        dataset: Data set.
        path: List of cases.

    Raises:
        UserError: If the file is not a list, contains an unknown case, or leaves no case.
    """
    names = set(read_names(path))
    unknown = sorted(names - {case.name for case in dataset.cases})
    if unknown:
        raise UserError(
            f"{path} lists {len(unknown)} unknown cases: {dataset.name} has no case {unknown[0]}; fix the list"
        )
    kept = tuple(case for case in dataset.cases if case.name not in names)
    if not kept:
        raise UserError(f"{path} lists all cases of {dataset.name}; leave some for pretraining")
    logger.info(f"{dataset.name}: excluding {len(names)} of {len(dataset.cases)} cases listed in {path}")
    return replace(dataset, cases=kept)


def _choose_reader(content: dict[str, Any], ending: str, groups: dict[str, dict[int, Path]]) -> str:
    """Return the name of the reader that nnU-Net uses: its first class that can read an example."""
    from nnunetv2.imageio import reader_writer_registry as registry  # slow to import

    if ending == SERIES_ENDING:
        return DICOM_READER
    wanted = content.get("overwrite_image_reader_writer", "None")
    if wanted != "None":
        try:
            return registry.recursive_find_reader_writer_by_name(wanted).__name__
        except RuntimeError:
            logger.info(f"nnU-Net has no reader {wanted}, which dataset.json requests; choosing one by file ending")
    candidates = [cls for cls in registry.LIST_OF_IO_CLASSES if ending.lower() in cls.supported_file_endings]
    if not candidates:
        raise UserError(
            f"nnU-Net cannot read files that end in {ending} (only {' '.join(ENDINGS)}); convert the images"
        )
    for case in sorted(groups)[:READER_TRIALS]:
        example = groups[case][min(groups[case])]
        for cls in candidates:
            with contextlib.suppress(CaseError):
                read_volume(RawCase(case, (example,)), cls.__name__)
                return cls.__name__
    return candidates[0].__name__


def _count_channels(
    groups: dict[str, dict[int, Path]], reader: str, names: tuple[str, ...] | None, dataset: str
) -> tuple[int, int]:
    """Return the number of files per case and of channels per file (RGB and 4D images have several)."""
    counts = Counter(len(files) for files in groups.values())
    if names is not None and counts[len(names)]:
        return len(names), 1
    usual = max(counts, key=lambda count: (counts[count], count))
    channels = 1
    for case in sorted(groups)[:READER_TRIALS]:
        with contextlib.suppress(CaseError):
            channels = read_file_header(groups[case][min(groups[case])], reader).channels
            break
    if names is not None and usual * channels != len(names):
        raise UserError(
            f"{dataset} has {len(names)} channel name(s) ({', '.join(names)}), but most cases have {usual * channels} "
            "channel(s); fix channel_names in dataset.json"
        )
    return usual, channels


def read_header(case: RawCase, reader: str) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Return the geometry of a case as given by nnU-Net's reader, from the header of its first file.

    Formats whose geometry nnU-Net does not take from a header (tif, png, bmp) are read completely.

    Args:
        case: Case.
        reader: Name of nnU-Net's reader class.

    Returns:
        Shape (z, y, x) in voxels, spacing (z, y, x) in mm, and the anatomical directions in which x, y and z increase
        ("LPS"; empty if the format does not store them). A 2D image has the shape (1, y, x) and nnU-Net's 999-fold
        spacing in z.

    Raises:
        CaseError: If the header cannot be read.
    """
    header = read_file_header(case.images[0], reader)
    return header.shape, header.spacing_mm, header.orientation


def read_volume(case: RawCase, reader: str) -> tuple[Float32[np.ndarray, "channel z y x"], tuple[float, ...]]:
    """Read the voxels of a case with nnU-Net's reader.

    Args:
        case: Case.
        reader: Name of nnU-Net's reader class.

    Returns:
        Intensities (channel, z, y, x) and spacing (z, y, x) in mm.

    Raises:
        CaseError: If a file is missing, truncated, damaged or unreadable, or if the channels do not fit together.
    """
    try:
        volume, properties = read_images(case.images, reader)
    except CaseError:
        for file in case.images if len(case.images) > 1 else ():
            read_images((file,), reader)  # raises an error for the file at fault, if it is a single one
        raise
    spacing_mm = tuple(float(mm) for mm in properties["spacing"])
    if volume.ndim != 4 or len(spacing_mm) != 3:
        raise CaseError(str(case.images[0]), "has vector voxels or more than four axes; write one file per channel")
    return np.ascontiguousarray(volume, dtype=np.float32), spacing_mm
