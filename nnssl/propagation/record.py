"""What a folder of drafts was made from, and the confidence of each draft, so that a run can be resumed."""

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from nnssl import schema
from nnssl.errors import UserError
from nnssl.files import some, write_csv
from nnssl.schema import STRICT

SCHEMA_VERSION = 1
RECORD, TABLE = "propagate.json", "confidence.csv"
COLUMNS = ("case", "confidence", "missing")


@dataclass(frozen=True)
class PropagationRecord:
    """Everything that decides the drafts of a folder, apart from the images."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    dataset_name: str
    weights: str
    """Path of the checkpoint."""
    weights_digest: str
    references: dict[str, str]
    """Digest of the label map of each annotated case."""
    label_values: tuple[int, ...]
    """Label values that are carried over, the background first."""
    features: str
    """Maps of the decoder, ``single`` or ``pyramid``; ``encoder`` for those of the encoder."""
    prototypes: int
    position_weight: float
    smoothing_mm: float
    seed: int


@dataclass(frozen=True)
class Draft:
    """A propagated segmentation.

    Attributes:
        case: Name of the case.
        confidence: Confidence, 0 to 1.
        missing: Names of the labels that the draft lacks.
    """

    case: str
    confidence: float
    missing: tuple[str, ...]


def open_record(folder: Path, wanted: PropagationRecord, ending: str, restart: bool) -> dict[str, Draft]:
    """Return the drafts that a folder holds already, and write the record if the folder has none.

    Args:
        folder: Folder of the drafts.
        wanted: What this run would write.
        ending: File ending of the segmentations.
        restart: Whether to delete earlier drafts, except those that are annotated cases now.

    Raises:
        UserError: If the folder holds drafts of other settings, or segmentations that are no drafts.
    """
    path = folder / RECORD
    if not path.exists():
        present = sorted(each.name for each in folder.glob(f"*{ending}") if not each.name.startswith("."))
        if present:
            raise UserError(
                f"{folder}: holds segmentations that nnssl_propagate did not write ({some(present)}); choose another folder"
            )
    else:
        found = schema.read(PropagationRecord, path, "record of drafts", "choose another folder")
        changed = _changes(found, wanted)
        if changed and not restart:
            raise UserError(f"{folder}: holds drafts with other {changed}; choose another folder, or set restart")
        if restart:
            # The user may have corrected drafts in place that are annotated cases now.
            for name in {*read_drafts(folder), *found.references} - set(wanted.references):
                (folder / f"{name}{ending}").unlink(missing_ok=True)
            (folder / TABLE).unlink(missing_ok=True)
    schema.write(path, wanted)
    return {name: draft for name, draft in read_drafts(folder).items() if (folder / f"{name}{ending}").exists()}


def read_drafts(folder: Path) -> dict[str, Draft]:
    """Return the drafts in the table of a folder; none if there is no table.

    Raises:
        UserError: If the file is not such a table.
    """
    path = folder / TABLE
    if not path.exists():
        return {}
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        if tuple(rows[0]) != COLUMNS:
            raise ValueError(f"columns {', '.join(rows[0])}")
        return {
            case: Draft(case, float(confidence), tuple(missing.split("; ") if missing else ()))
            for case, confidence, missing in rows[1:]
        }
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is not a table of confidences ({error}); delete it and run again") from error


def write_drafts(folder: Path, drafts: Mapping[str, Draft]) -> None:
    """Write the table of a folder, the least certain draft first."""
    ordered = sorted(drafts.values(), key=lambda draft: (draft.confidence, draft.case))
    write_csv(
        folder / TABLE, COLUMNS, [(each.case, f"{each.confidence:.4f}", "; ".join(each.missing)) for each in ordered]
    )


def _changes(found: PropagationRecord, wanted: PropagationRecord) -> str:
    """Return the names and values that differ between two records, within a sentence; empty if none does."""
    before, now = asdict(found), asdict(wanted)
    names = [field.name for field in fields(PropagationRecord) if field.name != "weights"]  # the digest decides
    differing = [name for name in names if before[name] != now[name]]
    return ", ".join(f"{name} ({before[name]} there, {now[name]} now)" for name in differing)
