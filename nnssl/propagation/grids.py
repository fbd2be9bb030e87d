"""Label maps on two grids: that of the image file, and that of its preprocessed case.

Source: nnU-Net's ``DefaultPreprocessor`` and ``convert_predicted_logits_to_segmentation_with_correct_shape``, whose resampling
functions are used: a label map is transposed, cropped to the nonzero voxels of the image and resampled, and the way back undoes
this.
Deviations: Probabilities are resampled one label at a time, which needs less memory and gives the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, UInt16

from nnssl.data.bounding_box import find_box
from nnssl.data.case_error import CaseError
from nnssl.data.case_store import StoredCase
from nnssl.data.image_files import read_images, read_segmentation
from nnssl.data.raw import RawCase
from nnssl.errors import UserError
from nnssl.plan import Plan

TOLERANCE = 1e-3
"""Difference of spacing and direction (relative), and of origin in voxels, that is attributed to rounding."""


@dataclass(frozen=True)
class LabelResampling:
    """How a configuration of a plan turns label maps into the preprocessed grid and probabilities back.

    Attributes:
        transpose_forward: Axes of the file in the order of the preprocessed case.
        labels: nnU-Net's function for label maps, called with (1, z, y, x), new shape, current spacing and new spacing.
        probabilities: nnU-Net's function for probabilities, called in the same way.
    """

    transpose_forward: tuple[int, ...]
    labels: Callable[..., Any] = field(repr=False)
    probabilities: Callable[..., Any] = field(repr=False)


@dataclass(frozen=True)
class ImageGrid:
    """The grid of an image file and its relation to the preprocessed case.

    Attributes:
        file: The first image file.
        shape: Shape (z, y, x) as read.
        spacing_mm: Spacing (z, y, x) as read, in mm.
        box: Bounding box of the nonzero voxels, in the order of the preprocessed case.
        properties: Properties that nnU-Net's reader returned and its writer needs.
    """

    file: Path
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    box: tuple[slice, ...]
    properties: dict[str, Any] = field(repr=False)


def resampling_of(plan: Plan, configuration: str) -> LabelResampling:
    """Return the resampling of label maps of a configuration of a plan."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # slow to import

    manager = PlansManager(plan.nnunet)
    chosen = manager.get_configuration(configuration)
    return LabelResampling(
        tuple(manager.transpose_forward), chosen.resampling_fn_seg, chosen.resampling_fn_probabilities
    )


def read_grid(case: RawCase, reader: str, resampling: LabelResampling) -> ImageGrid:
    """Read the images of a case and return their grid.

    Raises:
        UserError: If the images cannot be read or contain only zeros.
    """
    try:
        volume, properties = read_images(case.images, reader)
    except CaseError as error:
        raise UserError(f"{error}; repair the image, or remove the case") from error
    moved = volume.transpose(0, *(axis + 1 for axis in resampling.transpose_forward))
    nonzero = np.any(moved != 0, axis=0)
    if not nonzero.any():
        raise UserError(f"{case.images[0]}: contains only zeros; remove the case")
    spacing_mm = tuple(float(mm) for mm in properties["spacing"])
    return ImageGrid(case.images[0], volume.shape[1:], spacing_mm, find_box(nonzero), properties)


def read_labels(file: Path, reader: str, grid: ImageGrid) -> Int[np.ndarray, "z y x"]:
    """Read the label map of a case, whose geometry must be that of the image.

    Args:
        file: Label map.
        reader: Name of nnU-Net's reader class.
        grid: Grid of the image.

    Raises:
        UserError: If the file cannot be read, holds fractions, or has another geometry.
    """
    try:
        values, properties = read_segmentation(file, reader)
    except CaseError as error:
        raise UserError(f"{error}; repair the label map") from error
    if len(values) != 1 or not np.array_equal(values, np.rint(values)):
        raise UserError(f"{file}: is not a label map; give an image with one whole number per voxel")
    if values.shape[1:] != grid.shape:
        raise UserError(
            f"{file}: has {values.shape[1:]} voxels (z, y, x), but the image {grid.file} has {grid.shape}; annotate the image "
            "that lies in the data set, or resample the label map to it"
        )
    wrong = _differences(properties, grid)
    if wrong:
        raise UserError(
            f"{file}: differs in {' and '.join(wrong)} from the image {grid.file}; annotate the image that lies in the data "
            "set, or resample the label map to it"
        )
    return values[0].astype(np.int64)


