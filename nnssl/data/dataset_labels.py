"""Labels in a ``dataset.json``: every spelling whose meaning is plain, and what nnU-Net needs for training.

Source: nnU-Net's ``LabelManager`` (Isensee et al., Nature Methods 2021): a label is a whole number, a region a list of them, and
``ignore`` the value of voxels that nobody annotated.
Deviations: nnU-Net requires names as keys and whole numbers as values. Here, values as keys (the Decathlon's format), a list of
names, numbers in quotation marks, a region of one value and a missing background are read too, and written as nnU-Net requires.
"""

import re
from collections.abc import Mapping
from typing import Any

from nnssl.errors import UserError

Labels = dict[str, int | list[int]]

BACKGROUND, IGNORE = "background", "ignore"


def is_whole(value: Any) -> bool:
    """Return whether a value of a JSON file is a whole number, possibly in quotation marks."""
    if isinstance(value, str):
        return re.fullmatch(r"\s*[+-]?[0-9]+\s*", value) is not None
    return not isinstance(value, bool) and isinstance(value, (int, float)) and float(value).is_integer()


def read_labels(content: Mapping[str, Any], source: str) -> Labels:
    """Return the labels of a ``dataset.json`` by name, background first, as nnU-Net requires them.

    Args:
        content: Content of the file.
        source: What is being read (a path), for the error message.

    Returns:
        A value for each label, an ascending list of several values for each region.

    Raises:
        UserError: If the labels are missing, or their meaning is not plain.
    """
    labels = content.get("labels")
    if isinstance(labels, list) and labels and all(isinstance(name, str) for name in labels):
        if labels[0].lower() != BACKGROUND:
            raise UserError(
                f'{source}: labels as a list must begin with "{BACKGROUND}", the label of value 0, got "{labels[0]}"; write '
                f'{{"{BACKGROUND}": 0, "{labels[0]}": 1}}'
            )
        labels = {name: value for value, name in enumerate(labels)}
    if not isinstance(labels, dict) or not labels:
        raise UserError(
            f'{source}: labels must have the form {{"{BACKGROUND}": 0, NAME: VALUE, ...}}, got {labels!r}; correct the file'
        )
    if all(map(is_whole, labels)) and not any(map(_is_value, labels.values())):
        labels = _swapped(labels, source)
    named = {
        BACKGROUND if name.lower() == BACKGROUND else name: _value(name, value, source)
        for name, value in labels.items()
    }
    if len(named) < len(labels):
        raise UserError(f'{source}: labels must name "{BACKGROUND}" once, got {", ".join(labels)}; correct the file')
    _check_background(named, source)
    return {BACKGROUND: 0, **named}


def label_values(labels: Mapping[str, int | list[int]]) -> set[int]:
    """Return all values of labels and regions, the ignore label's included."""
    return {value for own in labels.values() for value in (own if isinstance(own, list) else [own])}


def read_class_order(content: Mapping[str, Any], labels: Labels, source: str) -> list[int] | None:
    """Return ``regions_class_order`` of a ``dataset.json``: the value that each region writes, in order; None without regions.

    Args:
        content: Content of the file.
        labels: Labels as ``read_labels`` returns them.
        source: What is being read (a path), for the error message.

    Raises:
        UserError: If there are regions, and the order is missing or does not suit them.
    """
    if not any(isinstance(value, list) for value in labels.values()):
        return None
    wanted = [name for name, value in labels.items() if name != IGNORE and value != 0]
    order = content.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(wanted) or not all(map(is_whole, order)):
        raise UserError(
            f"{source}: regions_class_order must list one value for each of the {len(wanted)} regions ({', '.join(wanted)}), "
            f"larger regions first, got {order!r}; correct the file"
        )
    unknown = [int(value) for value in order if int(value) not in label_values(labels)]
    if unknown:
        raise UserError(
            f"{source}: regions_class_order must contain values of labels only, got {unknown[0]}; correct the file"
        )
    return [int(value) for value in order]


def check_trainable(labels: Labels, source: str) -> None:
    """Check that nnU-Net can be trained on labels.

    Raises:
        UserError: If there is nothing but background, the ignore label is not the highest value, or, without regions, values
            occur twice or have gaps.
    """
    classes = {name: value for name, value in labels.items() if name != IGNORE and value != 0}
    if not classes:
        raise UserError(f"{source}: labels name no structure but the background; add the structures' names and values")
    values = sorted(label_values({name: value for name, value in labels.items() if name != IGNORE}))
    if not any(isinstance(value, list) for value in labels.values()):
        listed = ", ".join(f"{name}: {value}" for name, value in labels.items())
        if len(values) < len(classes) + 1:
            raise UserError(f"{source}: labels must have different values, got {listed}; correct the file")
        if values != list(range(len(values))):
            raise UserError(
                f"{source}: labels must have the values 0, 1, 2, ... without gaps, got {listed}; number them consecutively here "
                "and in the label files"
            )
    if IGNORE in labels and labels[IGNORE] != values[-1] + 1:
        raise UserError(
            f"{source}: the label {IGNORE} must have the value {values[-1] + 1}, one more than the highest label, got "
            f"{labels[IGNORE]}; correct it here and in the label files"
        )


def _is_value(value: Any) -> bool:
    return any(map(is_whole, value)) if isinstance(value, list) else is_whole(value)


def _swapped(labels: Mapping[str, Any], source: str) -> dict[str, int]:
    """Return labels that were written with the values as keys, as in the Decathlon and nnU-Net v1."""
    wrong = [name for name in labels.values() if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise UserError(f"{source}: labels must have names, got {wrong[0]!r}; correct the file")
    names = list(labels.values())
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f'{source}: labels must have different names, got "{twice[0]}" twice; correct the file')
    return {name: int(value) for value, name in labels.items()}


def _value(name: str, value: Any, source: str) -> int | list[int]:
    """Return the value of one label, or the values of one region."""
    several = value if isinstance(value, list) else [value]
    if not several or not all(is_whole(each) and int(each) >= 0 for each in several):
        what = "whole numbers of at least 0" if isinstance(value, list) else "a whole number of at least 0"
        raise UserError(f'{source}: the label "{name}" must have {what} as its value, got {value!r}; correct the file')
    if name == IGNORE and len(several) > 1:
        raise UserError(f'{source}: the label "{IGNORE}" must have a single value, got {value!r}; correct the file')
    values = sorted({int(each) for each in several})
    return values[0] if len(values) == 1 else values


def _check_background(labels: Labels, source: str) -> None:
    """Check that 0 is the background and nothing else.

    Raises:
        UserError: If it is not.
    """
    if labels.get(BACKGROUND, 0) != 0:
        raise UserError(f'{source}: the label "{BACKGROUND}" must be 0, got {labels[BACKGROUND]}; correct the file')
    other = [name for name, value in labels.items() if name != BACKGROUND and value == 0]
    if other:
        raise UserError(
            f'{source}: the value 0 must be that of the label "{BACKGROUND}", got "{other[0]}: 0"; rename the label, or give its '
            "voxels another value"
        )
