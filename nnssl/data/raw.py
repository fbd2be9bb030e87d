"""Cases of a raw data set in nnU-Net's layout: found, counted and read; labels are neither needed nor opened.

A data set is a folder ``DatasetXXX_Name`` below ``nnUNet_raw`` with images ``imagesTr/CASE_0000.nii.gz`` (one file per
channel, ``_0001`` and so on). ``dataset.json`` is optional; what it does not say is inferred and said aloud.
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
"""Name of a channel that nothing names; the fingerprint decides from intensities what it is."""

READER_TRIALS = 5
"""Cases that are tried until a reader is found; the first ones may be broken."""


@dataclass(frozen=True)
class RawCase:
    """One patient or scan."""

    name: str
    images: tuple[Path, ...]
    """Image files in channel order; one per channel, or one that holds several channels (RGB, 4D)."""


@dataclass(frozen=True)
class RawDataset:
    """What is in the folder of a raw data set."""

    name: str
    folder: Path
    file_ending: str
    channel_names: tuple[str, ...]
    """``UNKNOWN_CHANNEL`` where neither dataset.json nor the user named a channel."""
    cases: tuple[RawCase, ...]
    """Sorted by name."""
    reader: str
    """Name of nnU-Net's reader class, or of the one for DICOM series."""
    dataset_json: dict[str, Any]
    """A valid dataset.json for nnU-Net, completed where the data set's own is missing or leaves things out."""
    set_aside: tuple[SetAside, ...]
    """Files that could not be taken as cases, sorted by case."""


