"""The record of an import: the content of ``import.json``, and its form as printed lines."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nnssl.imports.sources import Choices, Refusal, volume_ending
from nnssl.schema import STRICT
from nnssl.sizes import in_mm

SCHEMA_VERSION = 1
RECORD_FILE = "import.json"
FILES_PER_REASON = 3
"""Number of files printed for each reason."""


@dataclass(frozen=True)
class TakenCase:
    """An imported case."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    images: tuple[str, ...]
    """Absolute paths in channel order, or for a DICOM series the series file relative to the data set's folder."""
    shape: tuple[int, ...]
    """Shape (z, y, x) in voxels."""
    spacing_mm: tuple[float, ...]
    """Spacing (z, y, x) in mm."""


@dataclass(frozen=True)
class ImportRecord:
    """Content of ``import.json``: the imported cases and the rejected files."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    nnssl_version: str
    dataset_name: str
    source: str
    kind: str
    choices: Choices
    channel_names: tuple[str, ...]
    taken: tuple[TakenCase, ...]
    """Imported cases, sorted by name."""
    refused: tuple[Refusal, ...]
    """Rejected files, sorted by path."""
    passed_over: dict[str, int]
    """Numbers of skipped files, which are not images, by file ending, and of skipped folders."""


def format_import(record: ImportRecord, shown: int = 10) -> list[str]:
    """Return printable lines with the imported cases, the rejected files and the numbers of skipped files.

    Args:
        record: Record of the import.
        shown: Largest number of cases and of reasons to list; ``import.json`` contains all.
    """
    endings = Counter(volume_ending(image) or "DICOM series" for case in record.taken for image in case.images)
    files = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
    channels = ", ".join(record.channel_names)
    lines = [
        f"imported: {len(record.taken)} cases of {len(record.channel_names)} channel(s) ({channels}), from {files}"
    ]
    width = max(len(case.case) for case in record.taken[:shown])
    for case in record.taken[:shown]:
        shape = " x ".join(map(str, case.shape))
        spacing = in_mm(case.spacing_mm)
        lines.append(f"  {case.case:{width}}  {shape} voxels of {spacing} mm (z, y, x)")
    if len(record.taken) > shown:
        lines.append(f"  and {len(record.taken) - shown} more")
    lines.append(f"rejected: {len(record.refused)}")
    lines += _format_refused(record.refused, shown)
    if record.passed_over:
        lines.append("skipped: " + ", ".join(f"{count} {what}" for what, count in record.passed_over.items()))
    return lines


def _format_refused(refused: Sequence[Refusal], shown: int) -> list[str]:
    """Return the reasons, the most frequent first, each followed by the first files it applies to."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for refusal in refused:
        by_reason[refusal.reason].append(refusal.file)
    reasons = sorted(by_reason, key=lambda reason: -len(by_reason[reason]))
    lines = []
    for reason in reasons[:shown]:
        files = by_reason[reason]
        lines += [f"  {len(files)} x {reason}", *(f"      {file}" for file in files[:FILES_PER_REASON])]
        if len(files) > FILES_PER_REASON:
            lines.append(f"      and {len(files) - FILES_PER_REASON} more")
    if len(reasons) > shown:
        lines.append(f"  and for {len(reasons) - shown} more reasons, all listed in {RECORD_FILE}")
    return lines
