"""What an import took and what it refused: the content of ``import.json``, and as a table for a person."""

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
"""Files that the printed table names for each reason."""


@dataclass(frozen=True)
class TakenCase:
    """A case that was imported."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    images: tuple[str, ...]
    """Absolute paths in channel order; of a DICOM series, the series file below the data set's folder."""
    shape: tuple[int, ...]
    """(z, y, x) in voxels."""
    spacing_mm: tuple[float, ...]
    """(z, y, x)"""


@dataclass(frozen=True)
class ImportRecord:
    """What an import took and what it refused: the content of ``import.json``."""

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
    """Sorted by case."""
    refused: tuple[Refusal, ...]
    passed_over: dict[str, int]
    """Files that are no images, by their ending, and folders that were not entered."""


def format_import(record: ImportRecord, shown: int = 10) -> list[str]:
    """Return the lines of a table of what was taken, refused and passed over.

    Args:
        record: of the import.
        shown: cases and reasons to list at most; all are in ``import.json``.
    """
    endings = Counter(volume_ending(image) or "DICOM series" for case in record.taken for image in case.images)
    files = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
    channels = ", ".join(record.channel_names)
    lines = [f"taken: {len(record.taken)} cases of {len(record.channel_names)} channel(s) ({channels}), from {files}"]
    width = max(len(case.case) for case in record.taken[:shown])
    for case in record.taken[:shown]:
        shape = " x ".join(map(str, case.shape))
        spacing = in_mm(case.spacing_mm)
        lines.append(f"  {case.case:{width}}  {shape} voxels of {spacing} mm (z, y, x)")
    if len(record.taken) > shown:
        lines.append(f"  and {len(record.taken) - shown} more")
    lines.append(f"refused: {len(record.refused)}")
    lines += _format_refused(record.refused, shown)
    if record.passed_over:
        lines.append("passed over: " + ", ".join(f"{count} {what}" for what, count in record.passed_over.items()))
    return lines


def _format_refused(refused: Sequence[Refusal], shown: int) -> list[str]:
    """Return the reasons, the most frequent first, each with the first files that it holds for."""
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
        lines.append(f"  and for {len(reasons) - shown} more reasons, all in {RECORD_FILE}")
    return lines
