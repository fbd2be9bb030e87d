"""How planes of a preprocessed case are turned for display: as radiologists see them, for every orientation of the image.

Anterior or superior is on top, and the patient's right, or anterior in a sagittal plane, is on the left of the picture.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
ROWS = ("SI", "AP", "RL")
"""Pairs of directions in the order in which they are chosen for the vertical axis of a picture."""
TOP, LEFT = "SA", "AR"
"""Directions that belong on top, and on the left."""
AS_STORED = "Slices are shown as stored, because the orientation of the images is not known"
AS_SEEN = "Slices are shown with anterior or superior on top and the patient's right on the left"


class PlaneView(NamedTuple):
    """How a plane of a stored volume is shown.

    Attributes:
        swapped: Whether its rows are shown as columns.
        first_on_top: Whether the first of the shown rows is on top.
        first_on_left: Whether the first of the shown columns is on the left.
    """

    swapped: bool
    first_on_top: bool
    first_on_left: bool

    def image(self, plane: Shaped[np.ndarray, "down across *colour"]) -> Shaped[np.ndarray, "row column *colour"]:
        """Return a plane with the rows and columns of the picture."""
        return plane.swapaxes(0, 1) if self.swapped else plane

    def pair(self, down: float, across: float) -> tuple[float, float]:
        """Return two values of the stored axes, such as lengths or a point, as (vertical, horizontal) of the picture."""
        return (across, down) if self.swapped else (down, across)


def view_plane(orientation: str, axis: int) -> PlaneView:
    """Return how the planes perpendicular to an axis are shown.

    Args:
        orientation: Directions in which the three axes of the volume increase, such as ``SPL``; empty if unknown.
        axis: Axis of the volume, 0 to 2.

    Returns:
        For a known orientation the view of radiologists; otherwise, the first row of a slice is on top, and the first slice at
        the bottom of the other planes.
    """
    if not orientation:
        return PlaneView(False, axis == 0, True)
    down, across = (letter for other, letter in enumerate(orientation) if other != axis)
    swapped = _rank(across) < _rank(down)
    vertical, horizontal = (across, down) if swapped else (down, across)
    # an axis that increases towards the bottom begins at the top
    return PlaneView(swapped, OPPOSITE[vertical] in TOP, OPPOSITE[horizontal] in LEFT)


def describe_views(orientation: str) -> str:
    """Return one line on how slices are shown."""
    return AS_SEEN if orientation else AS_STORED


def _rank(letter: str) -> int:
    return next(place for place, pair in enumerate(ROWS) if letter in pair)
