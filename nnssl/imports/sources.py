"""What an import starts from: the kinds of sources, the user's choices, and what was found."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from nnssl.data.dicom_series import DicomSeries
from nnssl.data.image_files import VOLUME_ENDINGS, ending_of
from nnssl.errors import UserError
from nnssl.files import some
from nnssl.imports.dicom_slices import is_dicom
from nnssl.schema import STRICT

FOREIGN_ENDINGS = (".mhd", ".nhdr", ".hdr", ".img", ".img.gz", ".mgz", ".mgh", ".mnc", ".par", ".nii.bz2", ".nii.zst")
"""Volumes that nnU-Net's readers do not take."""

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
    """What the user chose; what a kind of source does not know is an error (``check_choices``)."""

    __pydantic_config__: ClassVar = STRICT

    channels: tuple[str, ...] = ()
    """``NAME`` or ``NAME=SUFFIX`` per channel."""
    pattern: str | None = None
    """Only files whose path below the source, or series whose description, matches."""
    modalities: tuple[str, ...] = ()
    """BIDS suffixes, modalities of a collection or of DICOM; several are channels, or with ``mixed`` cases."""
    mixed: bool = False
    """Every image is a case of its own, whatever its modality."""
    min_slices: int | None = None
    """Smallest DICOM series to take."""


KNOWN_CHOICES = {
    "folder": ("channels", "pattern"),
    "bids": ("pattern", "modalities", "mixed"),
    "list": ("channels",),
    "dicom": ("pattern", "modalities", "mixed", "min_slices"),
    "collection": ("modalities", "mixed"),
}
FLAGS = {
    "channels": "--channels",
    "pattern": "--pattern",
    "modalities": "--modality",
    "mixed": "--mixed",
    "min_slices": "--min-slices",
}


@dataclass(frozen=True)
class Refusal:
    """A file, series or entry that is not imported."""

    __pydantic_config__: ClassVar = STRICT

    file: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A case as a source names it, its files not opened yet; or a DICOM series, which has been looked at."""

    name: str
    files: tuple[Path, ...]
    """One per channel; for a series, its folder."""
    series: DicomSeries | None = None


@dataclass
class Found:
    """What is in a source."""

    channel_names: tuple[str, ...] = ()
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Files that are no images by their ending, and folders that were not entered; number of each."""

    def refuse(self, file: Path | str, reason: str) -> None:
        """Note a file that is not imported."""
        self.refused.append(Refusal(os.fsencode(file).decode("utf-8", "replace"), reason))

    def refuse_name(self, file: Path) -> bool:
        """Refuse a file whose path is not UTF-8, and return whether that was so: ITK ends the process on such a path."""
        try:
            str(file).encode("utf-8")
        except UnicodeEncodeError:
            self.refuse(file, "has a path that is not UTF-8, which SimpleITK cannot open; rename it")
            return True
        return False


def check_choices(kind: str, choices: Choices) -> None:
    """Check that every choice means something for this kind of source.

    Raises:
        UserError: one does not.
    """
    default = Choices()
    for name, flag in FLAGS.items():
        if getattr(choices, name) != getattr(default, name) and name not in KNOWN_CHOICES[kind]:
            known = ", ".join(FLAGS[each] for each in KNOWN_CHOICES[kind])
            raise UserError(f"{flag}: is no choice for {KINDS[kind]}, which takes {known}; leave it out")


def detect_kind(source: Path) -> str:
    """Return which kind of source a path is, a key of ``KINDS``.

    Raises:
        UserError: there is no such path, it is no source, or it holds both image files and DICOM.
    """
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder; mend the path")
    if source.is_dir():
        return "collection" if (source / COLLECTION_FILE).is_file() else _kind_of_folder(source)
    if source.name.lower().endswith(".json"):
        return "collection"
    if source.name.lower().endswith(LIST_ENDINGS):
        return "list"
    raise UserError(f"{source}: is no list (.txt) and no collection (.json); give the folder of the images")


def _kind_of_folder(source: Path) -> str:
    volumes = dicoms = bids = 0
    for path in walk_files(source):
        if ending_of(path, (*VOLUME_ENDINGS, *FOREIGN_ENDINGS)):
            volumes += 1
            bids += path.relative_to(source).parts[0].startswith("sub-") and path.name.startswith("sub-")
        else:
            dicoms += is_dicom(path)
    if volumes and dicoms:
        raise UserError(
            f"{source}: holds {volumes} image files and {dicoms} DICOM files; choose with --kind folder or --kind dicom"
        )
    if dicoms:
        return "dicom"
    if not volumes:
        raise UserError(f"{source}: holds no image ({' '.join(VOLUME_ENDINGS)} or DICOM); give another folder")
    in_folders = any(path.is_dir() for path in source.glob("sub-*"))
    return "bids" if in_folders and (bids or (source / "dataset_description.json").is_file()) else "folder"


def walk_files(folder: Path, leave_out: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names; links are followed, hidden files passed over.

    Args:
        folder: where to start.
        leave_out: names of folders directly below it that are not entered.

    Raises:
        UserError: a folder cannot be opened.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be opened ({error.strerror}); make it readable or leave it out")

    entered: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(here)
        if real in entered:  # a link back up, or a second way to the same folder
            folders.clear()
            continue
        entered.add(real)
        top = Path(here) == folder
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or (top and name in leave_out)))
        yield from (Path(here) / name for name in sorted(files) if not name.startswith("."))


def volume_ending(path: Path | str) -> str:
    """Return the ending of a volume's file name, as it is written there; empty if it is none that is imported."""
    return ending_of(path, VOLUME_ENDINGS)


def stem_of(path: Path) -> str:
    """Return the name of an image file without its ending."""
    return path.name.removesuffix(volume_ending(path))


def choose_modalities(found: dict[str, int], choices: Choices, source: Path) -> tuple[str, ...]:
    """Return the modalities to take: those asked for, all of them if mixed, else the only one there is.

    Args:
        found: modality -> number of images.
        choices: the user's.
        source: for the error message.

    Raises:
        UserError: one asked for is not there, or there are several and none was chosen.
    """
    there = ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
    missing = [name for name in choices.modalities if name not in found]
    if missing:
        raise UserError(f"{source}: holds no {some(missing)}; there is {there or 'nothing'}; mend --modality")
    if len(set(choices.modalities)) < len(choices.modalities):
        raise UserError("--modality: names one twice; name each channel once")
    if choices.modalities:
        return choices.modalities
    if len(found) > 1 and not choices.mixed:
        raise UserError(
            f"{source}: holds {there}; choose with --modality (several are channels of one case), or take every image as "
            "a case with --mixed"
        )
    return tuple(sorted(found))
