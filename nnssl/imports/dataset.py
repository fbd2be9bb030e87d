"""Registration of existing images as a raw nnU-Net data set: ``dataset.json`` lists the files, and none are copied."""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.data.case_error import CaseError
from nnssl.data.dataset_json import NO_LABELS
from nnssl.data.dicom_series import SERIES_ENDING, measure_series
from nnssl.data.image_files import Header, check_size, check_spacing, read_file_header
from nnssl.data.whole_files import check_whole
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json, some, whole_folder, write_json
from nnssl.imports.case_names import number_equal_names
from nnssl.imports.dicom import find_series
from nnssl.imports.folders import find_in_bids, find_in_folder
from nnssl.imports.lists import find_in_collection, find_in_list
from nnssl.imports.record import RECORD_FILE, SCHEMA_VERSION, ImportRecord, TakenCase
from nnssl.imports.sources import KINDS, Candidate, Choices, Found, check_choices, detect_kind, volume_ending
from nnssl.log import logger
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.schema import read, write
from nnssl.version import __version__

VOLUME_READER = "SimpleITKIO"
"""Reader for all imported formats, also if a data set mixes them."""

FINDERS: dict[str, Callable[[Path, Choices], Found]] = {
    "folder": find_in_folder,
    "bids": find_in_bids,
    "list": find_in_list,
    "dicom": find_series,
    "collection": find_in_collection,
}


def import_dataset(
    source: Path | str,
    number: int,
    name: str,
    *,
    kind: str | None = None,
    choices: Choices | None = None,
    restart: bool = False,
    folders: Folders | None = None,
) -> ImportRecord:
    """Register existing images as a raw nnU-Net data set without copying them.

    Writes ``<nnUNet_raw>/DatasetXXX_NAME`` with ``dataset.json``, ``import.json`` and, for DICOM, one small series file per
    case. The folder is either complete or absent. Repeating an import writes nothing.

    Args:
        source: Folder of image files, BIDS tree, list, folder of DICOM files, or collection.
        number: Number of the data set, between 1 and 999.
        name: Name of the data set, without ``DatasetXXX_``.
        kind: Kind of the source, a key of ``KINDS``; None to detect it.
        choices: Which images to import and how they form cases; None for the defaults.
        restart: Whether to replace an earlier import.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        Record of the imported cases and the rejected files.

    Raises:
        ArgumentError: If the number, the name, the kind or the choices are wrong.
        UserError: If the source cannot be read, if no image can be imported, or if the folder contains other files.

    Examples:
        >>> record = nnssl.import_dataset("scans", 501, "Scans")
        >>> len(record.taken)
        6
    """
    choices = choices or Choices()
    folders = folders or resolve_folders()
    dataset_name = _name_dataset(number, name)
    folder = folders.raw / dataset_name
    _check_target(folder, number, folders)
    source = Path(os.path.abspath(Path(source).expanduser()))
    if Found().refuse_name(source):
        raise UserError(f"{ascii(str(source))} is not a UTF-8 path, so SimpleITK cannot open it; rename it")
    if kind is not None and kind not in KINDS:
        raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {kind}", "kind")
    if kind is not None and not source.exists():
        raise UserError(f"{source} does not exist; check the path")
    kind = kind or detect_kind(source)
    logger.info(f"{source}: {KINDS[kind]}")
    check_choices(kind, choices)
    found = FINDERS[kind](source, choices)
    names = number_equal_names(candidate.name for candidate in found.candidates)
    candidates = [replace(each, name=name) for each, name in zip(found.candidates, names, strict=True)]
    taken = tuple(_check_candidates(sorted(candidates, key=lambda each: each.name), found))
    if not taken:
        raise _nothing_left(source, kind, found)
    record = ImportRecord(
        schema_version=SCHEMA_VERSION,
        nnssl_version=__version__,
        dataset_name=dataset_name,
        source=str(source),
        kind=kind,
        choices=choices,
        channel_names=found.channel_names,
        taken=taken,
        refused=tuple(sorted(found.refused, key=lambda refusal: refusal.file)),
        passed_over=dict(sorted(found.passed_over.items())),
    )
    kept = {case.case for case in taken}
    series = {each.name: asdict(each.series) for each in candidates if each.series is not None and each.name in kept}
    if folder.is_dir() and any(folder.iterdir()):
        if _is_same(folder, record, series):
            logger.info(f"{folder} is already an import of the same files with the same choices; nothing to do")
            return record
        if not restart:
            raise ArgumentError(
                f"{folder} is an import of other files or with other choices; use restart to replace it, or another number",
                "restart",
                "number",
            )
    _write_dataset(folder, record, series)
    return record


def _name_dataset(number: int, name: str) -> str:
    if not 1 <= number <= 999:
        raise ArgumentError(f"number must be between 1 and 999, got {number}", "number")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or re.match(r"Dataset\d", name):
        raise ArgumentError(
            f"name must consist of letters, digits, _ and -, without DatasetXXX_ (such as MyScans), got {name}", "name"
        )
    return f"Dataset{number:03d}_{name}"


