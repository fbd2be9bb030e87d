"""Which cases are of the same patient: said by a file, or by the names of the cases."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from nnssl.errors import UserError
from nnssl.log import logger

SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
"""BIDS: the entity that names a subject."""
OCCASION = re.compile(
    r"[_-](?:frame|phase|time|timepoint|tp|t|visit|session|ses|scan|series|day|week|month|year|run|slice|echo)[_-]?\d+$"
    r"|[_-](?:ed|es|left|right|l|r|lh|rh|baseline|followup|pre|post)$",
    re.IGNORECASE,
)
"""Endings of a case's name that tell scans of one patient apart."""


def patient_in_name(case: str) -> str:
    """Return the patient that a case's name speaks of; the whole name where it tells no occasions apart.

    ``patient001_frame12`` is of ``patient001``, ``sub-07_ses-2_T1w`` of ``sub-07``, ``hippocampus_017`` of itself.
    """
    subject = SUBJECT.match(case)
    if subject:
        return subject.group()
    patient = case
    while (shorter := OCCASION.sub("", patient)) not in ("", patient):
        patient = shorter
    return patient


def read_patients(path: Path) -> dict[str, str]:
    """Read a table of cases and their patients: a CSV file with the columns ``case`` and ``patient``.

    Raises:
        UserError: the file cannot be read, lacks a column, or gives a case two patients.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of patients ({error}); give a CSV file") from error
    patients: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case, patient = row.get("case"), row.get("patient")
        if not case or not patient:
            raise UserError(f"{path}, line {number}: needs a value in the columns 'case' and 'patient'")
        if patients.setdefault(case.strip(), patient.strip()) != patient.strip():
            raise UserError(f"{path}, line {number}: gives case {case} a second patient; name one")
    if not patients:
        raise UserError(f"{path}: names no case; write the columns 'case' and 'patient' and one line per case")
    return patients


def find_patients(cases: Sequence[str], path: Path | None) -> dict[str, str]:
    """Return the patient of every case.

    Args:
        cases: names.
        path: table that says it, which must name every case; None to take it from the names.

    Raises:
        UserError: the table cannot be read or leaves a case out.
    """
    if path is not None:
        table = read_patients(path)
        missing = [case for case in cases if case not in table]
        if missing:
            raise UserError(
                f"{path}: does not name {missing[0]} ({len(missing)} cases are missing); add a line for each"
            )
        return {case: table[case] for case in cases}
    patients = {case: patient_in_name(case) for case in cases}
    number = len(set(patients.values()))
    if number < len(cases):
        first = next(case for case in cases if patients[case] != case)
        logger.info(
            f"{len(cases)} cases of {number} patients, by their names ({first} is of {patients[first]}); "
            "--patients FILE says otherwise"
        )
    return patients
