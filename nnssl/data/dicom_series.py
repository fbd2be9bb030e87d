"""A DICOM series as one image: a small file ``CASE.dcmseries`` lists its slices in order, and no voxel is copied.

Why a format of our own: no header-only format that nnU-Net's readers take decodes DICOM. MetaImage (``ElementDataFile =
LIST``) and NRRD (``data file: LIST``) can skip to raw bytes at the end of each slice, which is wrong without a word for
compressed slices, for rescale slopes and for what stands behind the pixels. So SimpleITK reads the slices themselves;
geometry and intensities are what its ``ImageSeriesReader`` gives.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nnssl.data.case_error import CaseError
from nnssl.errors import UserError
from nnssl.schema import STRICT, read

SERIES_ENDING = ".dcmseries"
SCHEMA_VERSION = 1

DICOM_READER = "DicomSeriesIO"
"""Name of the reader class in ``nnssl.data.dicom_reader``; nnU-Net has none of this name."""


@dataclass(frozen=True)
class Slice:
    """One file of a series."""

    __pydantic_config__: ClassVar = STRICT

    file: str
    """Below the folder of the series."""
    size_bytes: int
    """When it was imported; another size later is an error."""


@dataclass(frozen=True)
class DicomSeries:
    """What a series file says."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    series_uid: str
    modality: str
    """DICOM's code: CT, MR, PT."""
    description: str
    folder: str
    """Absolute; the slices lie below it."""
    slices: tuple[Slice, ...]
    """Two or more, in the order of their positions along the normal of the slices."""


def read_series(file: Path) -> DicomSeries:
    """Read a series file.

    Raises:
        CaseError: it is missing, damaged or of another version.
    """
    try:
        series = read(DicomSeries, file, "DICOM series file")
    except UserError as error:
        raise CaseError(str(file), f"is no readable series file ({error})") from error
    if len(series.slices) < 2:
        raise CaseError(str(file), "lists fewer than two slices; import it again")
    return series


def find_slices(file: Path) -> tuple[Path, ...]:
    """Return the slices of a series file in order, checked to be there with the size that they were imported with.

    Raises:
        CaseError: the series file cannot be read; or a slice is missing or has another size.
    """
    return check_slices(read_series(file))


def check_slices(series: DicomSeries) -> tuple[Path, ...]:
    """Return the slices of a series in order, checked as ``find_slices`` does."""
    paths = []
    for entry in series.slices:
        path = Path(series.folder) / entry.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CaseError(str(path), f"a slice of the series cannot be found ({error.strerror})") from error
        if size != entry.size_bytes:
            raise CaseError(str(path), f"has {size} bytes, {entry.size_bytes} when it was imported; import it again")
        paths.append(path)
    return tuple(paths)


def measure_series(series: DicomSeries) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Return the geometry of a series from the headers of its first and last slice.

    Returns:
        Shape (z, y, x) in voxels, spacing (z, y, x) in mm, and the directions towards which x, y and z grow ("LPS").

    Raises:
        CaseError: a slice is missing or its header cannot be read.
    """
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    paths = check_slices(series)
    first, last = read_slice_header(paths[0]), read_slice_header(paths[-1])
    extent_mm = float(np.linalg.norm(np.subtract(last.GetOrigin(), first.GetOrigin())))
    columns, rows = first.GetSize()[:2]
    spacing_x, spacing_y = first.GetSpacing()[:2]
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(first.GetDirection())
    return (len(paths), rows, columns), (extent_mm / (len(paths) - 1), spacing_y, spacing_x), orientation


def read_slice_header(file: Path) -> Any:
    """Return SimpleITK's reader of one DICOM file with the header read; voxels stay closed.

    Raises:
        CaseError: GDCM cannot read the file.
    """
    import SimpleITK as sitk  # noqa: N813

    header = sitk.ImageFileReader()
    header.SetImageIO("GDCMImageIO")
    header.SetFileName(str(file))
    try:
        header.ReadImageInformation()
    except RuntimeError as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise CaseError(str(file), f"cannot be read as a DICOM image ({reason})") from error
    return header


def stock_reader(reader: str) -> str:
    """Return the reader of nnU-Net to name in a plan: stock nnU-Net looks it up among its own."""
    return "SimpleITKIO" if reader == DICOM_READER else reader
