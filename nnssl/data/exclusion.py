"""Masks of the user in which nothing may be learned: one image for each case, nonzero where it is excluded.

A mask is named like a label of nnU-Net, ``<case>`` and the file ending of the data set, and has the geometry of its image. For a
data set of DICOM series, masks end in ``.nii.gz``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from nnssl.data.case_error import CaseError
from nnssl.data.dicom_series import DICOM_READER
from nnssl.data.image_files import Header, read_file_header, read_segmentation
from nnssl.data.raw import RawCase, RawDataset
from nnssl.errors import ArgumentError, UserError
from nnssl.files import some
from nnssl.log import logger

TOLERANCE_MM = 1e-3
"""Largest difference in spacing and origin, which hides the rounding of file formats."""
DICOM_MASKS = (".nii.gz", "SimpleITKIO")
"""File ending and reader of the masks of DICOM series."""


def find_exclusion_masks(folder: Path | None, dataset: RawDataset) -> dict[str, Path]:
    """Return the masks of a data set by case. Cases without a mask and files without a case are printed.

    Args:
        folder: Folder of the masks; None if there are none.
        dataset: Raw data set.

    Raises:
        ArgumentError: If the folder does not exist or has no mask of any case.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ArgumentError(
            f"exclude_mask must be a folder of masks, got {folder}, which does not exist", "exclude_mask"
        )
    ending = mask_format(dataset.reader, dataset.file_ending)[0]
    names = {case.name for case in dataset.cases}
    masks, unknown = {}, []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        name = path.name[: -len(ending)]
        if path.name.endswith(ending) and name in names:
            masks[name] = path
        else:
            unknown.append(path.name)
    if not masks:
        raise ArgumentError(
            f"exclude_mask must contain masks named <case>{ending} for cases of {dataset.name}, got {folder} without any",
            "exclude_mask",
        )
    logger.info(f"{folder}: excluding regions of {len(masks)} cases; {len(names) - len(masks)} cases have no mask")
    if unknown:
        logger.info(f"{folder}: {len(unknown)} files belong to no case of {dataset.name} ({some(unknown)})")
    return masks


def mask_format(reader: str, ending: str = "") -> tuple[str, str]:
    """Return the file ending and the reader of masks, given those of the images."""
    return DICOM_MASKS if reader == DICOM_READER else (ending, reader)


def check_exclusion_mask(case: RawCase, mask: Path, reader: str) -> None:
    """Check that a mask has the geometry of its image, from their headers.

    Raises:
        UserError: If it does not, or if the mask cannot be read.
    """
    try:
        image = read_file_header(case.images[0], reader)
    except CaseError:
        return  # preprocessing sets the case aside
    try:
        found = read_file_header(mask, mask_format(reader)[1], is_segmentation=True)
    except CaseError as error:
        raise UserError(f"exclusion mask {error}; replace it") from error
    for what, wanted, got in _differences(image, found):
        raise UserError(
            f"exclusion mask {mask}: {what} must be {wanted}, as in {case.images[0].name}, got {got}; resample the mask to the "
            "grid of the image"
        )


def read_exclusion_mask(mask: Path, reader: str) -> Bool[np.ndarray, "z y x"]:
    """Return where a mask is not 0.

    Args:
        mask: File of the mask.
        reader: Name of the reader class of the images.

    Raises:
        UserError: If the mask cannot be read.
    """
    try:
        values, _ = read_segmentation(mask, mask_format(reader)[1])
    except CaseError as error:
        raise UserError(f"exclusion mask {error}; replace it") from error
    return values[0] != 0


def _differences(image: Header, mask: Header) -> list[tuple[str, object, object]]:
    """Return what differs, with the values of image and mask; an origin or orientation that a format lacks is not compared."""
    differences: list[tuple[str, object, object]] = []
    if mask.channels != 1:
        differences.append(("number of channels", 1, mask.channels))
    if image.shape != mask.shape:
        differences.append(("shape (z, y, x)", image.shape, mask.shape))
    for what, wanted, got in (
        ("spacing (z, y, x) in mm", image.spacing_mm, mask.spacing_mm),
        ("origin (x, y, z) in mm", image.origin_mm, mask.origin_mm),
    ):
        if wanted and got and not np.allclose(wanted, got, rtol=0, atol=TOLERANCE_MM):
            differences.append((what, _rounded(wanted), _rounded(got)))
    if image.orientation and mask.orientation and image.orientation != mask.orientation:
        differences.append(("orientation", image.orientation, mask.orientation))
    return differences


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
