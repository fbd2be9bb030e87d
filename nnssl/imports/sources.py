"""Sources of an import: the supported kinds, the user's choices, and the files found."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from nnssl.data.case_error import NOT_UTF8
from nnssl.data.dicom_series import DicomSeries
from nnssl.data.image_files import VOLUME_ENDINGS, ending_of
from nnssl.errors import ArgumentError, UserError
from nnssl.files import is_utf8, printable, some
from nnssl.imports.dicom_slices import is_dicom
from nnssl.schema import STRICT

FOREIGN_ENDINGS = (".mhd", ".nhdr", ".hdr", ".img", ".img.gz", ".mgz", ".mgh", ".mnc", ".par", ".nii.bz2", ".nii.zst")
"""Endings of volumes that nnU-Net's readers do not support."""

LIST_ENDINGS = (".txt", ".csv", ".tsv", ".lst", ".list")

COLLECTION_FILE = "pretrain_data.json"

KINDS = {
    "folder": "a folder of image files",
    "bids": "a BIDS tree",
    "list": "a list of image files",
    "dicom": "a folder of DICOM series",
    "collection": "a pretrain_data.json collection",
}


@dataclass(frozen=True)
class Choices:
    """The user's choices. A choice that does not apply to the kind of source is an error (``check_choices``)."""

    __pydantic_config__: ClassVar = STRICT

    channels: tuple[str, ...] = ()
    """``NAME`` or ``NAME=SUFFIX`` for each channel."""
    pattern: str | None = None
    """Glob pattern for file names or paths relative to the source, or for descriptions of DICOM series; None for all."""
    modalities: tuple[str, ...] = ()
    """BIDS suffixes, or modalities of a collection or of DICOM. Several ones are channels of one case, or separate cases if
    ``mixed`` is True.
    """
    mixed: bool = False
    """Whether every image is a separate case, whatever its modality."""
    min_slices: int | None = None
    """Smallest number of slices in a DICOM series; None for the default."""


KNOWN_CHOICES = {
    "folder": ("channels", "pattern"),
    "bids": ("pattern", "modalities", "mixed"),
    "list": ("channels",),
    "dicom": ("pattern", "modalities", "mixed", "min_slices"),
    "collection": ("modalities", "mixed"),
}
"""Choices that apply to each kind of source."""


@dataclass(frozen=True)
class Refusal:
    """A rejected file, series or entry."""

    __pydantic_config__: ClassVar = STRICT

    file: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A possible case: files that have not been opened yet, or a DICOM series whose headers have been checked."""

    name: str
    files: tuple[Path, ...]
    """One file per channel; for a series, its folder."""
    series: DicomSeries | None = None


@dataclass
class Found:
    """Content of a source."""

    channel_names: tuple[str, ...] = ()
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Numbers of skipped files, which are not images, by file ending, and of skipped folders."""

    def refuse(self, file: Path | str, reason: str) -> None:
        """Record a rejected file; the reason is worded so that the file is its subject."""
        self.refused.append(Refusal(printable(file), reason))

    def refuse_name(self, file: Path) -> bool:
        """Reject a file if its path is not UTF-8, on which ITK would end the process; return whether it was rejected."""
        if not is_utf8(file):
            self.refuse(file, NOT_UTF8)
        return not is_utf8(file)


def check_choices(kind: str, choices: Choices) -> None:
    """Check that every choice applies to this kind of source.

    Raises:
        ArgumentError: If one does not.
    """
    default = Choices()
    known = KNOWN_CHOICES[kind]
    for name in (each.name for each in fields(Choices)):
        if getattr(choices, name) != getattr(default, name) and name not in known:
            raise ArgumentError(
                f"{name} cannot be used with {KINDS[kind]}, which accepts only {', '.join(known)}", name, *known
            )


def detect_kind(source: Path) -> str:
    """Detect the kind of a source, a key of ``KINDS``.

    Raises:
        ArgumentError: If the source contains both image files and DICOM files.
        UserError: If the path does not exist or is not a source.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; check the path")
    if source.is_dir():
        return "collection" if (source / COLLECTION_FILE).is_file() else _kind_of_folder(source)
    if source.name.lower().endswith(".json"):
        return "collection"
    if source.name.lower().endswith(LIST_ENDINGS):
        return "list"
    raise UserError(f"{source} is neither a list (.txt) nor a collection (.json); choose a folder of images")


def _kind_of_folder(source: Path) -> str:
    volumes = dicoms = bids = 0
    for path in walk_files(source):
        if ending_of(path, (*VOLUME_ENDINGS, *FOREIGN_ENDINGS)):
            volumes += 1
            bids += path.relative_to(source).parts[0].startswith("sub-") and path.name.startswith("sub-")
        else:
            dicoms += is_dicom(path)
    if volumes and dicoms:
        raise ArgumentError(
            f"{source} contains {volumes} image files and {dicoms} DICOM files; set kind to folder or dicom", "kind"
        )
    if dicoms:
        return "dicom"
    if not volumes:
        raise UserError(f"{source} contains no image ({' '.join(VOLUME_ENDINGS)} or DICOM); choose another folder")
    in_folders = any(path.is_dir() for path in source.glob("sub-*"))
    return "bids" if in_folders and (bids or (source / "dataset_description.json").is_file()) else "folder"


def walk_files(folder: Path, leave_out: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names. Links are followed; hidden files are skipped.

    Args:
        folder: Folder to search.
        leave_out: Names of folders directly below it that are not searched.

    Raises:
        UserError: If a folder cannot be opened.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be opened ({error.strerror}); make it readable or remove it")

    entered: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(here)
        if real in entered:  # a link to a parent folder, or a second path to the same folder
            folders.clear()
            continue
        entered.add(real)
        top = Path(here) == folder
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or (top and name in leave_out)))
        yield from (Path(here) / name for name in sorted(files) if not name.startswith("."))


def volume_ending(path: Path | str) -> str:
    """Return the ending of a file name as written there, if it is a format that is imported, else an empty string."""
    return ending_of(path, VOLUME_ENDINGS)


def stem_of(path: Path) -> str:
    """Return the name of an image file without its ending."""
    return path.name.removesuffix(volume_ending(path))


def choose_modalities(found: dict[str, int], choices: Choices, source: Path) -> tuple[str, ...]:
    """Return the modalities to import: the chosen ones, all for ``mixed``, otherwise the only one found.

    Args:
        found: Number of images of each modality.
        choices: The user's choices.
        source: Source, for the error message.

    Raises:
        ArgumentError: If a chosen modality does not exist or is repeated, or if there are several and none was chosen.
    """
    there = ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
    missing = [name for name in choices.modalities if name not in found]
    if missing:
        raise ArgumentError(
            f"modalities must be among those in {source} ({there or 'none'}), got {some(missing)}",
            "modalities",
        )
    if len(set(choices.modalities)) < len(choices.modalities):
        raise ArgumentError(f"modalities must not repeat, got {' '.join(choices.modalities)}", "modalities")
    if choices.modalities:
        return choices.modalities
    if len(found) > 1 and not choices.mixed:
        raise ArgumentError(
            f"{source} contains {there}; choose with modalities (several become channels of one case), or set mixed to "
            "import every image as a case",
            "modalities",
            "mixed",
        )
    return tuple(sorted(found))
