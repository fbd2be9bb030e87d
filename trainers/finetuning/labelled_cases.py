"""The choice of training cases and held-out cases among the labelled cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.patients import patient_in_name
from nnssl.draws import make_generator
from nnssl.errors import ArgumentError, UserError
from nnssl.files import content_digest, read_json, read_names, some, write_json
from nnssl.log import logger
from nnssl.paths import Folders
from trainers.finetuning.case_contents import labelled_files

FOLDS = 5  # nnU-Net's cross-validation
Fold = int | Literal["all"]


@dataclass(frozen=True)
class Split:
    """Training cases and held-out cases of one run."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    name: str
    """Short description of the choice for a folder name, such as ``5cases`` or ``folds``."""
    validation: tuple[str, ...] = ()
    """Cases that are predicted like held-out ones but choose between arms; they do not count in the result."""
    fold: Fold | None = None
    """Fold of nnU-Net's cross-validation; None for cases that were chosen otherwise."""
    folds_digest: str = ""
    """Digest of the list of all folds, which share a model folder."""

    @property
    def what(self) -> str:
        """Word for the cases that are predicted."""
        return "training cases" if self.fold == "all" else "held-out cases"

    @property
    def cases(self) -> tuple[str, ...]:
        """All cases of the run, sorted."""
        return tuple(sorted({*self.train, *self.test, *self.validation}))


def read_case_names(path: Path, labelled: Sequence[str]) -> tuple[str, ...]:
    """Read a list of labelled cases, one name per line.

    Args:
        path: File with the list.
        labelled: Names that the list may contain.

    Raises:
        UserError: If the file is missing or empty, lists a name twice, or lists a name that is not a labelled case.
    """
    names = read_names(path)
    unknown = [name for name in names if name not in set(labelled)]
    if unknown:
        raise UserError(
            f"{path}: {some(unknown)} not among the {len(labelled)} labelled cases (such as {labelled[0]}); write case "
            "names without channel number and file ending"
        )
    return tuple(sorted(names))


def label_order(cases: Sequence[str], seed: int) -> list[str]:
    """Return cases in a seeded random order. The first N are the subset of N labels, so that subsets are nested."""
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
    """Choose training cases and held-out cases.

    Args:
        labelled: Names of all labelled cases.
        seed: Random seed for the order in which cases are added.
        labels: Number of training cases.
        cases: File that lists the training cases, in place of ``labels``.
        test_cases: File that lists the held-out cases; None for all cases that are not trained on.

    Returns:
        The split; None if no choice is given, which stands for nnU-Net's fold 0.

    Raises:
        ArgumentError: If both ``labels`` and ``cases`` are given, or ``labels`` exceeds the available cases.
        UserError: If a list has unknown names, the lists overlap, or no case is left on one side.
    """
    if labels is not None and cases is not None:
        raise ArgumentError(
            "labels and cases cannot be combined, because each sets what is trained on", "labels", "cases"
        )
    if labels is None and cases is None and test_cases is None:
        return None
    test = read_case_names(test_cases, labelled) if test_cases is not None else None
    if cases is not None:
        train = read_case_names(cases, labelled)
        overlap = sorted(set(train) & set(test or ()))
        if overlap:
            raise UserError(
                f"{cases}, {test_cases}: {some(overlap)} in both; remove each of these cases from one of the two lists"
            )
    else:
        free = label_order([name for name in labelled if name not in set(test or ())], seed)
        if labels is not None and not 1 <= labels <= len(free):
            raise ArgumentError(
                f"labels must be between 1 and {len(free)}, the number of available labelled cases, got {labels}",
                "labels",
            )
        train = tuple(sorted(free[:labels]))
    if test is None:
        test = tuple(sorted(set(labelled) - set(train)))
    if not train or not test:
        side, other = ("held out", "train on") if train else ("trained on", "hold out")
        raise UserError(f"none of the {len(labelled)} labelled cases is left to be {side}; {other} fewer cases")
    return Split(train, test, f"{len(train)}cases")


