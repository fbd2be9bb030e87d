"""Segmentations on disk: finding them in a folder, reading voxels and spacing, and comparing the geometry of two files.

Every format that nnU-Net writes can be read, with the spacing that nnU-Net uses: that of the header or, for a TIFF, of the
``.json`` file of the same name; 1 for pictures that have neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from nnssl.data.case_error import CaseError
from nnssl.data.image_files import ENDINGS, PICTURE_ENDINGS, check_finite, ending_of
from nnssl.data.whole_files import check_whole
from nnssl.errors import UserError
from nnssl.files import read_json

TIFF = (".tiff", ".tif")
GEOMETRY_TOLERANCE = 1e-3
"""Difference of spacing (relative), origin (voxels) and direction that is attributed to rounding."""


@dataclass(frozen=True)
class Segmentation:
    """The class values of an image and its geometry.

    Attributes:
        values: Class values (z, y, x), or (y, x) for a 2D image.
        spacing_mm: Spacing in mm in the order of the array's axes.
        origin: Origin in mm in ITK's order (x, y, z).
        direction: Rows of ITK's direction matrix, flattened.
    """

    values: Integer[np.ndarray, "*shape"]
    spacing_mm: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


def find_segmentations(folder: Path) -> dict[str, Path]:
    """Return the segmentations of a folder by case; hidden files and files of other kinds are skipped.

    If the folder has a ``dataset.json``, as nnU-Net and ``nnssl_propagate`` write it beside segmentations, only files with the
    file ending that it names count, so that a picture beside them is not taken for a segmentation.

    Raises:
        UserError: If the folder does not exist, contains no segmentation, or has two files for one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: this folder does not exist; check the path")
    found: dict[str, Path] = {}
    ending = _named_ending(folder)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(ENDINGS if ending is None else ending):
            continue
        name = case_name(path)
        if name in found:
            raise UserError(f"{folder}: has two files for {name}, {found[name].name} and {path.name}; keep one")
        found[name] = path
    if not found and ending is not None:
        raise UserError(
            f"{folder}: contains no file ending in {ending}, which its dataset.json names; correct file_ending there"
        )
    if not found:
        raise UserError(f"{folder}: contains no segmentation ({', '.join(ENDINGS)}); give another folder")
    return found


def _named_ending(folder: Path) -> str | None:
    """Return the file ending that the ``dataset.json`` of a folder names, in lower case; None if it names no known one."""
    try:
        content = read_json(folder / "dataset.json", "dataset.json")
    except UserError:
        return None  # its labels are read elsewhere, with an error if they cannot be
    ending = content.get("file_ending") if isinstance(content, Mapping) else None
    return ending.lower() if isinstance(ending, str) and ending.lower() in ENDINGS else None


def case_name(path: Path) -> str:
    """Return the name of a file without its extension."""
    return path.name.removesuffix(ending_of(path))


def read_segmentation(path: Path) -> Segmentation:
    """Read one segmentation.

    Raises:
        UserError: If the file is truncated or unreadable, does not have 2 or 3 axes, has several values per voxel, or
            contains NaN or fractions.
    """
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    try:
        # ITK silently reads the missing part of a truncated file, and NaN in a NIfTI file, as zeros.
        check_whole(path)
        check_finite(path)
        image = sitk.ReadImage(str(path))
    except CaseError as error:
        raise UserError(f"{error}; copy or predict it again") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: cannot be read ({reason}); copy or predict it again") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: has {image.GetNumberOfComponentsPerPixel()} values per voxel; give one class value")
    if image.GetDimension() not in (2, 3):
        raise UserError(f"{path}: has {image.GetDimension()} axes; give an image with 2 or 3")
    values = sitk.GetArrayFromImage(image)
    if values.dtype.kind == "f":
        if not np.array_equal(values, np.rint(values)):
            raise UserError(
                f"{path}: contains fractions, so it is not a segmentation; give an image of integer class values"
            )
        values = values.astype(np.int64)
    if path.name.lower().endswith(PICTURE_ENDINGS):
        axes = values.ndim
        return Segmentation(
            values, _picture_spacing_mm(path, axes), (0.0,) * axes, tuple(np.eye(axes).ravel().tolist())
        )
    return Segmentation(values, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


def _picture_spacing_mm(path: Path, axes: int) -> tuple[float, ...]:
    """Return the spacing from the file that nnU-Net writes beside a 3D TIFF, or 1 without such a file.

    Raises:
        UserError: If the file does not have nnU-Net's format.
    """
    beside = path.with_name(f"{case_name(path)}.json")
    if not path.name.lower().endswith(TIFF) or not beside.exists():
        return (1.0,) * axes
    content = read_json(beside, "spacing of a TIFF")
    spacing = content.get("spacing") if isinstance(content, Mapping) else None
    if (
        not isinstance(spacing, list)
        or len(spacing) != axes
        or not all(isinstance(mm, (int, float)) and mm > 0 for mm in spacing)
    ):
        raise UserError(f"{beside}: has no 'spacing' of {axes} numbers above 0 for {path.name}; correct it")
    return tuple(map(float, spacing))


def check_same_geometry(prediction: Path, predicted: Segmentation, reference: Path, true: Segmentation) -> None:
    """Check that two images have the same geometry.

    Raises:
        UserError: If their size, spacing, origin or direction differ.
    """
    if predicted.values.shape != true.values.shape:
        axes = "(z, y, x)" if predicted.values.ndim == 3 else "(y, x)"
        raise UserError(
            f"{prediction}: has {predicted.values.shape} voxels {axes}, its reference {reference} has "
            f"{true.values.shape}; resample one to the other"
        )
    spacing = np.array(true.spacing_mm)
    shift_vox = np.abs(np.subtract(predicted.origin, true.origin)) / spacing[::-1]
    wrong = [
        name
        for name, differs in (
            ("spacing", not np.allclose(predicted.spacing_mm, spacing, rtol=GEOMETRY_TOLERANCE)),
            ("origin", bool((shift_vox > GEOMETRY_TOLERANCE).any())),
            ("direction", not np.allclose(predicted.direction, true.direction, atol=GEOMETRY_TOLERANCE)),
        )
        if differs
    ]
    if wrong:
        raise UserError(
            f"{prediction}: differs in {' and '.join(wrong)} from its reference {reference}; resample one to the other"
        )
