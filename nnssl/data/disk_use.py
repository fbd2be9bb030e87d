"""What of a data set lies where, how large it is, and what of it can be made again.

Two kinds of folders can be made again: cases that ``nnssl_plan_and_preprocess`` made, and cases that fine-tuning had nnU-Net
preprocess. Weights, results, plans, fingerprints, and whatever others made are never removed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nnssl.data.case_store import complete_cases, read_properties, remove_case
from nnssl.data.contents import RECORDS
from nnssl.data.raw import read_dataset
from nnssl.errors import UserError
from nnssl.files import read_json, some
from nnssl.locks import living_owner, only_process
from nnssl.log import silence
from nnssl.paths import PROBES_FOLDER, Folders
from nnssl.plan import PLANS_NAME

SMALL = {RECORDS: "records", "gt_segmentations": "copied labels"}
"""Folders of small files, by name."""
STUDY = "nnssl_benchmark_"
"""Beginning of the name of a study's folder."""


@dataclass(frozen=True)
class DiskUse:
    """A folder of a data set, or several of one kind together.

    Attributes:
        what: What it holds, in words.
        path: The folder, or the one in which all of them lie.
        files: Number of files.
        size_bytes: Sum of their sizes; links to images count with the size of the image.
        again: How it can be made again, in words; empty if it cannot.
        kept: Why ``remove_remakable`` leaves it although it was made from other files; empty if that does not apply.
        single: Whether it is one folder.
    """

    what: str
    path: Path
    files: int
    size_bytes: int
    again: str = ""
    kept: str = ""
    single: bool = True


def find_disk_use(dataset_name: str, folders: Folders) -> list[DiskUse]:
    """Return what of a data set lies in nnU-Net's three folders: raw files, preprocessed data, results.

    Args:
        dataset_name: Full name of the data set.
        folders: nnU-Net's folders.
    """
    raw = folders.raw / dataset_name
    found = [_use("raw files", raw)] if raw.is_dir() else []
    return [*found, *_preprocessed(dataset_name, folders), *_results(folders.results / dataset_name)]


def remove_remakable(dataset_name: str, folders: Folders) -> list[DiskUse]:
    """Delete what of a data set can be made again, and return it.

    A case is removed only if the raw images, the exclusion mask and the plan that it was made from still exist. If the process is
    killed, the cases that are left are complete, and the next call goes on.

    Args:
        dataset_name: Full name of the data set.
        folders: nnU-Net's folders.

    Raises:
        UserError: If a process works on this data set or writes results, because it may read the cases; or if a file cannot be
            deleted.
    """
    folder = folders.preprocessed / dataset_name
    if not folder.is_dir():
        return []
    with only_process(folder, "removing preprocessed cases", wait=False):
        _check_nothing_runs(folders.results)
        removed = [use for use in _preprocessed(dataset_name, folders) if use.again]
        for use in removed:
            try:
                _remove(use.path)
            except OSError as error:
                raise UserError(f"{use.path}: cannot be deleted ({error.strerror}); check its owner") from error
    return removed


def _remove(folder: Path) -> None:
    for case in complete_cases(folder):
        remove_case(folder, case)
    shutil.rmtree(folder.parent / RECORDS / folder.name, ignore_errors=True)
    shutil.rmtree(folder)


def _check_nothing_runs(results: Path) -> None:
    """Raise ``UserError`` if a process writes results, of whatever data set: it may read cases of this one too."""
    for lock in sorted(results.rglob(".*.lock")):
        owner = living_owner(lock)
        if owner is not None:
            raise UserError(f"{lock.parent}: {owner} works there and may read these cases; wait until it has ended")


