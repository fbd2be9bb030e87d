"""Places of a case that a picture shows: the middle of its body, the slice with the most body, or the user's choice.

Points are (z, y, x) in voxels of the preprocessed case.
"""

import numpy as np

from nnssl.data.case_store import StoredCase
from nnssl.errors import UserError

Voxel = tuple[int, int, int]
"""(z, y, x) in voxels of the preprocessed case."""


def choose_centre(case: StoredCase, slice_vox: int | None, two_dimensional: bool, otherwise: str) -> Voxel:
    """Return the voxel in which the planes of a picture intersect, or which lies in the slice of a 2D network.

    Args:
        case: The case.
        slice_vox: z of the slice for a 2D network; None for the slice with the most body.
        two_dimensional: Whether the network takes slices.
        otherwise: Text for the error message: what the picture of a 3D network shows.

    Raises:
        UserError: If the slice lies outside the case, or the network is not 2D.
    """
    if slice_vox is not None and not two_dimensional:
        raise UserError(f"slice {slice_vox}: these weights are 3D and show {otherwise}; omit the slice")
    centre = middle_of(case)
    if two_dimensional:
        centre = (fullest_slice(case) if slice_vox is None else slice_vox, centre[1], centre[2])
    return check_point(case, centre)


def check_point(case: StoredCase, point_vox: Voxel) -> Voxel:
    """Check that a point lies inside a case, and return the point.

    Raises:
        UserError: If the point lies outside the case.
    """
    if any(not 0 <= place < extent for place, extent in zip(point_vox, case.shape, strict=True)):
        point, shape = " ".join(map(str, point_vox)), " ".join(map(str, case.shape))
        raise UserError(
            f"point {point}: lies outside case {case.name}, whose shape (z y x, preprocessed) is {shape}; count from 0"
        )
    return point_vox


def middle_of(case: StoredCase) -> Voxel:
    """Return the stored body voxel nearest to the mean of all in mm; without any, the centre of the case."""
    points = case.foreground_vox.astype(np.float64)
    if not len(points):
        z, y, x = (extent // 2 for extent in case.shape)
        return z, y, x
    distance_mm = np.linalg.norm((points - points.mean(axis=0)) * case.spacing_mm, axis=1)
    z, y, x = case.foreground_vox[int(distance_mm.argmin())].tolist()
    return z, y, x


def fullest_slice(case: StoredCase) -> int:
    """Return z of the slice with the most stored body voxels; without any, that of the middle slice."""
    points = case.foreground_vox
    return int(np.bincount(points[:, 0]).argmax()) if len(points) else case.shape[0] // 2