def find_dataset(dataset: str | int, folders: Folders) -> str:
    """Return the name of a data set, looked for among the raw data sets and then among the preprocessed ones.

    Args:
        dataset: number (``501`` or ``"501"``) or full name (``"Dataset501_Name"``).
        folders: nnU-Net's folders.

    Returns:
        The full name.

    Raises:
        UserError: there is none, or several have the number; the message lists what is there.
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
            raise UserError(f"data set {wanted}: {folder} has several of that number ({several}); give the name")
        if found:
            return found[0]
        present += [name for name in names if name not in present]
    there = f"there are {', '.join(present)}" if present else "it holds no DatasetXXX_Name folder"
    raise UserError(f"data set {wanted}: not found in {folders.raw}; {there}; put it there or set nnUNet_raw")


def read_dataset(dataset: str | int, folders: Folders, channel_names: tuple[str, ...] | None = None) -> RawDataset:
    """List the cases of a raw data set; image headers and voxels stay closed but for one case to choose the reader.

    Hidden files are passed over. Symbolic links are followed. Files that do not make a case (another number of channels
    than the data set's, no channel suffix, another file ending) are listed in ``set_aside``.

    Args:
        dataset: number or name.
        folders: nnU-Net's folders.
        channel_names: names to use instead of those of dataset.json.

    Returns:
        The data set.

    Raises:
        UserError: no such data set, no images, several file endings, or channel names that do not fit.
    """
    name = find_dataset(dataset, folders)
    folder = folders.raw / name
    content = read_dataset_json(folder)
    if "dataset" in content:
        ending, groups, set_aside = group_listed_files(content, folder)
    else:
        ending, groups, set_aside = group_folder_files(content, folder)
    reader = _choose_reader(content, ending, groups)
    given = channel_names or channel_names_in(content)
    if channel_names is not None:
        logger.info(f"{name}: channels are called {', '.join(channel_names)}, as asked")
    files_per_case, channels_per_file = _count_channels(groups, reader, given, name)
    if given is None:
        given = (UNKNOWN_CHANNEL,) * (files_per_case * channels_per_file)
        logger.info(f"{name}: {len(given)} channel(s) found, their modality will be judged from the intensities")
    cases = []
    for case, files in sorted(groups.items()):
        if sorted(files) == list(range(files_per_case)):
            cases.append(RawCase(case, tuple(files[channel] for channel in range(files_per_case))))
            continue
        has = ", ".join(f"_{channel:04d}" for channel in sorted(files))
        reason = f"has channel files {has}, the data set has {files_per_case} per case"
        set_aside.append(SetAside(case, str(files[min(files)]), reason))
    if not cases:
        raise UserError(f"{folder}: no case has {files_per_case} channel files; mend channel_names in dataset.json")
    set_aside.sort(key=lambda entry: (entry.case, entry.file))
    completed = complete_dataset_json(content, ending, given, len(cases), name)
    return RawDataset(name, folder, ending, given, tuple(cases), reader, completed, tuple(set_aside))


def leave_out(dataset: RawDataset, path: Path) -> RawDataset:
    """Return the data set without the cases that a file names, one per line; a test set stays unseen that way.

    Args:
        dataset: the data set.
        path: list of cases.

    Raises:
        UserError: the file is no list, names a case that the data set does not have, or leaves none.
    """
    names = set(read_names(path))
    unknown = sorted(names - {case.name for case in dataset.cases})
    if unknown:
        raise UserError(f"{path}: {dataset.name} has no case {unknown[0]} ({len(unknown)} unknown); mend the list")
    kept = tuple(case for case in dataset.cases if case.name not in names)
    if not kept:
        raise UserError(f"{path}: names all cases of {dataset.name}; leave some to pretrain on")
    logger.info(f"{dataset.name}: {len(names)} of {len(dataset.cases)} cases left out, as {path} asks")
    return replace(dataset, cases=kept)


def _choose_reader(content: dict[str, Any], ending: str, groups: dict[str, dict[int, Path]]) -> str:
    """Return the name of the reader that nnU-Net takes: the first of its classes that reads an example."""
    from nnunetv2.imageio import reader_writer_registry as registry  # slow to import

    if ending == SERIES_ENDING:
        return DICOM_READER
    wanted = content.get("overwrite_image_reader_writer", "None")
    if wanted != "None":
        try:
            return registry.recursive_find_reader_writer_by_name(wanted).__name__
        except RuntimeError:
            logger.info(
                f"dataset.json asks for the reader {wanted}, which nnU-Net does not have; taking one by file ending"
            )
    candidates = [cls for cls in registry.LIST_OF_IO_CLASSES if ending.lower() in cls.supported_file_endings]
    if not candidates:
        raise UserError(f"file ending {ending}: nnU-Net reads {' '.join(ENDINGS)}; convert the images")
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
    """Return how many files a case has and how many channels are in each file (RGB and 4D images hold several)."""
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
            f"{dataset}: {len(names)} channel name(s) ({', '.join(names)}), but most cases have {usual * channels} "
            "channel(s); mend channel_names in dataset.json"
        )
    return usual, channels


def read_header(case: RawCase, reader: str) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Return the geometry of a case as nnU-Net's reader gives it, from the header of its first file.

    Formats whose geometry nnU-Net does not take from a header (tif, png, bmp) are read.

    Args:
        case: the case.
        reader: name of nnU-Net's reader class.

    Returns:
        Shape (z, y, x) in voxels, spacing (z, y, x) in mm, and the anatomical directions towards which x, y and z grow
        ("LPS"; empty where the format does not say). A 2D image is (1, y, x) with nnU-Net's 999-fold spacing in z.

    Raises:
        CaseError: the header cannot be read.
    """
    header = read_file_header(case.images[0], reader)
    return header.shape, header.spacing_mm, header.orientation


def read_volume(case: RawCase, reader: str) -> tuple[Float32[np.ndarray, "channel z y x"], tuple[float, ...]]:
    """Read the voxels of a case through nnU-Net's own reader.

    Args:
        case: the case.
        reader: name of nnU-Net's reader class.

    Returns:
        Intensities (channel, z, y, x) and spacing (z, y, x) in mm.

    Raises:
        CaseError: a file is missing, truncated, damaged or unreadable, or the channels do not fit together.
    """
    try:
        volume, properties = read_images(case.images, reader)
    except CaseError:
        for file in case.images if len(case.images) > 1 else ():
            read_images((file,), reader)  # raises for the file at fault, if it is a single one
        raise
    spacing_mm = tuple(float(mm) for mm in properties["spacing"])
    if volume.ndim != 4 or len(spacing_mm) != 3:
        raise CaseError(str(case.images[0]), "has vector voxels or more than four axes; write one file per channel")
    return np.ascontiguousarray(volume, dtype=np.float32), spacing_mm
