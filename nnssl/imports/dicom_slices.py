"""The header of a DICOM file: the kind of image it holds, its series, and its position in the volume."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl.data.case_error import CaseError
from nnssl.data.dicom_series import read_slice_header

MAGIC = b"DICM"
PREAMBLE_BYTES = 128

IMAGE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT image",
    "1.2.840.10008.5.1.4.1.1.4": "MR image",
    "1.2.840.10008.5.1.4.1.1.128": "PET image",
}
"""Supported SOP classes, which have one slice per file and a position in space."""

OTHER_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2.1": "an enhanced CT image with all slices in one file",
    "1.2.840.10008.5.1.4.1.1.4.1": "an enhanced MR image with all slices in one file",
    "1.2.840.10008.5.1.4.1.1.130": "an enhanced PET image with all slices in one file",
    "1.2.840.10008.5.1.4.1.1.7": "a secondary capture",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose distribution",
    "1.2.840.10008.5.1.4.1.1.481.3": "a set of contours (RTSTRUCT)",
    "1.2.840.10008.5.1.4.1.1.1": "a radiograph",
    "1.2.840.10008.5.1.4.1.1.1.1": "a radiograph",
}
PARALLEL = 1e-3
"""Largest difference between the direction cosines of two slices in one volume."""


@dataclass(frozen=True)
class SliceHeader:
    """Header of a DICOM file: everything that determines its series and its position."""

    file: Path
    size_bytes: int
    instance_uid: str
    series_uid: str
    study_uid: str
    patient: str
    study_date: str
    modality: str
    description: str
    series_number: str
    image_type: str
    shape: tuple[int, int]
    """Shape (y, x) in voxels."""
    spacing_mm: tuple[float, float]
    """Spacing (y, x) in mm."""
    position_mm: np.ndarray
    """Position (x, y, z) of the first voxel in patient coordinates, in mm."""
    directions: np.ndarray
    """Direction cosines of rows and columns, 6 numbers."""


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, by its preamble or, for old files without one, by its ending."""
    if path.name.lower().endswith((".dcm", ".ima")):
        return True
    try:
        with open(path, "rb") as file:
            file.seek(PREAMBLE_BYTES)
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_slice(file: Path) -> SliceHeader:
    """Read the header of a DICOM file with one slice.

    Raises:
        CaseError: If the file is not an image of one slice with a position in space, or cannot be read.
    """
    sop_class = _media_storage_class(file)
    if sop_class is not None and sop_class not in IMAGE_CLASSES:
        kind = OTHER_CLASSES.get(sop_class, f"of the SOP class {sop_class}")
        raise CaseError(str(file), f"is {kind}; only CT, MR and PET images with one slice per file are supported")
    header = read_slice_header(file)

    def tag(key: str) -> str:
        # in DICOM, a missing tag and an empty one mean the same
        return _decode(header.GetMetaData(key)).strip(" \0") if header.HasMetaDataKey(key) else ""

    if tag("0008|0016") not in IMAGE_CLASSES:
        sop_class = tag("0008|0016") or "unknown"
        raise CaseError(str(file), f"is of the SOP class {sop_class}; only CT, MR and PET are supported")
    if header.GetNumberOfComponents() > 1:
        raise CaseError(str(file), "is a colour image")
    if header.GetSize()[2:] not in ((), (1,)):
        raise CaseError(str(file), "contains several slices; convert the series to NIfTI")
    position, directions = _read_placement(file, tag("0020|0032"), tag("0020|0037"))
    if not tag("0020|000e"):
        raise CaseError(str(file), "has no series (tag 0020,000e)")
    if not tag("0028|0030"):
        raise CaseError(str(file), "has no pixel spacing (tag 0028,0030)")
    columns, rows = header.GetSize()[:2]
    spacing_x, spacing_y = header.GetSpacing()[:2]
    return SliceHeader(
        file=file,
        size_bytes=file.stat().st_size,
        instance_uid=tag("0008|0018"),
        series_uid=tag("0020|000e"),
        study_uid=tag("0020|000d"),
        patient=tag("0010|0020"),
        study_date=tag("0008|0020"),
        modality=tag("0008|0060"),
        description=tag("0008|103e"),
        series_number=tag("0020|0011"),
        image_type=tag("0008|0008"),
        shape=(rows, columns),
        spacing_mm=(spacing_y, spacing_x),
        position_mm=position,
        directions=directions,
    )


def _decode(text: str) -> str:
    """Return a text as UTF-8, or as Latin-1 if its bytes are not valid UTF-8."""
    content = text.encode("utf-8", "surrogateescape")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _read_placement(file: Path, position_tag: str, directions_tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the position in mm and the direction cosines of a slice after checking them."""
    try:
        position = np.array([float(value) for value in position_tag.split("\\")])
        directions = np.array([float(value) for value in directions_tag.split("\\")])
    except ValueError:
        position = directions = np.empty(0)
    placed = position.shape == (3,) and directions.shape == (6,)
    if not placed or not np.isfinite(np.concatenate((position, directions))).all():
        raise CaseError(str(file), "has no position and orientation in space, so it is a single 2D image")
    axes = directions.reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > PARALLEL:
        raise CaseError(str(file), "has rows and columns that are not perpendicular (tag 0020,0037)")
    return position, directions


def _media_storage_class(file: Path) -> str | None:
    """Return the SOP class from the file meta information, without reading the image; None if the file has none.

    Source: DICOM PS3.10, section 7.1: explicit VR little endian, group 0002, at byte 132.
    """
    with open(file, "rb") as opened:
        start = opened.read(4096)
    if start[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] != MAGIC:
        return None
    match = re.search(rb"\x02\x00\x02\x00UI(..)", start[PREAMBLE_BYTES:], flags=re.DOTALL)
    if match is None:
        return None
    begin = PREAMBLE_BYTES + match.end()
    return start[begin : begin + int.from_bytes(match[1], "little")].decode("ascii", "replace").strip(" \0")
