"""The annotated cases: their label maps on the preprocessed grid, and the names of the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from nnssl.data.case_store import CaseStore
from nnssl.data.dataset_json import complete_dataset_json
from nnssl.data.dataset_labels import label_values
from nnssl.data.dataset_labels import read_labels as read_label_names
from nnssl.data.raw import RawDataset
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.labels import DATASET_JSON, ignore_label
from nnssl.files import file_digest, read_json, some
from nnssl.log import logger
from nnssl.propagation.grids import LabelResampling, check_preprocessed, read_grid, read_labels, to_case

LABELS_FOLDER = "labelsTr"


@dataclass(frozen=True)
class Reference:
    """An annotated case.

    Attributes:
        name: Name of the case.
        file: Its label map.
        digest: Digest of that file.
        values: Values that occur in that file, ascending.
        labels: Label values on the grid of the preprocessed case.
    """

    name: str
    file: Path
    digest: str
    values: tuple[int, ...]
    labels: Int[np.ndarray, "z y x"]


@dataclass(frozen=True)
class References:
    """All annotated cases and what their values mean.

    Attributes:
        cases: The cases, in the given order.
        values: Label values that occur, ascending; the background comes first.
        ignore: Value of unlabelled voxels, which are not used; None if there is none.
        dataset_json: Content of the ``dataset.json`` for the output.
    """

    cases: tuple[Reference, ...]
    values: tuple[int, ...]
    ignore: int | None
    dataset_json: dict[str, Any]

    def name_of(self, value: int) -> str:
        """Return the name of a label value; of the smallest region that holds it, if labels are regions."""
        found = [
            (len(own) if isinstance(own, list) else 1, name)
            for name, own in self.dataset_json["labels"].items()
            if value in (own if isinstance(own, list) else [own])
        ]
        return min(found)[1]


def read_references(
    names: Sequence[str],
    dataset: RawDataset,
    store: CaseStore,
    resampling: LabelResampling,
    folder: Path | None = None,
) -> References:
    """Read the label maps of the annotated cases.

    Args:
        names: Names of the cases.
        dataset: Raw data set with their images.
        store: Preprocessed cases.
        resampling: Resampling of the plan.
        folder: Folder of the label maps; None for ``labelsTr`` of the data set.

    Raises:
        UserError: If a case is unknown, not preprocessed or has no label map, a label map does not fit its image or holds an
            unknown value, or no voxel of a structure or none of the background is annotated.
    """
    folder = folder or dataset.folder / LABELS_FOLDER
    files = {name: _find(name, dataset, store, folder) for name in names}
    raw = {case.name: case for case in dataset.cases}
    cases = []
    for name, file in files.items():
        grid = read_grid(raw[name], dataset.reader, resampling)
        check_preprocessed(grid, store.case(name), resampling)
        label_map = read_labels(file, dataset.reader, grid)
        labels = to_case(label_map, grid, store.case(name), resampling)
        values = tuple(int(value) for value in np.unique(label_map))
        cases.append(Reference(name, file, file_digest(file), values, labels))
    source, content = _label_names(folder, dataset)
    annotated = sorted({value for case in cases for value in case.values})
    if content is None:
        content = {"labels": {"background": 0, **{f"label_{value}": value for value in annotated if value != 0}}}
        logger.info(f"No dataset.json names the labels; they are named {some(list(content['labels']))}")
    label_names = read_label_names(content, str(source or dataset.folder / DATASET_JSON))
    completed = complete_dataset_json(
        {**content, "numTraining": len(dataset.cases)},
        dataset.file_ending,
        dataset.channel_names,
        len(dataset.cases),
        dataset.name,
    )
    completed["labels"] = label_names
    _check_values(cases, completed, source or dataset.folder / DATASET_JSON)
    ignore = ignore_label(completed)
    kept = {int(value) for case in cases for value in np.unique(case.labels)}
    values = tuple(sorted({0, *kept} - {ignore}))
    if len(values) < 2:
        raise UserError(f"{folder}: the label maps of {some(list(names))} hold background only; annotate a structure")
    if 0 not in kept:
        raise UserError(
            f"{folder}: the label maps of {some(list(names))} hold no background (value 0); annotate voxels outside the "
            "structures"
        )
    references = References(tuple(cases), values, ignore, completed)
    lost = [references.name_of(value) for value in annotated if value not in {0, ignore, *kept}]
    if lost:
        logger.info(f"Warning: {some(lost)} vanish at the spacing of the preprocessed cases and are not carried over")
    return references


def _find(name: str, dataset: RawDataset, store: CaseStore, folder: Path) -> Path:
    """Return the label map of a case.

    Raises:
        UserError: If the case is unknown or not preprocessed, or has no label map.
    """
    known = [case.name for case in dataset.cases]
    if name not in known:
        raise ArgumentError(f"cases_from: {dataset.name} has no case {name}; it has {some(known)}", "cases_from")
    if name not in store.names:
        raise UserError(f"case {name}: {store.folder} has no such case; run nnssl_plan_and_preprocess again")
    file = folder / f"{name}{dataset.file_ending}"
    if not file.is_file():
        raise ArgumentError(
            f"{file}: there is no such label map of the annotated case {name}; annotate it, or name another folder with labels",
            "labels",
        )
    return file


def _label_names(folder: Path, dataset: RawDataset) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the first ``dataset.json`` that names labels, beside or above the label maps or in the data set, and its content."""
    for path in dict.fromkeys(each / DATASET_JSON for each in (folder, folder.absolute().parent, dataset.folder)):
        if path.is_file():
            content = read_json(path, "dataset.json")
            if isinstance(content, dict) and content.get("labels"):
                return path, content
    return None, None


def _check_values(cases: Sequence[Reference], content: dict[str, Any], path: Path) -> None:
    """Check that all values of the label maps are labels.

    Raises:
        UserError: If one is not.
    """
    known = label_values(content["labels"])
    for case in cases:
        unknown = sorted(set(case.values) - known)
        if unknown:
            raise UserError(
                f"{case.file}: contains the value {unknown[0]}, which is not a label in {path} "
                f"({', '.join(map(str, sorted(known)))}); add it there, or correct the label map"
            )
