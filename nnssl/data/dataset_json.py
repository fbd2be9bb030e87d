"""Reading ``dataset.json`` of a raw data set and completing it as nnU-Net requires."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnssl.data.dataset_labels import Labels, check_trainable, is_whole, read_class_order, read_labels
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.log import logger

NO_LABELS: Labels = {"background": 0, "foreground": 1}
"""nnU-Net requires at least two labels in a dataset.json, even if the data set has no labels."""


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Return the content of dataset.json, or an empty dict if the file does not exist."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist, so the data set has no raw images; copy them there or set nnUNet_raw"
        )
    path = folder / "dataset.json"
    if not path.exists():
        logger.info(f"{folder.name} has no dataset.json; channels and file ending are inferred from the files")
        return {}
    content = read_json(path, "dataset.json")
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object ({{...}}), got {type(content).__name__}")
    return content


def channel_names_in(content: Mapping[str, Any], source: str = "dataset.json") -> tuple[str, ...] | None:
    """Return the channel names of a dataset.json in channel order, or None if it names no channels.

    They are called ``channel_names``, in nnU-Net v1 ``modality``. Besides ``{"0": "T1", "1": "T2"}``, a list of names, one name
    for a single channel, and names as keys (``{"T1": 0, "T2": 1}``) are read.

    Args:
        content: Content of the file.
        source: What is being read (a path), for the error message.

    Raises:
        UserError: If there are names, but which channel has which name is not plain.
    """
    key = "channel_names" if content.get("channel_names") else "modality"
    names = content.get(key)
    if not names:
        return None
    if isinstance(names, str):
        names = [names]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if isinstance(names, dict) and not all(map(_is_channel, names)) and all(map(_is_channel, names.values())):
        swapped = {int(channel): name for name, channel in names.items()}
        names = swapped if len(swapped) == len(names) else None
    if isinstance(names, dict) and all(map(_is_channel, names)) and all(map(_is_name, names.values())):
        order = sorted(names, key=int)
        if [int(channel) - int(order[0]) for channel in order] == list(range(len(order))) and int(order[0]) in (0, 1):
            return tuple(str(names[channel]) for channel in order)
    raise UserError(
        f'{source}: {key} must have the form {{"0": NAME, "1": NAME, ...}}, one name for each channel, got {content[key]!r}; '
        "correct the file"
    )


def read_labelled_json(path: Path) -> dict[str, Any]:
    """Read the dataset.json of a labelled data set, with channel names and labels spelt as nnU-Net requires.

    Args:
        path: File of the raw data set.

    Raises:
        UserError: If the file is missing or no dataset.json, lacks what nnU-Net needs for training, or names labels on which it
            cannot be trained.
    """
    return spell_labelled_json(read_json(path, "dataset.json of a labelled data set"), str(path))


def spell_labelled_json(content: Any, path: str) -> dict[str, Any]:
    """Return the content of the dataset.json of a labelled data set, spelt as nnU-Net requires.

    Args:
        content: Content of the file.
        path: What is being read, for the error message.

    Raises:
        UserError: As ``read_labelled_json``.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object ({{...}}), got {type(content).__name__}")
    for key in ("channel_names", "labels", "file_ending"):
        if not content.get(key) and not (key == "channel_names" and content.get("modality")):
            raise UserError(f"{path}: has no key {key!r}, which nnU-Net needs for training; add it")
    ending = content["file_ending"]
    if not isinstance(ending, str) or not ending.startswith("."):
        raise UserError(f'{path}: file_ending must be a text such as ".nii.gz", got {ending!r}; correct the file')
    names = channel_names_in(content, path) or ()
    labels = read_labels(content, path)
    check_trainable(labels, path)
    spelt = {
        **content,
        "channel_names": {str(channel): name for channel, name in enumerate(names)},
        "labels": labels,
    }
    spelt.pop("modality", None)
    order = read_class_order(content, labels, path)
    return spelt if order is None else {**spelt, "regions_class_order": order}


def complete_dataset_json(
    content: dict[str, Any], ending: str, names: tuple[str, ...], cases: int, dataset: str
) -> dict[str, Any]:
    """Return the content of a dataset.json, completed so that nnU-Net accepts it."""
    completed = copy.deepcopy(content)
    completed.pop("modality", None)
    completed["channel_names"] = {str(channel): name for channel, name in enumerate(names)}
    try:
        labels = read_labels(content, "dataset.json") if "labels" in content else dict(NO_LABELS)
        check_trainable(labels, "dataset.json")
        order = read_class_order(content, labels, "dataset.json")
        completed |= {"labels": labels} if order is None else {"labels": labels, "regions_class_order": order}
    except UserError as error:
        logger.info(f"{dataset}: {error}. Images are used without the labels")
        completed["labels"] = dict(NO_LABELS)
    if completed.get("numTraining", cases) != cases:
        logger.info(
            f"{dataset}: numTraining in dataset.json is {completed['numTraining']}, but {cases} cases are usable"
        )
    completed["numTraining"] = cases
    completed["file_ending"] = ending
    return completed


def _is_channel(value: Any) -> bool:
    return is_whole(value) and int(value) >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and bool(str(value).strip())