def choose_unlabelled(
    labelled: Sequence[str], split: Split, cases: Path | None = None, patients: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Choose the cases whose images are used without their labels, in addition to the training cases.

    Other cases of held-out patients are excluded, and logged.

    Args:
        labelled: Names of all labelled cases.
        split: Training cases and held-out cases.
        cases: File that lists the cases; None for all cases that are not in the split.
        patients: Patients, by case; None to infer them from the names.

    Raises:
        UserError: If a listed case is held out.
        ArgumentError: If no case is left.
    """
    if cases is None:
        names = sorted(set(labelled) - set(split.test))
    else:
        names = list(read_case_names(cases, labelled))
        overlap = sorted(set(names) & set(split.test))
        if overlap:
            raise UserError(
                f"{cases}: {some(overlap)} also held out; remove such cases from the list of unlabelled images"
            )
    others = [name for name in names if name not in set(split.train)]
    found = patients if patients is not None else {name: patient_in_name(name) for name in labelled}
    held_out = {found[name] for name in split.test}
    left = tuple(name for name in others if found[name] not in held_out)
    if len(left) < len(others):
        excluded = sorted(set(others) - set(left))
        logger.info(
            f"{len(excluded)} cases are of held-out patients and are not used without labels ({some(excluded)})"
        )
    if not left:
        raise ArgumentError(
            f"mode mean_teacher needs images of other cases, but all {len(labelled) if cases is None else len(names)} "
            f"{'labelled ones' if cases is None else f'cases of {cases}'} are trained on, held out or of held-out patients; "
            "choose fewer to train on with labels and to hold out with test_cases, or give images with unlabelled",
            "mode",
            "test_cases",
            "labels",
            "unlabelled",
        )
    return left


def fold_split(labelled: Sequence[str], dataset_name: str, folders: Folders, fold: Fold = 0) -> Split:
    """Return a fold of nnU-Net's cross-validation from ``splits_final.json``, which is written if it does not exist.

    Args:
        labelled: Names of all labelled cases.
        dataset_name: Name of the labelled data set.
        folders: nnU-Net's folders.
        fold: Number of the fold that is held out; ``"all"`` to train on all cases and, as in nnU-Net, predict them too.

    Raises:
        ArgumentError: If there are too few cases for five folds.
        UserError: If the file has no such fold, or names a case that does not exist.
    """
    if fold == "all":
        return Split(tuple(labelled), tuple(labelled), "all", fold="all", folds_digest=content_digest(sorted(labelled)))
    path = folders.preprocessed / dataset_name / "splits_final.json"
    if not path.exists():
        if len(labelled) < FOLDS:
            raise ArgumentError(
                f"{dataset_name}: {len(labelled)} labelled images are too few for nnU-Net's {FOLDS} folds; choose what to train "
                "on with labels or cases",
                "labels",
                "cases",
            )
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        splits = generate_crossval_split(sorted(labelled), seed=12345, n_splits=FOLDS)  # nnU-Net's seed
        write_json(path, [{side: [str(name) for name in names] for side, names in split.items()} for split in splits])
    splits = read_json(path, "list of folds")
    if fold >= len(splits):
        raise UserError(
            f"{path}: has {len(splits)} folds, so there is no fold {fold}; list the training cases in a file instead"
        )
    unknown = sorted((set(splits[fold]["train"]) | set(splits[fold]["val"])) - set(labelled))
    if unknown:
        raise UserError(
            f"{path}: {some(unknown)} not among the labelled cases; delete the file, which is then written again"
        )
    train, test = (tuple(splits[fold][side]) for side in ("train", "val"))
    return Split(train, test, "folds", fold=fold, folds_digest=content_digest(splits))


def find_labelled_cases(dataset_name: str, folders: Folders) -> tuple[str, ...]:
    """Return the names of the labelled cases of a raw data set, sorted.

    Raises:
        UserError: If there are no images, or images without a label, which nnU-Net cannot preprocess.
    """
    folder = folders.raw / dataset_name
    files = labelled_files(dataset_name, folders)
    if not files:
        content = read_labelled_json(folder / "dataset.json")
        raise UserError(
            f"{folder / 'imagesTr'}: no image has the ending {content['file_ending']}; add images or correct file_ending in "
            "dataset.json"
        )
    unlabelled = sorted(name for name, own in files.items() if own.label is None or not own.label.is_file())
    if unlabelled:
        raise UserError(
            f"{dataset_name}: {len(unlabelled)} of {len(files)} images have no label ({some(unlabelled)}); "
            "fine-tuning needs a data set of labelled images only, so move the others to another data set, which mode "
            "mean_teacher can use as unlabelled images"
        )
    return tuple(sorted(files))
