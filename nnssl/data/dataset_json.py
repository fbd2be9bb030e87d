"""``dataset.json`` of a raw data set: what it says, and what nnU-Net wants it to say."""

import copy
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.log import logger

NO_LABELS = {"background": 0, "foreground": 1}
"""nnU-Net wants two labels at least in a dataset.json, also where nothing is labelled."""


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Return the content of dataset.json, or an empty dict where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: the data set has no raw images there; copy them or set nnUNet_raw")
    path = folder / "dataset.json"
    if not path.exists():
        logger.info(f"{folder.name}: no dataset.json, so channels and file ending are taken from the files")
        return {}
    content = read_json(path, "dataset.json")
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a {type(content).__name__}, not a dataset.json; it starts with {{")
    return content


def channel_names_in(content: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the channel names of a dataset.json in channel order, None if it has none."""
    names = content.get("channel_names") or content.get("modality")
    if not names:
        return None
    return tuple(str(names[channel]) for channel in sorted(names, key=int))


def complete_dataset_json(
    content: dict[str, Any], ending: str, names: tuple[str, ...], cases: int, dataset: str
) -> dict[str, Any]:
    """Return a dataset.json that nnU-Net accepts."""
    completed = copy.deepcopy(content)
    completed.pop("modality", None)
    completed["channel_names"] = {str(channel): name for channel, name in enumerate(names)}
    labels = completed.get("labels")
    if isinstance(labels, dict) and "background" not in labels and all(str(key).isdecimal() for key in labels):
        completed["labels"] = labels = {str(name): int(value) for value, name in labels.items()}  # the Decathlon's form
    if not isinstance(labels, dict) or "background" not in labels:
        completed["labels"] = dict(NO_LABELS)
    if completed.get("numTraining", cases) != cases:
        logger.info(f"{dataset}: dataset.json counts {completed['numTraining']} cases, {cases} can be used")
    completed["numTraining"] = cases
    completed["file_ending"] = ending
    return completed