def _check_target(folder: Path, number: int, folders: Folders) -> None:
    """Raise a UserError if the number is taken or the folder contains files that no import has written."""
    for place in (folders.raw, folders.preprocessed):
        others = [path.name for path in place.glob(f"Dataset{number:03d}_*") if path.name != folder.name]
        if others:
            raise ArgumentError(
                f"number {number} is taken by {some(sorted(others))} in {place}; choose another", "number"
            )
    if not folder.exists():
        return
    own = {RECORD_FILE, "dataset.json", "imagesTr"}
    content = {path.name for path in folder.iterdir()}
    foreign = sorted(content - own)
    if (folder / "imagesTr").is_dir():
        foreign += sorted(path.name for path in (folder / "imagesTr").iterdir() if path.suffix != SERIES_ENDING)
    if foreign or (content and RECORD_FILE not in content):
        what = some(foreign or sorted(content))
        raise ArgumentError(
            f"{folder} contains files that no import has written ({what}); move them or use another number", "number"
        )


def _check_candidates(candidates: list[Candidate], found: Found) -> list[TakenCase]:
    """Return the cases whose files exist, are complete and have one geometry; the others are rejected."""
    taken = []
    for candidate in candidates:
        try:
            if candidate.series is None:
                header = _check_files(candidate.files, len(found.channel_names))
                images = tuple(str(file) for file in candidate.files)
                taken.append(TakenCase(candidate.name, images, header.shape, header.spacing_mm))
            else:
                taken.append(_measure_series(candidate))
        except CaseError as error:
            found.refuse(error.file, error.reason)
    return taken


def _check_files(files: tuple[Path, ...], channels: int) -> Header:
    """Return the header of a case's first file.

    Raises:
        CaseError: If a file is missing, truncated or unreadable, or if the files cannot be the channels of a case.
    """
    headers = []
    for file in files:
        if file.is_symlink() and not file.exists():
            raise CaseError(str(file), "is a link to a file that does not exist (for git-annex, run git annex get)")
        check_whole(file, trust_length=True)
        header = read_file_header(file, VOLUME_READER)
        if header.channels * len(files) != channels:
            reason = f"has {header.channels} volume(s), but {channels // len(files)} per file are expected"
            raise CaseError(str(file), f"{reason}; split the file, or name a channel for each volume")
        check_spacing(file, header.spacing_mm)
        check_size(file, header.shape, header.spacing_mm)
        headers.append(header)
    for file, header in zip(files, headers, strict=True):
        if header.shape != headers[0].shape or not np.allclose(header.spacing_mm, headers[0].spacing_mm):
            raise CaseError(str(file), f"differs in shape or spacing from {files[0].name}; resample one to the other")
    return headers[0]


def _measure_series(candidate: Candidate) -> TakenCase:
    """Return the case of a DICOM series whose slices have been checked; voxels are not read."""
    assert candidate.series is not None
    shape, spacing_mm, _ = measure_series(candidate.series)
    return TakenCase(candidate.name, (_series_path(candidate.name),), shape, spacing_mm)


def _series_path(case: str) -> str:
    """Return the path of a case's series file relative to the folder of the data set."""
    return f"imagesTr/{case}_0000{SERIES_ENDING}"


def _nothing_left(source: Path, kind: str, found: Found) -> ArgumentError:
    if not found.refused:
        return ArgumentError(
            f"{source} contains no images when read as {KINDS[kind]}; choose another source or kind", "kind"
        )
    first = "; ".join(f"{Path(refusal.file).name} {refusal.reason}" for refusal in found.refused[:2])
    return ArgumentError(
        f"{source}: no image can be imported, {len(found.refused)} rejected ({first}); fix them or choose other images"
    )


def _is_same(folder: Path, record: ImportRecord, series: dict[str, dict[str, Any]]) -> bool:
    """Return whether a data set is identical to the result of this import."""
    try:
        stored = read(ImportRecord, folder / RECORD_FILE, "record of an import")
        same = replace(stored, nnssl_version=record.nnssl_version) == record
        same = same and read_json(folder / "dataset.json", "dataset.json") == _dataset_json(record)
        return same and all(
            read_json(folder / _series_path(case), "DICOM series file") == _plain(content)
            for case, content in series.items()
        )
    except UserError:
        return False


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "slices": list(content["slices"])}


def _dataset_json(record: ImportRecord) -> dict[str, Any]:
    """Return the content of a dataset.json for nnU-Net that maps cases to files."""
    endings = Counter(volume_ending(image) or SERIES_ENDING for case in record.taken for image in case.images)
    ending = endings.most_common(1)[0][0]
    reader = {} if ending == SERIES_ENDING else {"overwrite_image_reader_writer": VOLUME_READER}
    return {
        "channel_names": {str(channel): name for channel, name in enumerate(record.channel_names)},
        "labels": dict(NO_LABELS),
        "numTraining": len(record.taken),
        "file_ending": ending,
        **reader,
        "dataset": {case.case: {"images": list(case.images), "label": ""} for case in record.taken},
    }


def _write_dataset(folder: Path, record: ImportRecord, series: dict[str, dict[str, Any]]) -> None:
    """Write a data set, which appears only when it is complete."""
    make_writable(folder.parent)
    with whole_folder(folder) as new:
        (new / "imagesTr").mkdir()
        for case, content in series.items():
            write_json(new / _series_path(case), content)
        write(new / RECORD_FILE, record)
        write_json(new / "dataset.json", _dataset_json(record))
