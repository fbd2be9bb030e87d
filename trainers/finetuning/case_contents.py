"""The state of the labelled cases that preprocessed data and trained networks were made from, and what has changed since."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from nnssl.data.contents import (
    Content,
    changed_cases,
    digest_files,
    digest_together,
    read_contents,
    write_contents,
)
from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.inline_pool import without_workers
from nnssl.data.raw import RawDataset
from nnssl.errors import UserError
from nnssl.paths import Folders

FILE_NAME = "nnssl_contents.json"
"""File in the folder of a training with the state of its cases."""
MADE_FROM_OTHERS = "image or label"


@dataclass(frozen=True)
class LabelledFiles:
    """Files of a labelled case."""

    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Changes:
    """What has changed since a network was trained and scored, by case."""

    trained: dict[str, str]
    """Changes of cases that it was trained on."""
    held_out: dict[str, str]
    """Changes of cases that it was only scored on."""

    def __bool__(self) -> bool:
        return bool(self.trained or self.held_out)


def labelled_files(dataset_name: str, folders: Folders) -> dict[str, LabelledFiles]:
    """Return the files of all images of a labelled data set by case, as nnU-Net finds them; labels need not exist.

    Raises:
        UserError: If nnU-Net finds no folder of images, or ``dataset.json`` is not that of a labelled data set.
    """
    from nnunetv2.utilities import utils

    raw = folders.raw / dataset_name
    content = read_labelled_json(raw / "dataset.json")
    try:
        with redirect_stdout(StringIO()), without_workers(utils):
            found = utils.get_filenames_of_train_images_and_targets(str(raw), content)
    except (OSError, KeyError) as error:
        raise UserError(
            f"{raw}: nnU-Net finds no images ({error}); the folder needs imagesTr and dataset.json"
        ) from error
    return {
        str(case): LabelledFiles(tuple(map(Path, files["images"])), Path(files["label"]))
        for case, files in found.items()
    }


def find_contents(
    dataset_name: str, files: Mapping[str, LabelledFiles], folders: Folders, threads: int
) -> dict[str, Content]:
    """Return the present state of cases, by name.

    Args:
        dataset_name: Name of the data set.
        files: Files of the cases.
        folders: nnU-Net's folders.
        threads: Number of files that are read at the same time.
    """
    every = [file for own in files.values() for file in (*own.images, own.label) if file is not None]
    digests = digest_files(every, dataset_name, folders, threads)
    return {
        case: Content(digest_together(own.images, digests), digests.get(own.label, "") if own.label else "")
        for case, own in files.items()
    }


def find_image_contents(source: RawDataset, folders: Folders, threads: int) -> dict[str, Content]:
    """Return the present state of the images of a data set, by case."""
    files = {case.name: LabelledFiles(case.images) for case in source.cases}
    return find_contents(source.name, files, folders, threads)


def find_outdated(
    records: Sequence[Path], made: Path, contents: Mapping[str, Content], files: Mapping[str, LabelledFiles]
) -> dict[str, str]:
    """Return which cases were made from other images or labels, with what differs.

    A case without a record, made by nnU-Net or an earlier version, counts as made from other files if one of these is newer.

    Args:
        records: Folders of the records; a case has one in each.
        made: Folder of the preprocessed cases.
        contents: Present state of the cases.
        files: Files of the cases.
    """
    outdated = {}
    for case, now in contents.items():
        for folder in records:
            before = (read_contents(folder / f"{case}.json") or {}).get(case)
            what = before.difference(now) if before else _newer(files[case], made / f"{case}.pkl")
            if what:
                outdated[case] = what
            elif before is None:
                write_record(folder, case, now)
    return outdated


def write_record(folder: Path, case: str, content: Content) -> None:
    """Write the state that a case was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_contents(folder / f"{case}.json", {case: content})


def find_changes(
    fold: Path,
    contents: Mapping[str, Content],
    train: Iterable[str],
    unlabelled: Iterable[str],
    held_out: Iterable[str],
) -> Changes:
    """Return what has changed since a training began; nothing if it was begun by an earlier version.

    Args:
        fold: Folder of the training.
        contents: Present state of the cases.
        train: Cases that are trained on.
        unlabelled: Cases whose images are trained on.
        held_out: Cases that are predicted and scored.
    """
    before = read_contents(fold / FILE_NAME)
    if before is None:
        return Changes({}, {})
    found = changed_cases(before, contents)
    images = {case for case, what in found.items() if "image" in what}
    trained = {case for case in train if case in found} | (images & set(unlabelled))
    scored = {case for case in held_out if case in found} - trained
    return Changes({case: found[case] for case in sorted(trained)}, {case: found[case] for case in sorted(scored)})


def _newer(files: LabelledFiles, made: Path) -> str:
    """Return in words which files are newer than what was made of them; empty if none is."""
    every = [*files.images, *([] if files.label is None else [files.label])]
    with suppress(OSError):
        if max(file.stat().st_mtime_ns for file in every) <= made.stat().st_mtime_ns:
            return ""
    return MADE_FROM_OTHERS
