"""The bounding box of a mask."""

import numpy as np
from jaxtyping import Bool


def find_box(mask: Bool[np.ndarray, "*shape"]) -> tuple[slice, ...]:
    """Return the smallest box that contains all True elements of a mask.

    Args:
        mask: Mask of any dimension with at least one True element.

    Returns:
        One slice for each axis, so that ``mask[box]`` is the content of the box.
    """
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)