def _preprocessed(dataset_name: str, folders: Folders) -> list[DiskUse]:
    """Return what lies in the preprocessed folder of a data set, files together."""
    folder = folders.preprocessed / dataset_name
    if not folder.is_dir():
        return []
    plans, identifiers = _plans_of(folder)
    names = _raw_names(dataset_name, folders)
    uses = []
    loose = [path for path in folder.iterdir() if not path.is_dir()]
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        if path.name in plans:
            plan = plans[path.name]
            named = "" if plan == PLANS_NAME else f" -p {plan}"
            again = f"nnssl_plan_and_preprocess -d {dataset_name}{named}"
            kept = _why_kept(path, names, dataset_name)
            uses.append(_use(f"cases of {plan}", path, "" if kept else again, kept))
        elif path.name in identifiers and (folder / RECORDS / path.name).is_dir():
            missing = sorted({file.stem for file in path.glob("*.pkl")} - names)
            kept = f"the raw images of {some(missing)} are gone" if missing else ""
            uses.append(_use("labelled cases", path, "" if kept else "the next nnssl_finetune", kept))
        elif path.name.endswith(("_cases_2d", "_cases_3d")):
            uses.append(_use("cases without a plan", path, kept="the plan that made them is gone"))
        else:
            uses.append(_use(SMALL.get(path.name, "made by nnU-Net or others"), path))
    if loose:
        size = sum(path.lstat().st_size for path in loose)
        uses.append(DiskUse("plans and records", folder, len(loose), size, single=False))
    return uses


def _plans_of(folder: Path) -> tuple[dict[str, str], set[str]]:
    """Return what the plans in a folder name; other files are skipped.

    Returns:
        The plan of every folder of nnssl's cases, and the names of nnU-Net's folders of cases.
    """
    found: dict[str, str] = {}
    identifiers = set()
    for path in sorted(folder.glob("*.json")):
        with suppress(UserError, KeyError, TypeError, AttributeError):
            content = read_json(path, "plan")
            for section in content["configurations"].values():
                identifiers.add(section.get("data_identifier"))
            for section in content["pretext"]["configurations"].values():
                found[section["case_folder"]] = path.stem
    return found, identifiers


def _raw_names(dataset_name: str, folders: Folders) -> set[str]:
    """Return the names of the raw cases; none if the raw data set is gone or cannot be read."""
    with silence(), suppress(UserError):
        return {case.name for case in read_dataset(dataset_name, folders).cases}
    return set()


def _why_kept(folder: Path, names: set[str], dataset_name: str) -> str:
    """Return why cases cannot be made again; empty if they can."""
    cases = complete_cases(folder)
    missing = [case for case in cases if case not in names]
    if missing:
        return f"the raw images of {some(missing)} are gone"
    for case in cases:
        try:
            mask = read_properties(folder, case).exclude_mask
        except UserError:  # of another version, and preprocessed again anyway
            continue
        if mask is not None and not Path(mask.path).exists():
            return f"{case} was made with an exclusion mask that is gone ({mask.path})"
    return ""


def _results(folder: Path) -> list[DiskUse]:
    """Return the results of a data set: each pretraining, and each other kind together."""
    kinds: dict[str, list[Path]] = {}
    uses = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or path.name[0] == ".":
            continue
        if any(path.glob("fold_*/run.json")):
            finished = any(path.glob("fold_*/checkpoint_final.pth"))
            uses.append(_use("pretraining" if finished else "pretraining, unfinished", path))
        else:
            kinds.setdefault(_kind_of(path.name), []).append(path)
    for kind, paths in kinds.items():
        parts = [_use(kind, path) for path in paths]
        where = paths[0] if len(paths) == 1 else folder
        size = sum(part.size_bytes for part in parts)
        named = kind if len(paths) == 1 else f"{kind} ({len(paths)} folders)"
        uses.append(DiskUse(named, where, sum(part.files for part in parts), size, single=len(paths) == 1))
    return uses


def _kind_of(name: str) -> str:
    if name == PROBES_FOLDER:
        return "choice of a method"
    if name.startswith(STUDY):
        return "studies"
    return "fine-tuning" if name.startswith("nnssl_") else "other results"


def _use(what: str, path: Path, again: str = "", kept: str = "") -> DiskUse:
    sizes = list(_sizes(path))
    return DiskUse(what, path, len(sizes), sum(sizes), again, kept)


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the size of every file below a folder; links to files and folders are followed, broken ones count 0."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:  # links that form a circle
            folders.clear()
            continue
        seen.add(place)
        for name in names:
            try:
                yield (Path(root) / name).stat().st_size
            except OSError:
                yield 0
