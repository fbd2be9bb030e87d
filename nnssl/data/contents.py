"""Digests of raw files, by which replaced images, labels and masks are noticed.

Whatever is made of raw files keeps digests of their bytes. A list beside the preprocessed data keeps the digest of every file
together with its size and times, so that a file is read again only if one of these has changed. Files that were only copied or
touched therefore count as unchanged, and comparing a data set of which nothing changed takes one look at each file's status.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nnssl import schema
from nnssl.data.case_error import CaseError
from nnssl.data.dicom_series import SERIES_ENDING, find_slices
from nnssl.errors import UserError
from nnssl.files import some, write_json
from nnssl.log import logger
from nnssl.paths import Folders
from nnssl.schema import STRICT

FILE_NAME = "nnssl_raw_files.json"
"""Name of the list, in the folder of the preprocessed data set."""
RECORDS = "nnssl_contents"
"""Folder beside nnU-Net's preprocessed cases with the state that each was made from; nnU-Net accepts no such files among them."""
SCHEMA_VERSION = 1
BLOCK_BYTES = 1 << 20
MANY_BYTES = 1 << 30
"""Number of bytes from which on reading them again is announced."""

Status = tuple[int, int, int, int]
"""Number of files, bytes, and latest times of modification and of status change in ns, of an image with its other files."""


@dataclass(frozen=True)
class Content:
    """Digests of the files of a case, by which two states of the case are compared."""

    __pydantic_config__: ClassVar = STRICT

    images: str
    label: str = ""
    """Digest of the label; empty if none is used."""

    def difference(self, now: "Content") -> str:
        """Return in a word what differs in another state of the same case: "image", "label" or both; empty if nothing does."""
        pairs = {"image": (self.images, now.images), "label": (self.label, now.label)}
        return " and ".join(what for what, (before, after) in pairs.items() if before != after)


def digest_files(files: Iterable[Path], dataset_name: str, folders: Folders, threads: int = 1) -> dict[Path, str]:
    """Return the digests of the bytes of raw files, of which only new and changed ones are read.

    Args:
        files: Images, labels and masks; a list of DICOM slices stands for the slices, too.
        dataset_name: Name of the data set, in whose preprocessed folder the list of digests is kept.
        folders: nnU-Net's folders.
        threads: Number of files that are read at the same time.

    Returns:
        The digest of each file, with 32 hexadecimal digits. Files that do not exist are left out.
    """
    path = folders.preprocessed / dataset_name / FILE_NAME
    known = _read_list(path)
    now = {file: status for file in files if (status := find_status(file)) is not None}
    found = {file: known[str(file)][1] for file, status in now.items() if known.get(str(file), (None,))[0] == status}
    changed = [file for file in now if file not in found]
    if changed:
        total = sum(now[file][1] for file in changed)
        if total >= MANY_BYTES:
            logger.info(f"{dataset_name}: reading {len(changed)} new or changed files ({total / 1e9:.1f} GB) ...")
        with ThreadPoolExecutor(max(1, threads)) as pool:
            digests = dict(zip(changed, pool.map(_digest_of, changed), strict=True))
        found |= {file: digest for file, digest in digests.items() if digest}
        known |= {str(file): (now[file], digest) for file, digest in digests.items() if digest}
        with suppress(
            OSError, UserError
        ):  # the list only saves time, and preprocessed data may lie in a folder to read only
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"schema_version": SCHEMA_VERSION, "files": {file: known[file] for file in sorted(known)}})
    return found


def digest_together(files: Sequence[Path], digests: Mapping[Path, str]) -> str:
    """Return one digest of the files of a case, of their names and bytes; a file that does not exist counts as such."""
    content = [(file.name, digests.get(file)) for file in files]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def find_status(file: Path) -> Status | None:
    """Return the status of a file and of those that belong to it; None if one does not exist.

    A file that was replaced by one of the same size and time has another time of status change, which cannot be set.
    """
    try:
        status = [part.stat() for part in _parts_of(file)]
    except (OSError, CaseError):
        return None
    modified, changed = max(each.st_mtime_ns for each in status), max(each.st_ctime_ns for each in status)
    return len(status), sum(each.st_size for each in status), modified, changed


def changed_cases(before: Mapping[str, Content], now: Mapping[str, Content]) -> dict[str, str]:
    """Return what differs in the cases of which both states are known, by case."""
    differences = {case: before[case].difference(now[case]) for case in sorted(before) if case in now}
    return {case: what for case, what in differences.items() if what}


def describe_changes(changes: Mapping[str, str]) -> str:
    """Return changed cases in words: ``case_1 (label), case_2 (image and label) and 3 more``."""
    return some([f"{case} ({what})" for case, what in changes.items()])


def write_contents(path: Path, contents: Mapping[str, Content]) -> None:
    """Write the state of cases that something is made from."""
    write_json(path, {case: {"images": own.images, "label": own.label} for case, own in sorted(contents.items())})


def read_contents(path: Path) -> dict[str, Content] | None:
    """Return the state of the cases that something was made from; None if it is not known."""
    try:
        stored = json.loads(path.read_text())
        return {case: schema.parse(Content, own, str(path)) for case, own in stored.items()}
    except (OSError, ValueError, AttributeError, UserError):
        return None


def _parts_of(file: Path) -> list[Path]:
    """Return a file and those that its reader takes into account besides it: DICOM slices, and the spacing of a TIFF."""
    if file.name.endswith(SERIES_ENDING):
        return [file, *find_slices(file)]
    if file.suffix.lower() in (".tif", ".tiff"):
        spacings = (file.with_suffix(".json"), file.with_name(f"{file.stem[:-5]}.json"))
        return [file, *(each for each in spacings if each.is_file())]
    return [file]


def _digest_of(file: Path) -> str:
    """Return the digest of the bytes of a file and of those that belong to it; empty if one cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in _parts_of(file):
            with open(part, "rb") as opened:
                while block := opened.read(BLOCK_BYTES):
                    digest.update(block)
            digest.update(part.stat().st_size.to_bytes(8, "little"))  # where a part ends
    except (OSError, CaseError):
        return ""
    return digest.hexdigest()


def _read_list(path: Path) -> dict[str, tuple[Status, str]]:
    """Return the known digests; none if the list is damaged, because it only saves time."""
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            return {}
        return {
            file: ((int(n), int(b), int(m), int(c)), str(d)) for file, ((n, b, m, c), d) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
