"""Where the files of a data set are, how large they are, and which of them can be made again.

Two kinds of folders can be made again: cases that ``nnssl_plan_and_preprocess`` made, and cases that fine-tuning had nnU-Net
preprocess for nnssl's plan. Weights, results, plans, fingerprints, and whatever others made are never deleted.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nnssl.data.case_store import LEARNABLE, SUPERVOXELS, complete_cases, read_properties
from nnssl.data.contents import RECORDS, find_status
from nnssl.data.raw import read_dataset
from nnssl.errors import UserError
from nnssl.files import read_json, some
from nnssl.locks import only_process, who_holds
from nnssl.log import silence
from nnssl.paths import PROBES_FOLDER, Folders
from nnssl.plan import PLANS_NAME, read_plan

KNOWN = {RECORDS: "records", "gt_segmentations": "copied labels"}
"""Folders of small files, by name."""
STUDY = "nnssl_benchmark_"
"""Beginning of the name of a study's folder."""
PLAN_AGAIN = "the nnssl_plan_and_preprocess command that made the plan"
FINETUNE_AGAIN = "the next nnssl_finetune or nnssl_benchmark"
REMOVED = ".removed"
"""End of the hidden name of a folder that is being deleted."""
OWN_ENDINGS = (".json", ".b2nd", "_foreground.npy")
LABELLED_ENDINGS = (".pkl", ".b2nd")


@dataclass(frozen=True)
class DiskUse:
    """A folder of a data set, or several of one kind together.

    Attributes:
        what: What it holds, in words.
        path: The folder, or the one in which all of them are.
        files: Number of files.
        size_bytes: Sum of their sizes; links to images count with the size of the image.
        again: What makes it again, in words; empty if it cannot be made again or is kept.
        kept: Why ``delete_remakable`` keeps it although it was made from other files; empty if that does not apply.
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
    """Return the files of a data set in nnU-Net's three folders: raw files, preprocessed data, results.

    Args:
        dataset_name: Full name of the data set.
        folders: nnU-Net's folders.

    Raises:
        UserError: If a folder cannot be read.
    """
    raw = folders.raw / dataset_name
    try:
        found = [_use("raw files", raw)] if raw.is_dir() else []
        return [*found, *_preprocessed(dataset_name, folders), *_results(folders.results / dataset_name)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror or error}); check its owner") from error


def delete_remakable(dataset_name: str, folders: Folders) -> list[DiskUse]:
    """Delete the preprocessed cases of a data set that can be made again, and return what was deleted.

    A folder is deleted only if the plan that it was made for, and all images and labels of its cases, still exist, if no case was
    made with an exclusion mask, and if it holds nothing else. It is renamed first, so that a run that begins meanwhile finds no
    cases rather than some; the next call deletes what is left if the process is killed.

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
    with only_process(folder, "deleting preprocessed cases", wait=False):
        _check_nothing_runs(folders.results)
        deleted = [use for use in find_disk_use(dataset_name, folders) if use.again]
        for use in deleted:
            hidden = use.path
            try:
                if not hidden.name.endswith(REMOVED):
                    hidden = use.path.with_name(f".{use.path.name}{REMOVED}")
                    use.path.rename(hidden)
                    shutil.rmtree(folder / RECORDS / use.path.name, ignore_errors=True)
                shutil.rmtree(hidden)
            except OSError as error:
                raise UserError(
                    f"{hidden}: cannot be deleted ({error.strerror or error}); check its owner, then run the command again"
                ) from error
    return deleted


def _check_nothing_runs(results: Path) -> None:
    """Raise ``UserError`` if a process writes results, of whatever data set: it may read cases of this one too."""
    for path in _files_below(results):
        if path.name.startswith(".") and path.name.endswith(".lock"):
            holder = who_holds(path)
            if holder:
                raise UserError(
                    f"{path.parent}: {holder} works there and may read these cases; wait until it has ended"
                )


