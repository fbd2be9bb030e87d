"""Cases of a raw data set in nnU-Net's layout: found, counted and read; labels are neither needed nor opened.

A data set is a folder ``DatasetXXX_Name`` below ``nnUNet_raw`` with images ``imagesTr/CASE_0000.nii.gz`` (one file per
channel, ``_0001`` and so on). ``dataset.json`` is optional; what it does not say is inferred and said aloud.
"""

import contextlib
import copy
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from nnssl.data.dicom_series import DICOM_READER, SERIES_ENDING
from nnssl.data.image_files import CaseError, read_file_header, read_images
from nnssl.errors import UserError
from nnssl.files import read_json, read_names
from nnssl.paths import Folders
from nnssl.schema import STRICT

UNKNOWN_CHANNEL = "unknown"
"""Name of a channel that nothing names; the fingerprint decides from intensities what it is."""

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".tiff", ".tif", ".png", ".bmp")
"""What nnU-Net's readers read; longer endings first, so that the first match is the right one."""

READER_TRIALS = 5
"""Cases that are tried until a reader is found; the first ones may be broken."""

NO_LABELS = {"background": 0, "foreground": 1}
"""nnU-Net wants two labels at least in a dataset.json, also where nothing is labelled."""


@dataclass(frozen=True)
class SetAside:
    """A case or file that is not used, and why."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    file: str
    reason: str


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


def read_dataset(
    dataset: str | int,
    folders: Folders,
    say: Callable[[str], None],
    channel_names: tuple[str, ...] | None = None,
) -> RawDataset:
    """List the cases of a raw data set; image headers and voxels stay closed but for one case to choose the reader.

    Hidden files are passed over. Symbolic links are followed. Files that do not make a case (another number of channels
    than the data set's, no channel suffix, another file ending) are listed in ``set_aside``.

    Args:
        dataset: number or name.
        folders: nnU-Net's folders.
        say: called with one line for everything that was inferred because dataset.json does not say it.
        channel_names: names to use instead of those of dataset.json.

    Returns:
        The data set.

    Raises:
        UserError: no such data set, no images, several file endings, or channel names that do not fit.
    """
    name = find_dataset(dataset, folders)
    folder = folders.raw / name
    content = _read_dataset_json(folder, say)
    if "dataset" in content:
        ending, groups, set_aside = _group_listed_files(content, folder)
    else:
        ending, groups, set_aside = _group_folder_files(content, folder, say)
    reader = _choose_reader(content, ending, groups, say)
    given = channel_names or _names_in(content)
    if channel_names is not None:
        say(f"{name}: channels are called {', '.join(channel_names)}, as asked")
    files_per_case, channels_per_file = _count_channels(groups, reader, given, name)
    if given is None:
        given = (UNKNOWN_CHANNEL,) * (files_per_case * channels_per_file)
        say(f"{name}: {len(given)} channel(s) found, their modality will be judged from the intensities")
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
    completed = _complete_dataset_json(content, ending, given, len(cases), name, say)
    return RawDataset(name, folder, ending, given, tuple(cases), reader, completed, tuple(set_aside))


def leave_out(dataset: RawDataset, path: Path, say: Callable[[str], None]) -> RawDataset:
    """Return the data set without the cases that a file names, one per line; a test set stays unseen that way.

    Args:
        dataset: the data set.
        path: list of cases.
        say: called with one line.

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
    say(f"{dataset.name}: {len(names)} of {len(dataset.cases)} cases left out, as {path} asks")
    return replace(dataset, cases=kept)


def name_channels(dataset: RawDataset, channel_names: tuple[str, ...]) -> RawDataset:
    """Return the data set with its channels named, in ``dataset_json`` too.

    Raises:
        ValueError: another number of names than channels.
    """
    if len(channel_names) != len(dataset.channel_names):
        raise ValueError(f"{len(channel_names)} names for {len(dataset.channel_names)} channels")
    named = {str(channel): channel_name for channel, channel_name in enumerate(channel_names)}
    dataset_json = {**dataset.dataset_json, "channel_names": named}
    return replace(dataset, channel_names=channel_names, dataset_json=dataset_json)


def _read_dataset_json(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the content of dataset.json, or an empty dict where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: the data set has no raw images there; copy them or set nnUNet_raw")
    path = folder / "dataset.json"
    if not path.exists():
        say(f"{folder.name}: no dataset.json, so channels and file ending are taken from the files")
        return {}
    content = read_json(path, "dataset.json")
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a {type(content).__name__}, not a dataset.json; it starts with {{")
    return content


def _names_in(content: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the channel names of a dataset.json in channel order, None if it has none."""
    names = content.get("channel_names") or content.get("modality")
    if not names:
        return None
    return tuple(str(names[channel]) for channel in sorted(names, key=int))


def _group_listed_files(
    content: dict[str, Any], folder: Path
) -> tuple[str, dict[str, dict[int, Path]], list[SetAside]]:
    """Group the files that dataset.json lists itself, paths being relative to its folder as in nnU-Net."""
    groups: dict[str, dict[int, Path]] = {}
    set_aside = []
    for case, entry in content["dataset"].items():
        files = [folder / os.path.expandvars(image) for image in entry["images"]]
        missing = [file for file in files if not file.exists()]
        if missing:
            set_aside.append(SetAside(case, str(missing[0]), "is listed in dataset.json and does not exist"))
        elif files:
            groups[case] = dict(enumerate(files))
        else:
            set_aside.append(SetAside(case, str(folder / "dataset.json"), "is listed without images"))
    if not groups:
        raise UserError(f"{folder / 'dataset.json'}: none of the images listed under 'dataset' exists; mend the paths")
    counts = Counter(_ending_of(file.name) for files in groups.values() for file in files.values())
    return content.get("file_ending") or str(counts.most_common(1)[0][0]), groups, set_aside


def _group_folder_files(
    content: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> tuple[str, dict[str, dict[int, Path]], list[SetAside]]:
    """Group the files of imagesTr by case and channel."""
    images = folder / "imagesTr"
    if not images.is_dir():
        raise UserError(f"{folder}: has no folder imagesTr; put the images there as CASE_0000.nii.gz")
    files = sorted(path for path in images.iterdir() if not path.name.startswith(".") and _ending_of(path.name))
    ending = _decide_ending(content, images, files, say)
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    set_aside = []
    for file in files:
        own = _ending_of(file.name)
        stem = file.name[: -len(own)]
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if own != ending:
            case = match[1] if match else stem
            set_aside.append(SetAside(case, str(file), f"ends in {own}, the data set in {ending}"))
        elif match is None:
            set_aside.append(SetAside(stem, str(file), "has no channel number such as _0000 in its name"))
        elif not file.exists():
            set_aside.append(SetAside(match[1], str(file), "is a link to a file that does not exist"))
        else:
            groups[match[1]][int(match[2])] = file
    if not groups:
        raise UserError(
            f"{images}: no file makes a case ({Path(set_aside[0].file).name} {set_aside[0].reason}); "
            f"rename them to CASE_0000{ending}"
        )
    return ending, dict(groups), set_aside


def _decide_ending(content: dict[str, Any], images: Path, files: list[Path], say: Callable[[str], None]) -> str:
    """Return the file ending of a data set, from dataset.json or else the only one there is."""
    counts = Counter(_ending_of(path.name) for path in files)
    found = " and ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
    if not files:
        raise UserError(f"{images}: holds no image that nnU-Net reads ({' '.join(ENDINGS)}); put the images there")
    ending = content.get("file_ending")
    if ending is None:
        if len(counts) > 1:
            raise UserError(f"{images}: holds {found} files; keep one kind or name it as file_ending in dataset.json")
        ending = str(next(iter(counts)))
        say(f"{images.parent.name}: file ending {ending} taken from the {len(files)} files of imagesTr")
    elif ending not in counts:
        raise UserError(f"{images}: dataset.json says file_ending {ending}, but there are {found} files; mend one")
    return str(ending)


def _ending_of(name: str) -> str:
    """Return the readable file ending that a file has, as it is written there; empty if it has none."""
    for ending in (*ENDINGS, SERIES_ENDING):
        if name.lower().endswith(ending):
            return name[-len(ending) :]
    return ""


def _choose_reader(
    content: dict[str, Any], ending: str, groups: dict[str, dict[int, Path]], say: Callable[[str], None]
) -> str:
    """Return the name of the reader that nnU-Net takes: the first of its classes that reads an example."""
    from nnunetv2.imageio import reader_writer_registry as registry  # slow to import

    if ending == SERIES_ENDING:
        return DICOM_READER
    wanted = content.get("overwrite_image_reader_writer", "None")
    if wanted != "None":
        try:
            return registry.recursive_find_reader_writer_by_name(wanted).__name__
        except RuntimeError:
            say(f"dataset.json asks for the reader {wanted}, which nnU-Net does not have; taking one by file ending")
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


def _complete_dataset_json(
    content: dict[str, Any], ending: str, names: tuple[str, ...], cases: int, dataset: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return a dataset.json that nnU-Net accepts."""
    completed = copy.deepcopy(content)
    completed.pop("modality", None)
    completed["channel_names"] = {str(channel): name for channel, name in enumerate(names)}
    labels = completed.get("labels")
    if isinstance(labels, dict) and "background" not in labels and all(str(key).isdecimal() for key in labels):
        completed["labels"] = labels = {str(name): int(value) for value, name in labels.items()}  # the Decathlon's form
    if not isinstance(labels, dict) or "background" not in labels:
        completed["labels"] = dict(NO_LABELS)
    if completed.get("numTraining", cases) != cases:
        say(f"{dataset}: dataset.json counts {completed['numTraining']} cases, {cases} can be used")
    completed["numTraining"] = cases
    completed["file_ending"] = ending
    return completed


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
