"""Checks whether pretraining has seen held-out cases, by the voxels of their images and by patient.

The images that pretraining saw are known from the fingerprint of its data set, which contains a digest of every image, and
from the list of cases in each checkpoint. A test image counts as seen if its voxels equal those of a pretraining image,
regardless of file names, or if its patient has the same name as the patient of a pretraining case.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.checkpoint import Provenance
from nnssl.data.patients import patient_in_name, read_patients
from nnssl.data.raw import read_dataset
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json, some
from nnssl.log import logger, silence
from nnssl.paths import Folders
from nnssl.schema import read
from nnssl.weights.description import ELSEWHERE
from nnssl.weights.nnunet_training import SUPERVISED
from nnssl.weights.opened_checkpoint import open_checkpoint
from planners.fingerprint import FILE_NAME, Fingerprint

SPLITS = "splits_final.json"
"""nnU-Net's file with the cases of its folds."""


@dataclass(frozen=True)
class Seen:
    """Cases that pretraining has seen.

    Attributes:
        dataset_name: Name of the pretraining data set.
        digests: Names of cases by the digest of their voxels.
        patients: Names of cases by patient.
    """

    dataset_name: str
    digests: dict[str, str]
    patients: dict[str, str]


def seen_in_pretraining(dataset_name: str, folders: Folders, patients: Path | None, cases: Iterable[str] = ()) -> Seen:
    """Return the cases that a pretraining on a data set has seen.

    Args:
        dataset_name: Name of the data set, ``DatasetXXX_Name``.
        folders: nnU-Net's folders.
        patients: Table of cases and patients; None to derive the patients from the names.
        cases: Further cases that a checkpoint lists, because the data set may have changed since.

    Raises:
        UserError: If the data set has no fingerprint, so that nothing can be checked.
    """
    path = folders.preprocessed / dataset_name / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{path}: fingerprint of the pretraining data not found, so held-out cases cannot be checked; run "
            f"nnssl_plan_and_preprocess -d {dataset_name} --no-preprocessing"
        )
    fingerprint = read(Fingerprint, path, "fingerprint")
    table = read_patients(patients) if patients else {}
    names = {record.name for record in fingerprint.cases} | {each.case for each in fingerprint.duplicates} | set(cases)
    return Seen(
        dataset_name,
        {record.digest: record.name for record in fingerprint.cases},
        {table.get(name, patient_in_name(name)): name for name in sorted(names, reverse=True)},
    )


def seen_by_checkpoint(path: Path, folders: Folders, patients: Path | None) -> list[Seen]:
    """Return the cases that the weights of a checkpoint, and the weights that they started from, have seen.

    Labelled cases of an online probe count if the weights were chosen by their Dice, which an export records too. For
    weights that were made elsewhere the cases are unknown, and a message is logged. Weights of nnU-Net's training have seen the
    training cases of their fold, if nnU-Net's splits are here, or else all cases of their data set.

    Raises:
        UserError: If a checkpoint or a fingerprint does not exist.
    """
    found = []
    source: Path | None = path
    while source is not None:
        checkpoint = open_checkpoint(source)
        provenance = None if checkpoint.made_elsewhere else checkpoint.own_provenance
        if provenance is None or provenance.dataset_name == ELSEWHERE:
            logger.info(f"{source}: made elsewhere, so it cannot be checked whether it has seen held-out cases")
            break
        if provenance.method == SUPERVISED:
            found += _seen_by_nnunet(source, provenance, folders, patients)
            break
        probe = checkpoint.choosing_probe
        if probe is not None:
            table = read_patients(patients) if patients else {}
            cases = (*probe["train"], *probe["test"])
            found.append(Seen(probe["dataset_name"], {}, {table.get(c, patient_in_name(c)): c for c in cases}))
        found.append(seen_in_pretraining(provenance.dataset_name, folders, patients, provenance.cases or ()))
        source = Path(provenance.init) if provenance.init else None
    return found


def _seen_by_nnunet(path: Path, provenance: Provenance, folders: Folders, patients: Path | None) -> list[Seen]:
    """Return the cases on which nnU-Net trained weights with labels; none, with a message, if its data set is not here."""
    name, fold = provenance.dataset_name, provenance.settings["fold"]
    if not (folders.raw / name).is_dir():
        logger.info(
            f"{path}: {name} is not in {folders.raw}, so it cannot be checked whether it has seen held-out cases"
        )
        return []
    with silence():
        cases = [case.name for case in read_dataset(name, folders).cases]
    splits = folders.preprocessed / name / SPLITS
    if isinstance(fold, int) and splits.exists():
        listed = read_json(splits, "splits of nnU-Net")
        cases = listed[fold]["train"] if fold < len(listed) else cases
    table = read_patients(patients) if patients else {}
    return [Seen(name, {}, {table.get(case, patient_in_name(case)): case for case in sorted(cases, reverse=True)})]


def find_leaks(digests: Mapping[str, str], patients: Mapping[str, str], seen: Sequence[Seen]) -> dict[str, str]:
    """Return the cases that pretraining has seen, each with the evidence.

    Args:
        digests: Digests of the voxels, by case.
        patients: Patients, by case.
        seen: Cases that the pretrainings have seen.
    """
    leaks = {}
    for case, digest in digests.items():
        for each in seen:
            if digest in each.digests:
                leaks[case] = f"has the voxels of {each.digests[digest]} of {each.dataset_name}"
            elif patients[case] in each.patients:
                leaks[case] = f"is of the same patient as {each.patients[patients[case]]} of {each.dataset_name}"
    return leaks


def check_unseen(leaks: Mapping[str, str], what: str) -> None:
    """Check that no held-out case was seen.

    Raises:
        ArgumentError: If one was seen; the message names it.
    """
    if leaks:
        case = sorted(leaks)[0]
        raise ArgumentError(
            f"{what}: {some(sorted(leaks))} {'were' if len(leaks) > 1 else 'was'} seen in pretraining ({case} {leaks[case]}); "
            "hold out other cases, or run nnssl_plan_and_preprocess with --exclude FILE and pretrain again; if different "
            "people have the same name, list the cases of each person in a table and pass it as patients",
            "patients",
        )