def _preprocessed(dataset_name: str, folders: Folders) -> list[DiskUse]:
    """Return what lies in the preprocessed folder of a data set, files together."""
    folder = folders.preprocessed / dataset_name
    if not folder.is_dir():
        return []
    own, labelled = _plans_of(folder)
    images, labels = _raw_cases(dataset_name, folders)
    uses = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if path.name.startswith("."):
            if path.name.endswith(REMOVED):
                uses.append(_use("half deleted cases", path, PLAN_AGAIN))
        elif path.name in own:
            kept = _why_kept(path, images, OWN_ENDINGS, (LEARNABLE, SUPERVOXELS)) or _why_kept_by_masks(path)
            uses.append(_use(f"cases of {own[path.name]}", path, "" if kept else PLAN_AGAIN, kept))
        elif path.name in labelled and (folder / RECORDS / path.name).is_dir():
            kept = _why_kept(path, images & labels, LABELLED_ENDINGS)
            uses.append(_use("labelled cases", path, "" if kept else FINETUNE_AGAIN, kept))
        elif path.name.endswith(("_cases_2d", "_cases_3d")):
            uses.append(_use("cases", path, kept="no plan that can be read names it"))
        else:
            uses.append(_use(KNOWN.get(path.name, "other folder"), path))
    loose = [path for path in folder.iterdir() if not path.is_dir()]
    if loose:
        size = sum(path.lstat().st_size for path in loose)
        uses.append(DiskUse("plans and records", folder, len(loose), size, single=False))
    return uses


def _plans_of(folder: Path) -> tuple[dict[str, str], set[str]]:
    """Return what the plans in a folder name; other files are skipped.

    Returns:
        The plan of every folder of nnssl's cases, and the folders of cases that nnU-Net preprocesses for nnssl's default plan.
    """
    own: dict[str, str] = {}
    labelled = set()
    for path in sorted(folder.glob("*.json")):
        with suppress(UserError):
            for section in read_plan(path).pretext.configurations.values():
                own[section.case_folder] = path.stem
        if path.stem == PLANS_NAME:
            with suppress(UserError, KeyError, TypeError, AttributeError):
                labelled |= {each.get("data_identifier") for each in read_json(path, "plan")["configurations"].values()}
    return own, labelled


def _raw_cases(dataset_name: str, folders: Folders) -> tuple[set[str], set[str]]:
    """Return the names of the raw cases of which all images exist, and of those that have a label."""
    images: set[str] = set()
    labels: set[str] = set()
    with silence(), suppress(UserError):
        dataset = read_dataset(dataset_name, folders)
        for case in dataset.cases:
            if all(find_status(image) is not None for image in case.images):
                images.add(case.name)
            label = folders.raw / dataset_name / "labelsTr" / f"{case.name}{dataset.file_ending}"
            if find_status(label) is not None:
                labels.add(case.name)
    return images, labels


def _why_kept(folder: Path, cases: set[str], endings: tuple[str, ...], subfolders: tuple[str, ...] = ()) -> str:
    """Return why a folder is kept: it is a link, cannot be made again, or holds other files; empty if it is not kept.

    Args:
        folder: Folder of cases.
        cases: Cases that can be made again.
        endings: Endings of the files of a case; the first marks it as complete.
        subfolders: Folders inside that belong to the cases.
    """
    if folder.is_symlink():
        return "it is a link"
    names = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    missing = sorted({name.removesuffix(endings[0]) for name in names if name.endswith(endings[0])} - cases)
    if missing:
        return f"raw files of {some(missing)} are gone or cannot be read"
    foreign = sorted(
        name
        for name, path in names.items()
        if path.is_symlink() or (name not in subfolders if path.is_dir() else not name.endswith(endings))
    )
    return f"it also holds {some(foreign)}" if foreign else ""


def _why_kept_by_masks(folder: Path) -> str:
    """Return why cases are kept that were made with exclusion masks, which the command that makes them again may lack."""
    for case in complete_cases(folder):
        try:
            if read_properties(folder, case).exclude_mask is not None:
                return f"{case} was made with an exclusion mask"
        except UserError:
            return f"{case} was made by another version"
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
    sizes = []
    for file in _files_below(path):
        try:
            sizes.append(file.stat().st_size)
        except OSError:  # a broken link
            sizes.append(0)
    return DiskUse(what, path, len(sizes), sum(sizes), again, kept)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, also through links to folders, each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:  # links that form a circle
            folders.clear()
            continue
        seen.add(place)
        yield from (Path(root) / name for name in names)
