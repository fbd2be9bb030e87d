"""Whether a stage has seen held-out cases, by the voxels of their images and by patient.

What pretraining saw is known from the fingerprint of its data set, which holds a digest of every image, and from the list
of cases in each checkpoint. A test image counts as seen if its voxels equal those of a pretraining image, whatever the
files are called, or if the name of its patient is also that of a pretraining case.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.data.case_error import CaseError
from nnssl.data.patients import patient_in_name, read_patients
from nnssl.data.raw import RawDataset, read_volume
from nnssl.errors import UserError
from nnssl.files import some
from nnssl.log import logger
from nnssl.paths import Folders
from nnssl.schema import read
from nnssl.weights.description import ELSEWHERE
from nnssl.weights.opened_checkpoint import open_checkpoint
from planners.case_record import digest_volume
from planners.fingerprint import FILE_NAME, Fingerprint


@dataclass(frozen=True)
class Seen:
    """Cases that pretraining has seen.

    Attributes:
        dataset_name: of the pretraining data.
        digests: case by the digest of its voxels.
        patients: case by patient.
    """

    dataset_name: str
    digests: dict[str, str]
    patients: dict[str, str]


def seen_in_pretraining(dataset_name: str, folders: Folders, patients: Path | None, cases: Iterable[str] = ()) -> Seen:
    """Return what a pretraining on a data set has seen.

    Args:
        dataset_name: ``DatasetXXX_Name``.
        folders: nnU-Net's folders.
        patients: table of cases and patients; None to take the patients from the names.
        cases: further cases that a checkpoint names; the data set may have changed since.

    Raises:
        UserError: the data set has no fingerprint, so that nothing can be checked.
    """
    path = folders.preprocessed / dataset_name / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{path}: there is no fingerprint of the pretraining data, so whether held-out cases were seen cannot be "
            f"checked; run nnssl_plan_and_preprocess -d {dataset_name} --no-preprocessing"
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
    """Return what the weights of a checkpoint have seen, those that they started from included.

    Labelled cases of an online probe count where they have chosen the weights. What weights that were made elsewhere have
    seen is not known; a message says so.

    Raises:
        UserError: a checkpoint or a fingerprint is not there.
    """
    found = []
    source: Path | None = path
    while source is not None:
        checkpoint = open_checkpoint(source)
        provenance = None if checkpoint.made_elsewhere else checkpoint.own_provenance
        if provenance is None or provenance.dataset_name == ELSEWHERE:
            logger.info(f"{source}: was made elsewhere, so whether it has seen held-out cases cannot be checked")
            break
        state = checkpoint.content["nnssl"]["state"]
        probe = state["probe"] if state else None  # exported weights have no state
        if probe is not None and probe["chose_weights"]:
            table = read_patients(patients) if patients else {}
            cases = (*probe["train"], *probe["test"])
            found.append(Seen(probe["dataset_name"], {}, {table.get(c, patient_in_name(c)): c for c in cases}))
        found.append(seen_in_pretraining(provenance.dataset_name, folders, patients, provenance.cases or ()))
        source = Path(provenance.init) if provenance.init else None
    return found


def digest_cases(dataset: RawDataset, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of the voxels of some cases.

    Raises:
        UserError: an image cannot be read.
    """
    wanted = set(names)
    digests = {}
    for case in dataset.cases:
        if case.name in wanted:
            try:
                digests[case.name] = digest_volume(read_volume(case, dataset.reader)[0])
            except CaseError as error:
                raise UserError(f"{error.file}: {error.reason}; mend it or take the case out") from error
    return digests


def find_leaks(digests: Mapping[str, str], patients: Mapping[str, str], seen: Sequence[Seen]) -> dict[str, str]:
    """Return the cases that pretraining has seen, each with how that is known.

    Args:
        digests: of the voxels, by case.
        patients: by case.
        seen: what the pretrainings have seen.
    """
    leaks = {}
    for case, digest in digests.items():
        for each in seen:
            if digest in each.digests:
                leaks[case] = f"has the voxels of {each.digests[digest]} of {each.dataset_name}"
            elif patients[case] in each.patients:
                leaks[case] = f"is of the patient of {each.patients[patients[case]]} of {each.dataset_name}"
    return leaks


def check_unseen(leaks: Mapping[str, str], what: str) -> None:
    """Check that no held-out case was seen.

    Raises:
        UserError: one was; names it.
    """
    if leaks:
        case = sorted(leaks)[0]
        raise UserError(
            f"{what}: {some(sorted(leaks))} {'were' if len(leaks) > 1 else 'was'} seen in pretraining ({case} {leaks[case]}); "
            "hold out others, or plan the pretraining with --exclude FILE and pretrain again; if these are different "
            "people with the same names, --patients FILE says so"
        )