def to_case(
    labels: Integer[np.ndarray, "z y x"], grid: ImageGrid, case: StoredCase, resampling: LabelResampling
) -> Int[np.ndarray, "z2 y2 x2"]:
    """Return a label map on the grid of the preprocessed case.

    Args:
        labels: Label map on the grid of the image.
        grid: That grid.
        case: The preprocessed case.
        resampling: Resampling of the plan.
    """
    order = resampling.transpose_forward
    cropped = labels.transpose(order)[grid.box].astype(np.float32)
    spacing_mm = [grid.spacing_mm[axis] for axis in order]
    found = resampling.labels(cropped[None], case.shape, spacing_mm, case.spacing_mm)
    return np.rint(np.asarray(found[0])).astype(np.int64)


def to_image(
    probabilities: Float[np.ndarray, "label z y x"], grid: ImageGrid, case: StoredCase, resampling: LabelResampling
) -> UInt16[np.ndarray, "z2 y2 x2"]:
    """Return the index of the most probable label on the grid of the image; 0 outside the crop to nonzero voxels.

    Args:
        probabilities: Probabilities on the grid of the preprocessed case, background first.
        grid: Grid of the image.
        case: The preprocessed case.
        resampling: Resampling of the plan.
    """
    order = resampling.transpose_forward
    spacing_mm = [grid.spacing_mm[axis] for axis in order]
    cropped = tuple(part.stop - part.start for part in grid.box)
    best, chosen = np.full(cropped, -np.inf, np.float32), np.zeros(cropped, np.uint16)
    for label, values in enumerate(probabilities):
        found = np.asarray(resampling.probabilities(values[None], cropped, case.spacing_mm, spacing_mm)[0])
        better = found > best
        best[better], chosen[better] = found[better], label
    moved = np.zeros([grid.shape[axis] for axis in order], np.uint16)
    moved[grid.box] = chosen
    return np.ascontiguousarray(moved.transpose(np.argsort(order)))


def check_preprocessed(grid: ImageGrid, case: StoredCase, resampling: LabelResampling) -> None:
    """Check that a preprocessed case belongs to the image as it is now.

    Raises:
        UserError: If the shape of the case does not follow from that of the image.
    """
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape  # slow to import

    spacing_mm = [grid.spacing_mm[axis] for axis in resampling.transpose_forward]
    cropped = tuple(part.stop - part.start for part in grid.box)
    expected = tuple(int(n) for n in compute_new_shape(cropped, spacing_mm, case.spacing_mm))
    if expected != tuple(case.shape):
        raise UserError(
            f"case {case.name}: its preprocessed voxels have the shape {tuple(case.shape)}, but those of {grid.file} would "
            f"have {expected}; run nnssl_plan_and_preprocess again"
        )


def _differences(properties: dict[str, Any], grid: ImageGrid) -> list[str]:
    """Return in what the geometry of a label map differs from that of the image."""
    wrong = []
    if not np.allclose([float(mm) for mm in properties["spacing"]], grid.spacing_mm, rtol=TOLERANCE):
        wrong.append("spacing")
    ours, theirs = (each.get("sitk_stuff") for each in (properties, grid.properties))
    if ours and theirs:
        shift_vox = np.abs(np.subtract(ours["origin"], theirs["origin"])) / np.array(theirs["spacing"])
        if (shift_vox > TOLERANCE).any():
            wrong.append("origin")
        if not np.allclose(ours["direction"], theirs["direction"], atol=TOLERANCE):
            wrong.append("direction")
    ours, theirs = (each.get("nibabel_stuff") for each in (properties, grid.properties))
    if ours and theirs and not wrong:
        affines = ours["original_affine"], theirs["original_affine"]
        if not np.allclose(*affines, atol=TOLERANCE * min(grid.spacing_mm)):
            wrong.append("origin or direction")
    return wrong
