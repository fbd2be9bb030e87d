"""Labels of whole cases: a table with the columns ``case`` and ``label``, and optionally ``patient``."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.data.patients import patient_in_name
from nnssl.errors import ArgumentError, UserError
from nnssl.files import some
from nnssl.log import logger

COLUMNS = ("case", "label")
PATIENT = "patient"


@dataclass(frozen=True)
class CaseLabels:
    """Cases with their labels and patients, in the order of the table.

    Attributes:
        path: The table.
        cases: Names of the cases.
        labels: Label of each case.
        patients: Patient of each case.
    """

    path: Path
    cases: tuple[str, ...]
    labels: tuple[str, ...]
    patients: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted labels."""
        return tuple(sorted(set(self.labels)))

    def counts(self, label: str) -> tuple[int, int]:
        """Return the number of cases with a label, and the number of patients that have such a case."""
        rows = [row for row, own in enumerate(self.labels) if own == label]
        return len(rows), len({self.patients[row] for row in rows})

    def check_folds(self, folds: int) -> None:
        """Check that every fold can contain a patient of every class.

        Raises:
            ArgumentError: If a class has fewer patients than there are folds.
            UserError: If there are fewer than two classes.
        """
        if len(self.classes) < 2:
            raise UserError(
                f"{self.path}: all cases have the label {self.classes[0]!r}; list cases of at least two classes"
            )
        label = min(self.classes, key=lambda each: self.counts(each)[1])
        patients = self.counts(label)[1]
        if patients < folds:
            raise ArgumentError(
                f"folds must be at most {patients}, the number of patients with the label {label!r} in {self.path}, got "
                f"{folds}; at least 3 patients of every class are needed",
                "folds",
            )

    def check_cases(self, known: Sequence[str], folder: Path) -> None:
        """Check that every case of the table is preprocessed.

        Args:
            known: Names of the preprocessed cases.
            folder: Folder of the preprocessed cases, for the message.

        Raises:
            UserError: If a case is not among them.
        """
        missing = sorted(set(self.cases) - set(known))
        if missing:
            raise UserError(
                f"{self.path}: {folder} has no preprocessed case {some(missing)}; it has {some(known)}. Correct the names, or "
                "preprocess these cases"
            )


def read_case_labels(path: Path) -> CaseLabels:
    """Read a table of labels: a CSV file with the columns ``case`` and ``label``, and optionally ``patient``.

    Without the column ``patient``, patients are taken from the names of the cases (``nnssl.data.patients``).

    Raises:
        UserError: If the file cannot be read, lacks a column or a value, or lists a case twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of labels ({error}); give a CSV file") from error
    if not set(COLUMNS) <= set(header):
        raise UserError(
            f"{path}: must have the columns 'case' and 'label', separated by a comma, got {', '.join(header) or 'none'}"
        )
    wanted = (*COLUMNS, PATIENT) if PATIENT in header else COLUMNS
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=2):
        values = [(row[column] or "").strip() for column in wanted]
        if not all(values):
            raise UserError(f"{path}, line {number}: the column '{wanted[values.index('')]}' is empty; fill it in")
        if values[0] in found:
            raise UserError(f"{path}, line {number}: the case {values[0]} is already listed; keep one line")
        found[values[0]] = values[1:]
    if not found:
        raise UserError(f"{path}: lists no cases; write one line per case below the header")
    if PATIENT in header:
        patients = tuple(values[1] for values in found.values())
    else:
        patients = tuple(map(patient_in_name, found))
        _log_patients(tuple(found), patients)
    return CaseLabels(path, tuple(found), tuple(values[0] for values in found.values()), patients)


def _log_patients(cases: tuple[str, ...], patients: tuple[str, ...]) -> None:
    """Log how many patients the names of the cases distinguish, if there are fewer patients than cases."""
    number = len(set(patients))
    if number < len(cases):
        case, patient = next(pair for pair in zip(cases, patients, strict=True) if pair[0] != pair[1])
        logger.info(
            f"{len(cases)} cases belong to {number} patients according to their names ({case} to {patient}); if this is "
            "wrong, add a column 'patient' to the table"
        )
