"""Reading ``dataset.json`` of a raw data set and completing it as nnU-Net requires."""

import copy
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.log import logger

NO_LABELS = {"background": 0, "foreground": 1}
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


def channel_names_in(content: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the channel names of a dataset.json in channel order, or None if it names no channels."""
    names = content.get("channel_names") or content.get("modality")
    if not names:
        return None
    return tuple(str(names[channel]) for channel in sorted(names, key=int))


def complete_dataset_json(
    content: dict[str, Any], ending: str, names: tuple[str, ...], cases: int, dataset: str
) -> dict[str, Any]:
    """Return the content of a dataset.json, completed so that nnU-Net accepts it."""
    completed = copy.deepcopy(content)
    completed.pop("modality", None)
    completed["channel_names"] = {str(channel): name for channel, name in enumerate(names)}
    labels = completed.get("labels")
    if isinstance(labels, dict) and "background" not in labels and all(str(key).isdecimal() for key in labels):
        completed["labels"] = labels = {
            str(name): int(value) for value, name in labels.items()
        }  # the Decathlon's format
    if not isinstance(labels, dict) or "background" not in labels:
        completed["labels"] = dict(NO_LABELS)
    if completed.get("numTraining", cases) != cases:
        logger.info(
            f"{dataset}: numTraining in dataset.json is {completed['numTraining']}, but {cases} cases are usable"
        )
    completed["numTraining"] = cases
    completed["file_ending"] = ending
    return completed
