"""Segmentations on disk: which files of a folder are some, their voxels with spacing, and whether two show the same place.

Every format that nnU-Net writes is read, with the spacing that nnU-Net takes for it: from the header; for a TIFF from the
``.json`` of the same name beside it; 1 for pictures without either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from nnssl.data.case_error import CaseError
from nnssl.data.image_files import ENDINGS, PICTURE_ENDINGS, check_finite, check_whole, ending_of
from nnssl.errors import UserError
from nnssl.files import read_json

TIFF = (".tiff", ".tif")
GEOMETRY_TOLERANCE = 1e-3
"""Difference of spacing (relative), origin (voxels) and direction that is put down to rounding."""


@dataclass(frozen=True)
class Segmentation:
    """The classes of the voxels of an image, and where they are.

    Attributes:
        values: (z, y, x), or (y, x) of a 2D image.
        spacing_mm: in the order of the array's axes.
        origin: in mm, (x, y, z) as ITK has it.
        direction: rows of the matrix of ITK.
    """

    values: Integer[np.ndarray, "*shape"]
    spacing_mm: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


def find_segmentations(folder: Path) -> dict[str, Path]:
    """Return the segmentations of a folder by case; hidden files and files of other kinds are passed over.

    Raises:
        UserError: there is no such folder, it holds none, or a case has two files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give one with segmentations")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(ENDINGS):
            continue
        name = case_name(path)
        if name in found:
            raise UserError(f"{folder}: has two files of {name}, {found[name].name} and {path.name}; keep one")
        found[name] = path
    if not found:
        raise UserError(f"{folder}: holds no segmentation ({', '.join(ENDINGS)}); give another folder")
    return found


def case_name(path: Path) -> str:
    """Return the name of a file without its ending."""
    return path.name.removesuffix(ending_of(path))


def read_segmentation(path: Path) -> Segmentation:
    """Read one segmentation.

    Raises:
        UserError: the file is cut short or cannot be read, has other than 2 or 3 axes or several values per voxel, or
            holds NaN or fractions.
    """
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    try:
        # ITK returns zeros for what is missing in a cut file, and for NaN in a NIfTI: classes lost without a word
        check_whole(path)
        check_finite(path)
        image = sitk.ReadImage(str(path))
    except CaseError as error:
        raise UserError(f"{error}; copy or predict it again") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: cannot be read ({reason}); copy or predict it again") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: has {image.GetNumberOfComponentsPerPixel()} values per voxel; give one, the class")
    if image.GetDimension() not in (2, 3):
        raise UserError(f"{path}: has {image.GetDimension()} axes; give an image of 2 or 3")
    values = sitk.GetArrayFromImage(image)
    if values.dtype.kind == "f":
        if not np.array_equal(values, np.rint(values)):
            raise UserError(f"{path}: holds fractions, so it is no segmentation; give whole numbers, the classes")
        values = values.astype(np.int64)
    if path.name.lower().endswith(PICTURE_ENDINGS):
        axes = values.ndim
        return Segmentation(
            values, _picture_spacing_mm(path, axes), (0.0,) * axes, tuple(np.eye(axes).ravel().tolist())
        )
    return Segmentation(values, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


def _picture_spacing_mm(path: Path, axes: int) -> tuple[float, ...]:
    """Return the spacing in the file that nnU-Net writes beside a 3D TIFF, else 1.

    Raises:
        UserError: that file is not what nnU-Net writes.
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
        raise UserError(f"{beside}: has no 'spacing' of {axes} numbers above 0 for {path.name}; write it again")
    return tuple(map(float, spacing))


def check_same_geometry(prediction: Path, predicted: Segmentation, reference: Path, true: Segmentation) -> None:
    """Check that two images show the same voxels of the world.

    Raises:
        UserError: their size, spacing, origin or direction differ; names the prediction.
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
