"""Classes of a segmentation: those that a ``dataset.json`` names, or all values that occur."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.data.dataset_labels import read_labels
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.segmentation_files import find_segmentations, read_segmentation
from nnssl.files import read_json
from nnssl.log import logger

DATASET_JSON = "dataset.json"
MOST_CLASSES = 255
"""Largest number of values if no file names the classes; images have more."""


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
    """Return the classes and regions of a ``dataset.json`` without background and ignore label.

    Raises:
        KeyError: If it has no ``labels``.
        ValueError: If a value is not an integer, as in files of nnU-Net v1, which map values to names.
        TypeError: If a value has a wrong type.
    """
    return {
        name: tuple(map(int, value)) if isinstance(value, (list, tuple)) else int(value)
        for name, value in dataset_json["labels"].items()
        if name != "ignore" and value != 0
    }


def ignore_label(dataset_json: Mapping[str, Any]) -> int | None:
    """Return the value that marks unlabelled voxels according to a ``dataset.json``; None if there is none."""
    value = dataset_json["labels"].get("ignore")
    return None if value is None else int(value)


def find_labels(file: Path | None, predictions: Path, references: Path) -> tuple[dict[str, Any], int | None]:
    """Return the classes to evaluate and the value to ignore.

    They come from the given file, else from a ``dataset.json`` beside either folder (nnU-Net writes one to the folder of its
    predictions), else from the values that occur.

    Args:
        file: ``dataset.json`` that names the classes; None to look beside the segmentations.
        predictions: Folder of the predictions.
        references: Folder of the references.

    Raises:
        UserError: If a folder does not exist, a file cannot be read, or predictions and references have different labels.
    """
    for folder in (predictions, references):
        find_segmentations(folder)  # otherwise, a missing folder would pass for one without a dataset.json
    beside = [predictions / DATASET_JSON, references / DATASET_JSON, references.absolute().parent / DATASET_JSON]
    paths = [file] if file is not None else [path for path in beside if path.exists()]
    if not paths:
        return _labels_as_found(predictions, references), None
    found = {path: _parse_labels(read_json(path, "dataset.json"), path) for path in paths}
    first = paths[0]
    for path in paths[1:]:
        if found[path] != found[first]:
            raise ArgumentError(
                f"{first} and {path}: have different labels, {_describe(found[first])} and {_describe(found[path])}; "
                "choose a file with labels_file",
                "labels_file",
            )
    logger.info(f"Labels: {first}")
    return found[first]


def _parse_labels(content: Any, path: Path) -> tuple[dict[str, Any], int | None]:
    """Return the classes to evaluate and the value to ignore from the content of a ``dataset.json``.

    Raises:
        UserError: If it has no labels, or not in the format of nnU-Net v2.
    """
    if not isinstance(content, dict) or not content.get("labels"):
        raise ArgumentError(f"{path}: has no 'labels', which name the classes; give another labels_file", "labels_file")
    try:
        spelt = {"labels": read_labels(content, str(path))}
    except UserError as error:
        raise ArgumentError(f"{error}, or give another labels_file", "labels_file") from error
    labels, ignore = foreground_labels(spelt), ignore_label(spelt)
    if not labels:
        raise ArgumentError(
            f"{path}: its 'labels' name no class but the background; give another labels_file", "labels_file"
        )
    return labels, ignore


def _describe(labels: tuple[dict[str, Any], int | None]) -> str:
    classes, ignore = labels
    names = [f"{name} {value}" for name, value in classes.items()]
    return ", ".join(names if ignore is None else [*names, f"ignore {ignore}"])


def _labels_as_found(predictions: Path, references: Path) -> dict[str, int]:
    """Return every value of the segmentations except 0 as a class of that name."""
    values: set[int] = set()
    for folder in (predictions, references):
        for path in find_segmentations(folder).values():
            values |= {int(value) for value in np.unique(read_segmentation(path).values)}
            if len(values) > MOST_CLASSES:
                raise ArgumentError(
                    f"{path}: with this file, there are more than {MOST_CLASSES} different values, so these seem to be "
                    "images; give segmentations, or labels_file to name the classes",
                    "labels_file",
                )
    labels = {str(value): value for value in sorted(values - {0})}
    if not labels:
        raise ArgumentError(
            f"{predictions}, {references}: contain background only; name the classes with labels_file", "labels_file"
        )
    logger.info(
        f"No dataset.json found: the classes are the values {', '.join(labels)}; a dataset.json would name them"
    )
    return labels
