"""Images as users have them -> a raw data set of nnU-Net by reference: ``dataset.json`` names the files, none is copied."""

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
from nnssl.data.image_files import Header, check_spacing, check_whole, read_file_header
from nnssl.errors import UserError
from nnssl.files import read_json, some, whole_folder, write_json
from nnssl.imports.case_names import number_equal_names
from nnssl.imports.dicom import find_series
from nnssl.imports.folders import find_in_bids, find_in_folder
from nnssl.imports.lists import find_in_collection, find_in_list
from nnssl.imports.record import RECORD_FILE, SCHEMA_VERSION, ImportRecord, TakenCase
from nnssl.imports.sources import KINDS, Candidate, Choices, Found, check_choices, detect_kind, volume_ending
from nnssl.log import logger
from nnssl.paths import Folders, make_writable
from nnssl.schema import read, write
from nnssl.version import __version__

VOLUME_READER = "SimpleITKIO"
"""Reads all endings that are imported, also when a data set mixes them."""

FINDERS: dict[str, Callable[[Path, Choices], Found]] = {
    "folder": find_in_folder,
    "bids": find_in_bids,
    "list": find_in_list,
    "dicom": find_series,
    "collection": find_in_collection,
}


def import_dataset(
    source: Path,
    number: int,
    name: str,
    folders: Folders,
    kind: str | None = None,
    choices: Choices | None = None,
    restart: bool = False,
) -> ImportRecord:
    """Make a raw data set of images where they are.

    Writes ``<nnUNet_raw>/DatasetXXX_NAME`` with ``dataset.json``, ``import.json`` and, for DICOM, one small series file per
    case. The folder appears whole or not at all. The same import again writes nothing.

    Args:
        source: a folder of image files, a BIDS tree, a list, a folder of DICOM, or a collection.
        number: of the data set, 1 to 999.
        name: of the data set, without ``DatasetXXX_``.
        folders: nnU-Net's folders.
        kind: a key of ``KINDS``; None to find out.
        choices: which images are taken and how they make cases.
        restart: replace what an earlier import made.

    Returns:
        What was taken and refused.

    Raises:
        UserError: the source or the choices do not fit, nothing is left to import, or the data set exists.
    """
    choices = choices or Choices()
    dataset_name = _name_dataset(number, name)
    folder = folders.raw / dataset_name
    _check_target(folder, number, folders)
    source = Path(os.path.abspath(source.expanduser()))
    if Found().refuse_name(source):
        raise UserError(f"{ascii(str(source))}: is no UTF-8 path, which SimpleITK cannot open; rename it")
    if kind is not None and not source.exists():
        raise UserError(f"{source}: there is no such file or folder; mend the path")
    kind = kind or detect_kind(source)
    logger.info(f"{source}: {KINDS[kind]}")
    check_choices(kind, choices)
    found = FINDERS[kind](source, choices)
    names = number_equal_names(candidate.name for candidate in found.candidates)
    candidates = [replace(each, name=name) for each, name in zip(found.candidates, names, strict=True)]
    taken = tuple(_check_candidates(sorted(candidates, key=lambda each: each.name), found))
    if not taken:
        raise UserError(_nothing_left(source, kind, found))
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
            logger.info(f"{folder}: was imported from the same files with the same choices; nothing to do")
            return record
        if not restart:
            raise UserError(
                f"{folder}: is an import of other files or with other choices; --restart to replace it, or choose another "
                "number"
            )
    _write_dataset(folder, record, series)
    return record


def _name_dataset(number: int, name: str) -> str:
    if not 1 <= number <= 999:
        raise UserError(f"-d {number}: nnU-Net numbers data sets from 1 to 999; choose such a number")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or re.match(r"Dataset\d", name):
        raise UserError(f"-n {name}: write letters, digits, _ and - only, without DatasetXXX_, such as MyScans")
    return f"Dataset{number:03d}_{name}"


def _check_target(folder: Path, number: int, folders: Folders) -> None:
    """Raise a UserError if the number is taken or the folder holds what no import made."""
    for place in (folders.raw, folders.preprocessed):
        others = [path.name for path in place.glob(f"Dataset{number:03d}_*") if path.name != folder.name]
        if others:
            raise UserError(f"-d {number}: {place} has {some(sorted(others))} of this number; choose another number")
    if not folder.exists():
        return
    own = {RECORD_FILE, "dataset.json", "imagesTr"}
    content = {path.name for path in folder.iterdir()}
    foreign = sorted(content - own)
    if (folder / "imagesTr").is_dir():
        foreign += sorted(path.name for path in (folder / "imagesTr").iterdir() if path.suffix != SERIES_ENDING)
    if foreign or (content and RECORD_FILE not in content):
        what = some(foreign or sorted(content))
        raise UserError(f"{folder}: holds what no import made ({what}); choose another number or move it away")


def _check_candidates(candidates: list[Candidate], found: Found) -> list[TakenCase]:
    """Return the cases whose files are there, whole and of one grid; the others are refused."""
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
        CaseError: a file is missing, cut short or unreadable, or the files do not make the channels of a case.
    """
    headers = []
    for file in files:
        if file.is_symlink() and not file.exists():
            raise CaseError(str(file), "is a link to a file that is not there (git-annex: get it first)")
        header = read_file_header(file, VOLUME_READER)
        check_whole(file, trust_length=True)
        if header.channels * len(files) != channels:
            reason = f"has {header.channels} volumes in one file where {channels // len(files)} is wanted"
            raise CaseError(str(file), f"{reason}; split it, or name what each is with --channels")
        check_spacing(file, header.spacing_mm)
        headers.append(header)
    for file, header in zip(files, headers, strict=True):
        if header.shape != headers[0].shape or not np.allclose(header.spacing_mm, headers[0].spacing_mm):
            raise CaseError(str(file), f"has not the shape and spacing of {files[0].name}; resample one to the other")
    return headers[0]


def _measure_series(candidate: Candidate) -> TakenCase:
    """Return a case of a DICOM series; its slices have been checked, and are read when they are needed."""
    assert candidate.series is not None
    shape, spacing_mm, _ = measure_series(candidate.series)
    return TakenCase(candidate.name, (_series_path(candidate.name),), shape, spacing_mm)


def _series_path(case: str) -> str:
    """Return where the series file of a case lies below the folder of its data set."""
    return f"imagesTr/{case}_0000{SERIES_ENDING}"


def _nothing_left(source: Path, kind: str, found: Found) -> str:
    if not found.refused:
        return f"{source}: {KINDS[kind]} without an image in it; give another source or --kind"
    first = "; ".join(f"{Path(refusal.file).name} {refusal.reason}" for refusal in found.refused[:2])
    return f"{source}: nothing can be imported, {len(found.refused)} refused ({first}); mend them or choose otherwise"


def _is_same(folder: Path, record: ImportRecord, series: dict[str, dict[str, Any]]) -> bool:
    """Return whether a data set is what this import would write."""
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
    """Return a dataset.json that nnU-Net understands, with its mapping of cases to files."""
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
    """Write a data set; it is never there in part."""
    make_writable(folder.parent)
    with whole_folder(folder) as new:
        (new / "imagesTr").mkdir()
        for case, content in series.items():
            write_json(new / _series_path(case), content)
        write(new / RECORD_FILE, record)
        write_json(new / "dataset.json", _dataset_json(record))
