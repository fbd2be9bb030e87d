"""Preprocessed cases whose images or masks were replaced afterwards: noticed and preprocessed again."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from nnssl.data.case_store import CaseProperties, SourceFile, complete_cases, read_properties
from nnssl.data.contents import digest_files
from nnssl.data.image_files import find_source_state
from nnssl.data.preprocess import preprocess_dataset
from nnssl.data.raw import read_dataset
from nnssl.data.recipe import content_of
from nnssl.errors import UserError
from nnssl.files import some
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.paths import Folders
from nnssl.plan import Plan


def preprocess_changed_cases(plan: Plan, configurations: Iterable[str], folders: Folders, processes: int) -> list[str]:
    """Preprocess those cases of a plan again whose images or masks are no longer those they were made from.

    The plan stays as it is. Cases whose files no longer exist, for example because only preprocessed data were copied to this
    machine, are kept.

    Args:
        plan: Plan of the data set.
        configurations: Names of the configurations whose cases are needed.
        folders: nnU-Net's folders.
        processes: Number of processes.

    Returns:
        The names of the cases that changed, sorted.

    Raises:
        UserError: As ``preprocess_dataset``.
    """
    wanted = list(configurations)
    if not changed_by_configuration(plan, wanted, folders, processes):
        return []  # without writing anything, because preprocessed data may lie in a folder to read only
    with only_process(folders.preprocessed / plan.dataset_name, "preprocessing replaced images"):
        return _preprocess_changed(plan, wanted, folders, processes)


def _preprocess_changed(plan: Plan, configurations: Sequence[str], folders: Folders, processes: int) -> list[str]:
    changed: set[str] = set()
    for configuration, outdated in changed_by_configuration(plan, configurations, folders, processes).items():
        changed |= set(outdated)
        logger.info(
            f"{plan.dataset_name}: images or masks of {len(outdated)} cases have changed since they were preprocessed "
            f"({some(outdated)}); preprocessing them again with the existing plan (run nnssl_plan_and_preprocess to plan again)"
        )
        folder = folders.preprocessed / plan.dataset_name / plan.configuration(configuration).case_folder
        masks = {Path(each.exclude_mask.path).parent for each in _read_all(folder).values() if each.exclude_mask}
        dataset = read_dataset(plan.dataset_name, folders)
        preprocess_dataset(
            dataset,
            plan,
            complete_cases(folder),
            folders,
            [configuration],
            processes,
            None,
            exclude_mask=next(iter(sorted(masks)), None),
        )
    return sorted(changed)


def changed_by_configuration(
    plan: Plan, configurations: Iterable[str], folders: Folders, threads: int = 1
) -> dict[str, list[str]]:
    """Return the cases whose images or masks have changed, for one configuration of each folder with such cases.

    Args:
        plan: Plan of the data set.
        configurations: Names of the configurations whose cases are needed.
        folders: nnU-Net's folders.
        threads: Number of files that are read at the same time.
    """
    by_folder = {plan.configuration(name).case_folder: name for name in configurations}
    found = {
        configuration: find_changed(
            _read_all(folders.preprocessed / plan.dataset_name / case_folder), plan.dataset_name, folders, threads
        )
        for case_folder, configuration in by_folder.items()
    }
    return {configuration: outdated for configuration, outdated in found.items() if outdated}


def find_changed(stored: dict[str, CaseProperties], dataset_name: str, folders: Folders, threads: int = 1) -> list[str]:
    """Return the names of preprocessed cases with a file that is not as it was when the case was made, sorted.

    Args:
        stored: Properties of preprocessed cases, by name.
        dataset_name: Name of the data set.
        folders: nnU-Net's folders.
        threads: Number of files that are read at the same time.
    """
    files = {name: _files_of(properties) for name, properties in stored.items()}
    digests = digest_files((Path(file.path) for own in files.values() for file in own), dataset_name, folders, threads)
    return sorted(name for name, own in files.items() if any(_has_changed(file, digests) for file in own))


def contents_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return digests of the images and masks that preprocessed cases were made from, by name.

    Cases of earlier versions, of which only times are known, are left out, and so are cases that are not there.
    """
    present = set(complete_cases(folder))
    found = {name: content_of(read_properties(folder, name)) for name in names if name in present}
    return {name: content for name, content in found.items() if content is not None}


def _read_all(folder: Path) -> dict[str, CaseProperties]:
    found = {}
    for name in complete_cases(folder):
        try:
            found[name] = read_properties(folder, name)
        except UserError:
            continue  # written by another version, which the reader of the case reports
    return found


def _files_of(properties: CaseProperties) -> list[SourceFile]:
    return [*properties.sources, *([] if properties.exclude_mask is None else [properties.exclude_mask])]


def _has_changed(file: SourceFile, digests: dict[Path, str]) -> bool:
    """Return whether a file that exists is not as it was."""
    now = digests.get(Path(file.path))
    if now is None:
        return False
    if not file.digest:  # earlier versions
        return find_source_state(Path(file.path)) != (file.size_bytes, file.mtime_ns)
    return now != file.digest
