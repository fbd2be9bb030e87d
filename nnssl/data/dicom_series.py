"""A DICOM series as one image: a small file ``CASE.dcmseries`` lists its slices in order, so no voxels are copied.

nnssl defines its own format because none of the header-only formats that nnU-Net's readers accept can decode DICOM.
MetaImage (``ElementDataFile = LIST``) and NRRD (``data file: LIST``) can skip to the raw bytes at the end of each slice.
This silently gives wrong values for compressed slices, for rescale slopes and for data after the pixels. SimpleITK
therefore reads the slices themselves; geometry and intensities are those of its ``ImageSeriesReader``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nnssl.data.case_error import CaseError, last_line
from nnssl.errors import UserError
from nnssl.schema import STRICT, read

SERIES_ENDING = ".dcmseries"
SCHEMA_VERSION = 1

DICOM_READER = "DicomSeriesIO"
"""Name of the reader class in ``nnssl.data.dicom_reader``; nnU-Net has no reader of this name."""


@dataclass(frozen=True)
class Slice:
    """A file of a series."""

    __pydantic_config__: ClassVar = STRICT

    file: str
    """Path relative to the folder of the series."""
    size_bytes: int
    """Size at import; reading fails if the size has changed."""


@dataclass(frozen=True)
class DicomSeries:
    """Content of a series file."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    series_uid: str
    modality: str
    """DICOM's code: CT, MR or PT."""
    description: str
    folder: str
    """Absolute path of the folder that contains the slices."""
    slices: tuple[Slice, ...]
    """At least two slices, ordered by their positions along the normal of the slices."""


def read_series(file: Path) -> DicomSeries:
    """Read a series file.

    Raises:
        CaseError: If the file is missing, damaged or of another version.
    """
    try:
        series = read(DicomSeries, file, "DICOM series file")
    except UserError as error:
        raise CaseError(str(file), f"is not a readable series file ({error})") from error
    if len(series.slices) < 2:
        raise CaseError(str(file), "lists fewer than two slices; import it again")
    return series


def find_slices(file: Path) -> tuple[Path, ...]:
    """Return the slices of a series file in order, after checking that they exist and have the same size as at import.

    Raises:
        CaseError: If the series file cannot be read, or if a slice is missing or has another size.
    """
    return check_slices(read_series(file))


def check_slices(series: DicomSeries) -> tuple[Path, ...]:
    """Return the slices of a series in order, with the checks of ``find_slices``."""
    paths = []
    for entry in series.slices:
        path = Path(series.folder) / entry.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CaseError(str(path), f"is a slice of the series and cannot be found ({error.strerror})") from error
        if size != entry.size_bytes:
            raise CaseError(
                str(path), f"has {size} bytes, but had {entry.size_bytes} when it was imported; import it again"
            )
        paths.append(path)
    return tuple(paths)


def measure_series(series: DicomSeries) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Return the geometry of a series from the headers of its first and last slice.

    Returns:
        Shape (z, y, x) in voxels, spacing (z, y, x) in mm, and the directions in which x, y and z increase ("LPS").

    Raises:
        CaseError: If a slice is missing or its header cannot be read.
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
    """Return SimpleITK's reader of one DICOM file after reading the header, but no voxels.

    Raises:
        CaseError: If GDCM cannot read the file.
    """
    import SimpleITK as sitk  # noqa: N813

    header = sitk.ImageFileReader()
    header.SetImageIO("GDCMImageIO")
    header.SetFileName(str(file))
    try:
        header.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(str(file), f"cannot be read as a DICOM image ({last_line(error)})") from error
    return header


def stock_reader(reader: str) -> str:
    """Return the name of nnU-Net's reader to write into a plan, since stock nnU-Net knows only its own readers."""
    return "SimpleITKIO" if reader == DICOM_READER else reader
