"""Grouping of cases by patient, from a table or from the names of the cases."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from nnssl.draws import draw_seed
from nnssl.errors import UserError
from nnssl.log import logger

SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
"""BIDS entity that names a subject."""
OCCASION = re.compile(
    r"[_-](?:frame|phase|time|timepoint|tp|t|visit|session|ses|scan|series|day|week|month|year|run|slice|echo)[_-]?\d+$"
    r"|[_-](?:ed|es|left|right|l|r|lh|rh|baseline|followup|pre|post)$",
    re.IGNORECASE,
)
"""Endings of case names that distinguish scans of one patient."""

FEWEST_PATIENTS = 40
"""Number of patients from which on some are set aside; fewer are too valuable for training."""
SHARE_ASIDE = 0.05
MOST_ASIDE = 16
"""Largest number of patients that are set aside; more would not make the measurement more precise."""


def patient_in_name(case: str) -> str:
    """Return the patient named in a case's name, or the whole name if it does not distinguish scans of a patient.

    ``patient001_frame12`` belongs to ``patient001``, ``sub-07_ses-2_T1w`` to ``sub-07``, and ``hippocampus_017`` to
    ``hippocampus_017``.
    """
    subject = SUBJECT.match(case)
    if subject:
        return subject.group()
    patient = case
    while (shorter := OCCASION.sub("", patient)) not in ("", patient):
        patient = shorter
    return patient


def set_aside(cases: Sequence[str]) -> tuple[str, ...]:
    """Return the cases of a data set that pretraining leaves out, to measure features on them; none of a small data set.

    The choice depends only on the names of the cases, so that all methods leave out the same ones.

    Args:
        cases: Names of all cases.
    """
    patients = sorted({patient_in_name(case) for case in cases}, key=lambda each: draw_seed("set aside", each))
    if len(patients) < FEWEST_PATIENTS:
        return ()
    chosen = set(patients[: min(MOST_ASIDE, round(SHARE_ASIDE * len(patients)))])
    return tuple(sorted(case for case in cases if patient_in_name(case) in chosen))


def read_patients(path: Path) -> dict[str, str]:
    """Read a table of cases and their patients: a CSV file with the columns ``case`` and ``patient``.

    Raises:
        UserError: If the file cannot be read, lacks a column, or assigns two patients to a case.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table of patients ({error}); provide a CSV file") from error
    patients: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case, patient = row.get("case"), row.get("patient")
        if not case or not patient:
            raise UserError(f"{path}, line {number}: the columns 'case' and 'patient' must not be empty")
        if patients.setdefault(case.strip(), patient.strip()) != patient.strip():
            raise UserError(f"{path}, line {number}: case {case} already has another patient; keep one")
    if not patients:
        raise UserError(f"{path} lists no cases; write the columns 'case' and 'patient' and one line per case")
    return patients


def find_patients(cases: Sequence[str], path: Path | None) -> dict[str, str]:
    """Return the patient of every case.

    Args:
        cases: Names of the cases.
        path: Table of cases and patients, which must list every case; None to infer patients from the names.

    Raises:
        UserError: If the table cannot be read or does not list a case.
    """
    if path is not None:
        table = read_patients(path)
        missing = [case for case in cases if case not in table]
        if missing:
            raise UserError(
                f"{path} does not list {missing[0]} ({len(missing)} cases are missing); add a line for each"
            )
        return {case: table[case] for case in cases}
    patients = {case: patient_in_name(case) for case in cases}
    number = len(set(patients.values()))
    if number < len(cases):
        first = next(case for case in cases if patients[case] != case)
        logger.info(
            f"{len(cases)} cases belong to {number} patients according to their names ({first} to {patients[first]}); "
            "if this is wrong, list the patient of every case in a table and pass it as patients"
        )
    return patients
