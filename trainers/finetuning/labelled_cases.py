"""Which labelled cases are trained on and which are held out."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from nnssl.draws import make_generator
from nnssl.errors import UserError
from nnssl.files import read_json, read_names, some, write_json
from nnssl.paths import Folders

FOLDS = 5  # nnU-Net's cross-validation


@dataclass(frozen=True)
class Split:
    """Cases of one run."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    name: str
    """How they were chosen, short enough for a folder name: ``5cases``, ``fold0``."""


def read_case_names(path: Path, labelled: Sequence[str]) -> tuple[str, ...]:
    """Read a list of labelled cases, one name per line.

    Args:
        path: the list.
        labelled: names that may be in it.

    Raises:
        UserError: no such file, no name in it, a name twice, or one that is no labelled case.
    """
    names = read_names(path)
    unknown = [name for name in names if name not in set(labelled)]
    if unknown:
        raise UserError(
            f"{path}: {some(unknown)} not among the {len(labelled)} labelled cases (such as {labelled[0]}); write "
            "case names without channel number and file ending"
        )
    return tuple(sorted(names))


def label_order(cases: Sequence[str], seed: int) -> list[str]:
    """Return cases in a seeded random order; the first N are the subset of N labels, so subsets are nested."""
    names = sorted(cases)
    generator = make_generator(seed, "finetune/labels")
    return [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]


def split_cases(
    labelled: Sequence[str],
    seed: int,
    labels: int | None = None,
    cases: Path | None = None,
    test_cases: Path | None = None,
) -> Split | None:
    """Choose training and held-out cases as the user asked.

    Args:
        labelled: names of all labelled cases.
        seed: decides the order in which labels are added.
        labels: number of training cases.
        cases: list of the training cases, in place of ``labels``.
        test_cases: list of the held-out cases; None for all that are not trained on.

    Returns:
        The split, or None when the user asked for nothing, which means nnU-Net's fold 0.

    Raises:
        UserError: both ``labels`` and ``cases``, a list with unknown names, an overlap, or no case left on one side.
    """
    if labels is not None and cases is not None:
        raise UserError("--labels and --cases: both say which cases are trained on; give one of them")
    if labels is None and cases is None and test_cases is None:
        return None
    test = read_case_names(test_cases, labelled) if test_cases is not None else None
    if cases is not None:
        train = read_case_names(cases, labelled)
        overlap = sorted(set(train) & set(test or ()))
        if overlap:
            raise UserError(
                f"{cases}, {test_cases}: {some(overlap)} in both; a case is trained on or held out, not both"
            )
    else:
        free = label_order([name for name in labelled if name not in set(test or ())], seed)
        if labels is not None and not 1 <= labels <= len(free):
            raise UserError(
                f"--labels {labels}: there are {len(free)} labelled cases to choose from; take 1 to {len(free)}"
            )
        train = tuple(sorted(free[:labels]))
    if test is None:
        test = tuple(sorted(set(labelled) - set(train)))
    if not train or not test:
        side = "held out" if train else "trained on"
        raise UserError(f"all {len(labelled)} labelled cases: none is left to be {side}; name fewer")
    return Split(train, test, f"{len(train)}cases")


def choose_unlabelled(labelled: Sequence[str], split: Split, cases: Path | None = None) -> tuple[str, ...]:
    """Choose the cases of which only the images are used.

    Args:
        labelled: names of all labelled cases.
        split: cases that are trained on and held out.
        cases: list of the cases to take; None for all that the split leaves over.

    Raises:
        UserError: a case is trained on or held out too, or none is left.
    """
    if cases is None:
        left = tuple(sorted(set(labelled) - set(split.train) - set(split.test)))
        if not left:
            raise UserError(
                f"--mode mean_teacher: all {len(labelled)} labelled cases are trained on or held out, and it needs others; "
                "name the held-out ones with --test-cases and the trained ones with --labels or --cases, so that some are left"
            )
        return left
    names = read_case_names(cases, labelled)
    for side, taken in (("trained on", split.train), ("held out", split.test)):
        overlap = sorted(set(names) & set(taken))
        if overlap:
            raise UserError(
                f"{cases}: {some(overlap)} {side} too; take such cases out of the list, --mode mean_teacher needs others"
            )
    return names


def fold_split(labelled: Sequence[str], dataset_name: str, folders: Folders, fold: int = 0) -> Split:
    """Return a fold of nnU-Net's cross-validation, from ``splits_final.json`` or written there as nnU-Net would.

    Args:
        labelled: names of all labelled cases.
        dataset_name: name of the labelled data set.
        folders: nnU-Net's folders.
        fold: which fold is held out.

    Raises:
        UserError: too few cases for five folds, no such fold, or the file names a case that is not there.
    """
    path = folders.preprocessed / dataset_name / "splits_final.json"
    if not path.exists():
        if len(labelled) < FOLDS:
            raise UserError(
                f"{dataset_name}: has {len(labelled)} labelled cases, too few for nnU-Net's {FOLDS} folds; say which "
                "to train on with --labels or --cases"
            )
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        splits = generate_crossval_split(sorted(labelled), seed=12345, n_splits=FOLDS)  # nnU-Net's seed
        write_json(path, [{side: [str(name) for name in names] for side, names in split.items()} for split in splits])
    splits = read_json(path, "list of folds")
    if fold >= len(splits):
        raise UserError(f"{path}: has {len(splits)} folds, not fold {fold}; name the cases with --cases instead")
    unknown = sorted((set(splits[fold]["train"]) | set(splits[fold]["val"])) - set(labelled))
    if unknown:
        raise UserError(f"{path}: {some(unknown)} not among the labelled cases; delete the file to have it made again")
    return Split(tuple(splits[fold]["train"]), tuple(splits[fold]["val"]), f"fold{fold}")


def find_labelled_cases(dataset_name: str, folders: Folders) -> tuple[str, ...]:
    """Return the names of the labelled cases of a raw data set, sorted.

    Raises:
        UserError: there are no images, or images without a label, which nnU-Net cannot preprocess.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder = folders.raw / dataset_name
    content = read_json(folder / "dataset.json", "dataset.json of a labelled data set")
    try:
        with redirect_stdout(StringIO()):
            files = get_filenames_of_train_images_and_targets(str(folder), content)
    except (OSError, KeyError) as error:
        raise UserError(
            f"{folder}: nnU-Net finds no images there ({error}); it wants imagesTr and dataset.json"
        ) from error
    if not files:
        raise UserError(
            f"{folder / 'imagesTr'}: holds no image with the ending {content['file_ending']}; put them there"
        )
    unlabelled = sorted(str(name) for name, case in files.items() if not Path(case["label"]).is_file())
    if unlabelled:
        raise UserError(
            f"{dataset_name}: {len(unlabelled)} of {len(files)} images have no label ({some(unlabelled)}); "
            "fine-tuning needs a data set of labelled images only, so move the others to another one (--mode mean_teacher takes "
            "that one as --unlabelled)"
        )
    return tuple(sorted(str(name) for name in files))
