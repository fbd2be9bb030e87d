"""Segmentations of the same slice side by side: the reference, scratch and every arm.

The cases with the lowest, the median and the highest gain are shown, so that failures appear too and nobody chooses cases by eye.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnssl.palette import ON_IMAGES as COLOURS

OPACITY = 0.45
PANEL_INCHES = 1.9
FONT_SIZE = 8


@dataclass(frozen=True)
class SegmentedCase:
    """A case with its reference and the predictions of several arms.

    Attributes:
        name: Name of the case.
        volume: Intensities (z, y, x).
        spacing_mm: Spacing (z, y, x) in mm.
        reference: Class values (z, y, x) of the reference.
        predictions: Class values (z, y, x) by arm, in the order in which they are shown.
        notes: Short text below each prediction by arm, such as its Dice.
    """

    name: str
    volume: Float[np.ndarray, "z y x"]
    spacing_mm: tuple[float, float, float]
    reference: Integer[np.ndarray, "z y x"]
    predictions: dict[str, Integer[np.ndarray, "z y x"]]
    notes: dict[str, str]


def choose_cases(gains: Mapping[str, float]) -> list[str]:
    """Return the cases with the lowest, the median and the highest gain; fewer where there are fewer.

    Args:
        gains: Difference in Dice from scratch by case.
    """
    order = sorted(gains, key=lambda case: (gains[case], case))
    places = sorted({0, (len(order) - 1) // 2, len(order) - 1}) if order else []
    return [order[place] for place in places]


def shown_slice(reference: Integer[np.ndarray, "z y x"], spacing_mm: Sequence[float]) -> tuple[int, int]:
    """Return the axis with the thickest slices, and its slice with the most foreground in the reference.

    Without any foreground, the middle slice is returned.
    """
    axis = int(np.argmax(spacing_mm)) if min(reference.shape) > 1 else int(np.argmin(reference.shape))
    others = tuple(other for other in range(3) if other != axis)
    counts = (reference > 0).sum(axis=others)
    return axis, int(np.argmax(counts)) if counts.any() else reference.shape[axis] // 2


def segmentation_figure(cases: Sequence[SegmentedCase], labels: Mapping[str, int], title: str) -> Figure:
    """Draw one row per case with the image, the reference and the segmentation of every arm.

    Args:
        cases: Cases with the same arms.
        labels: Value of each class.
        title: Title of the figure.
    """
    arms = list(cases[0].predictions)
    columns = ["image", "reference", *arms]
    figure = Figure(
        figsize=(PANEL_INCHES * len(columns) + 0.3, (PANEL_INCHES + 0.45) * len(cases) + 0.9), layout="constrained"
    )
    figure.suptitle(title, fontsize=FONT_SIZE + 2)
    panels = figure.subplots(len(cases), len(columns), squeeze=False)
    colours = {value: COLOURS[place % len(COLOURS)] for place, value in enumerate(labels.values())}
    for number, (row, case) in enumerate(zip(panels, cases, strict=True)):
        axis, place = shown_slice(case.reference, case.spacing_mm)
        maps = {"image": None, "reference": case.reference, **case.predictions}
        for axes, column in zip(row, columns, strict=True):
            segmentation = maps[column]
            draw_slice(axes, case, axis, place, segmentation, colours)
            axes.set_title("" if number else column, fontsize=FONT_SIZE)
            axes.set_xlabel(case.notes.get(column, ""), fontsize=FONT_SIZE)
        row[0].set_ylabel(case.name, fontsize=FONT_SIZE)
        row[0].set_xlabel(f"slice {place} across {'zyx'[axis]}", fontsize=FONT_SIZE)
    handles = [Patch(color=colours[value], alpha=0.8, label=name) for name, value in labels.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=FONT_SIZE, frameon=False
    )
    return figure


def draw_slice(
    axes: Any,
    case: SegmentedCase,
    axis: int,
    place: int,
    segmentation: Integer[np.ndarray, "z y x"] | None,
    colours: Mapping[int, str],
) -> None:
    """Draw a slice overlaid with a segmentation, filled and outlined so that it is readable without colour."""
    image = case.volume.take(place, axis)
    low, high = np.percentile(image, (1, 99))
    down, across = (length for other, length in enumerate(case.spacing_mm) if other != axis)
    options = {"aspect": down / across, "origin": "upper" if axis == 0 else "lower", "interpolation": "nearest"}
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **options)
    axes.set_xticks([])
    axes.set_yticks([])
    if segmentation is None:
        return
    shown = segmentation.take(place, axis)
    overlay = np.zeros((*shown.shape, 4))
    for value, colour in colours.items():
        overlay[shown == value] = (*to_rgb(colour), OPACITY)
    axes.imshow(overlay, **options)
    for value, colour in colours.items():
        if (shown == value).any() and not (shown == value).all():
            axes.contour(shown == value, levels=[0.5], colors=[colour], linewidths=0.9)
