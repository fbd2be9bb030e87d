"""Images of other data sets that must not be used without labels, because they are held out or of held-out patients."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from nnssl.data.case_error import CaseError
from nnssl.data.patients import patient_in_name
from nnssl.data.raw import RawCase, RawDataset, read_header, read_volume
from nnssl.errors import ArgumentError, UserError
from nnssl.files import some
from nnssl.log import logger
from planners.case_record import digest_volume


def digest_cases(dataset: RawDataset, names: Iterable[str]) -> dict[str, str]:
    """Return the digests of the voxels of some cases.

    Raises:
        UserError: If an image cannot be read.
    """
    wanted = set(names)
    digests = {}
    for case in dataset.cases:
        if case.name in wanted:
            try:
                digests[case.name] = digest_volume(read_volume(case, dataset.reader)[0])
            except CaseError as error:
                raise UserError(f"{error.file}: {error.reason}; fix the file or remove the case") from error
    return digests


def without_held_out(source: RawDataset, labelled: RawDataset, test: Sequence[str]) -> RawDataset:
    """Return an unlabelled data set without the images that a run holds out; the excluded cases are logged.

    A case is excluded if it has the file or the voxels of a held-out case, or if its patient has the name of a held-out
    patient.

    Args:
        source: Data set of unlabelled images.
        labelled: The labelled data set.
        test: Names of its held-out cases.

    Raises:
        ArgumentError: If no case is left.
        UserError: If an image cannot be read.
    """
    excluded = find_held_out(source, labelled, test)
    for reason in sorted(set(excluded.values())):
        names = sorted(name for name, why in excluded.items() if why == reason)
        logger.info(
            f"{source.name}: {len(names)} of {len(source.cases)} images {reason} and are not used ({some(names)})"
        )
    cases = tuple(case for case in source.cases if case.name not in excluded)
    if not cases:
        raise ArgumentError(
            f"unlabelled must be a data set with images that are not held out, got {source.name}, all of whose "
            f"{len(source.cases)} images are held out or of held-out patients; choose another data set or hold out fewer cases "
            "with test_cases",
            "unlabelled",
            "test_cases",
        )
    return replace(source, cases=cases)


def find_held_out(source: RawDataset, labelled: RawDataset, test: Sequence[str]) -> dict[str, str]:
    """Return the cases of a data set that are held out, each with the reason; see ``without_held_out``."""
    held_out = [case for case in labelled.cases if case.name in set(test)]
    files = {image.resolve() for case in held_out for image in case.images}
    patients = {patient_in_name(case.name) for case in held_out}
    found = {}
    for case in source.cases:
        if any(image.resolve() in files for image in case.images):
            found[case.name] = "are files of held-out cases"
        elif patient_in_name(case.name) in patients:
            found[case.name] = "have the name of a held-out patient"
    rest = [case for case in source.cases if case.name not in found]
    # Only images of equal shape can be equal, so that few are read.
    shapes = {_shape(case, labelled) for case in held_out}
    alike = [case.name for case in rest if _shape(case, source) in shapes]
    digests = set(digest_cases(labelled, test).values()) if alike else set()
    for name, digest in digest_cases(source, alike).items():
        if digest in digests:
            found[name] = "have the voxels of held-out cases"
    return found


def _shape(case: RawCase, dataset: RawDataset) -> tuple[int, ...]:
    try:
        return read_header(case, dataset.reader)[0]
    except CaseError as error:
        raise UserError(f"{error.file}: {error.reason}; fix the file or remove the case") from error
