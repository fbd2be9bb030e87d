"""Which classes a segmentation has: as a ``dataset.json`` names them, or as they are found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.errors import UserError
from nnssl.evaluation.segmentation_files import find_segmentations, read_segmentation
from nnssl.files import read_json
from nnssl.log import logger

DATASET_JSON = "dataset.json"
MOST_CLASSES = 255
"""Where no file names the classes."""


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
    """Return the classes and regions of a ``dataset.json`` that are evaluated: all but background and ignore label.

    Raises:
        KeyError: it has no ``labels``.
        ValueError: a value is no whole number, as in files of nnU-Net v1, which give names by value; or TypeError.
    """
    return {
        name: tuple(map(int, value)) if isinstance(value, (list, tuple)) else int(value)
        for name, value in dataset_json["labels"].items()
        if name != "ignore" and value != 0
    }


def ignore_label(dataset_json: Mapping[str, Any]) -> int | None:
    """Return the value of a ``dataset.json`` that marks voxels which nobody labelled, None without one."""
    value = dataset_json["labels"].get("ignore")
    return None if value is None else int(value)


def find_labels(file: Path | None, predictions: Path, references: Path) -> tuple[dict[str, Any], int | None]:
    """Return the classes to evaluate and the value to ignore: from a file, from one beside either folder, or as found.

    nnU-Net writes a ``dataset.json`` into the folder of its predictions.

    Args:
        file: None to look beside the segmentations.
        predictions: folder.
        references: folder.

    Raises:
        UserError: there is no such folder, a file cannot be read, or predictions and references have different labels.
    """
    for folder in (predictions, references):
        find_segmentations(folder)  # a folder that is not there is no folder without a dataset.json
    beside = [predictions / DATASET_JSON, references / DATASET_JSON, references.absolute().parent / DATASET_JSON]
    paths = [file] if file is not None else [path for path in beside if path.exists()]
    if not paths:
        return _labels_as_found(predictions, references), None
    found = {path: _parse_labels(read_json(path, "dataset.json"), path) for path in paths}
    first = paths[0]
    for path in paths[1:]:
        if found[path] != found[first]:
            raise UserError(
                f"{first} and {path}: have different labels, {_describe(found[first])} and {_describe(found[path])}; "
                "--labels FILE says which are meant"
            )
    logger.info(f"labels: {first}")
    return found[first]


def _parse_labels(content: Any, path: Path) -> tuple[dict[str, Any], int | None]:
    """Return the classes to evaluate and the value to ignore from the content of a ``dataset.json``.

    Raises:
        UserError: it has no labels, or not in the form of nnU-Net v2.
    """
    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        raise UserError(f"{path}: has no 'labels', so the classes have no names; give another --labels FILE")
    try:
        labels, ignore = foreground_labels(content), ignore_label(content)
    except (TypeError, ValueError) as error:
        raise UserError(
            f'{path}: its labels are not in the form of nnU-Net v2, {{"background": 0, "liver": 1}}; '
            "write them so, or give another --labels FILE"
        ) from error
    if not labels:
        raise UserError(f"{path}: its 'labels' name no class but the background; give another --labels FILE")
    return labels, ignore


def _describe(labels: tuple[dict[str, Any], int | None]) -> str:
    classes, ignore = labels
    names = [f"{name} {value}" for name, value in classes.items()]
    return ", ".join(names if ignore is None else [*names, f"ignore {ignore}"])


def _labels_as_found(predictions: Path, references: Path) -> dict[str, int]:
    """Return every value of the segmentations but 0 as a class of that name."""
    values: set[int] = set()
    for folder in (predictions, references):
        for path in find_segmentations(folder).values():
            values |= {int(value) for value in np.unique(read_segmentation(path).values)}
            if len(values) > MOST_CLASSES:
                raise UserError(
                    f"{path}: makes it more than {MOST_CLASSES} different values, so these seem to be images; "
                    "give segmentations, or --labels FILE"
                )
    labels = {str(value): value for value in sorted(values - {0})}
    if not labels:
        raise UserError(
            f"{predictions}, {references}: hold background only; --labels FILE says which classes there are"
        )
    logger.info(f"no dataset.json found: the classes are the values {', '.join(labels)}; --labels FILE names them")
    return labels
