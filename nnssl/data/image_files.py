"""Image files: reading headers, and voxels through nnU-Net's readers after files were checked (``nnssl.data.whole_files``).

Spacings are in mm, whatever the unit in the header of a NIfTI file (m, mm, um). ITK converts them; nnU-Net's readers that use
nibabel do not.
"""

import contextlib
import gzip
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnssl.data.case_error import CaseError, check_file, last_line
from nnssl.data.dicom_series import DICOM_READER, SERIES_ENDING, find_slices, measure_series, read_series
from nnssl.data.whole_files import check_whole, open_itk_header
from nnssl.errors import UserError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
"""Formats with header and voxels in one file that SimpleITK reads for nnU-Net. Longer endings come first, so that the
first match is the right one."""
PICTURE_ENDINGS = (".tiff", ".tif", ".png", ".bmp")
ENDINGS = (*VOLUME_ENDINGS, *PICTURE_ENDINGS)
"""All formats that nnU-Net's readers accept."""
NIFTI_HEADER_BYTES = 348
UNITS_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}
"""Units of lengths in a NIfTI header, in mm."""
LONGEST_MM, SHORTEST_MM = 5000.0, 0.01
"""Length of the longest side of an image outside which its spacing must be wrong; whole bodies take 2000 mm."""
THINNEST_MM = 1e-6
"""Smallest side of a voxel, below which its spacing must be wrong."""


class Header(NamedTuple):
    """Geometry of an image file, with the axes in the order of nnU-Net's reader."""

    channels: int
    shape: tuple[int, ...]
    """Shape (z, y, x) in voxels."""
    spacing_mm: tuple[float, ...]
    """Spacing (z, y, x) in mm."""
    orientation: str
    """Directions in which x, y and z increase, such as "LPS"; empty if the format does not store them."""
    origin_mm: tuple[float, ...] = ()
    """Position (x, y, z) of the first voxel as stored in the file; empty if the format does not store it."""


def ending_of(path: Path | str, endings: Sequence[str] = ENDINGS) -> str:
    """Return the ending of a file name as written there, if it is one of ``endings``, else an empty string."""
    name = Path(path).name
    return next((name[-len(ending) :] for ending in endings if name.lower().endswith(ending)), "")


def read_images(files: Sequence[Path], reader: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Check that files are complete and read them with nnU-Net's reader or the one for DICOM series, without output.

    Args:
        files: One file per channel.
        reader: Name of nnU-Net's reader class, or ``DICOM_READER``.

    Returns:
        Intensities and properties, as returned by the reader.

    Raises:
        CaseError: If a file is missing, truncated, damaged or unreadable, or if the files do not fit together.
    """
    return _in_mm(files[0], reader, _read(files, reader, lambda own: own.read_images([str(file) for file in files])))


def read_segmentation(file: Path, reader: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a label map or mask, for which a TIFF finds the ``.json`` with its spacing by another rule than for an image.

    Args:
        file: The label map.
        reader: Name of nnU-Net's reader class.

    Raises:
        CaseError: If the file is missing, truncated, damaged or unreadable.
    """
    return _in_mm(file, reader, _read((file,), reader, lambda own: own.read_seg(str(file))))


def _in_mm(file: Path, reader: str, read: tuple[np.ndarray, dict[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return what was read, with the spacing in mm."""
    if not reader.startswith("NibabelIO"):
        return read
    volume, properties = read
    return volume, {**properties, "spacing": [mm * unit_mm(file) for mm in properties["spacing"]]}


def unit_mm(file: Path) -> float:
    """Return the unit of lengths in a NIfTI file in mm; 1 if the header names none or is of another format."""
    import nibabel

    if not file.name.lower().endswith((".nii", ".nii.gz")):
        return 1.0
    return UNITS_MM.get(nibabel.load(file).header.get_xyzt_units()[0], 1.0)  # type: ignore[attr-defined]


def files_of_segmentation(file: Path) -> list[Path]:
    """Return the files of a label map: itself, and the ``.json`` with the spacing of a TIFF if there is one."""
    spacing = file.with_suffix(".json")
    return [spacing, file] if file.suffix in (".tif", ".tiff") and spacing.is_file() else [file]


def _read(files: Sequence[Path], reader: str, read: Callable[[Any], Any]) -> Any:
    for file in files:
        check_whole(file)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            return read(_find_reader(reader)())
    except (MemoryError, CaseError):
        raise
    except Exception as error:  # the readers pass on any error of ITK, nibabel, tifffile and PIL
        # nnU-Net prints a mismatch of channels and raises an error without a message
        reason = last_line(error) or next((line for line in printed.getvalue().splitlines() if "ERROR" in line), "")
        raise CaseError(str(files[0]), f"cannot be read ({reason or type(error).__name__})") from error


def write_segmentation(file: Path, labels: np.ndarray, properties: dict[str, Any], reader: str) -> None:
    """Write a label map with the writer of nnU-Net that belongs to a reader, with the geometry that the reader returned.

    The file, and the ``.json`` with the spacing that belongs to a TIFF, is complete or absent.

    Args:
        file: File to write; its folder must exist.
        labels: Label map (z, y, x) in the order of the reader.
        properties: Properties of the image that ``read_images`` returned.
        reader: Name of nnU-Net's reader class.

    Raises:
        UserError: If the file cannot be written, or nnU-Net has no writer for images with this number of axes.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".segmentation.", suffix=".tmp", dir=file.parent) as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                _find_reader(reader)().write_seg(labels, str(Path(folder) / file.name), properties)
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == file.name):  # the file itself last
                os.replace(path, file.parent / path.name)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file}: cannot be written ({last_line(error)}); free space or choose another folder"
        ) from error
    except AssertionError as error:
        raise UserError(
            f"{file}: nnU-Net cannot write a segmentation for images with four axes; split the channels"
        ) from error


def _find_reader(reader: str) -> Any:
    """Return a reader class by its name."""
    if reader == DICOM_READER:
        from nnssl.data.dicom_reader import DicomSeriesIO  # brings nnU-Net

        return DicomSeriesIO
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name  # slow to import

    return recursive_find_reader_writer_by_name(reader)


def check_spacing(file: Path, spacing_mm: Sequence[float]) -> None:
    """Check that the spacing of a file is finite and above 0.

    ITK and nibabel replace a spacing in a NIfTI header that is 0, NaN or infinite by 1 mm or by that of another axis. The header
    itself is therefore read too.

    Raises:
        CaseError: If the spacing is impossible.
    """
    _check_pixdim(file)
    if not all(np.isfinite(spacing_mm)) or min(spacing_mm) <= 0:
        raise CaseError(
            str(file), f"has an invalid spacing: every value must be finite and above 0, got {tuple(spacing_mm)}"
        )


def _check_pixdim(file: Path) -> None:
    """Check the spacing in a NIfTI header of all axes that are longer than one voxel.

    Raises:
        CaseError: If one is 0, NaN or infinite.
    """
    if not file.name.lower().endswith((".nii", ".nii.gz")):
        return
    with open(file, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(file) if packed else open(file, "rb") as raw:
        header = raw.read(NIFTI_HEADER_BYTES)
    order = next((each for each in "<>" if struct.unpack_from(f"{each}i", header)[0] == NIFTI_HEADER_BYTES), None)
    if order is None:
        return  # NIfTI-2, or Analyze in disguise
    axes, *sizes = struct.unpack_from(f"{order}8h", header, 40)
    lengths = struct.unpack_from(f"{order}8f", header, 76)[1:]
    used = [length for length, size in zip(lengths[: min(axes, 3)], sizes, strict=False) if size > 1]
    if not all(np.isfinite(used)) or 0 in used:
        wrong = tuple(float(f"{length:.6g}") for length in lengths[: min(axes, 3)])
        raise CaseError(
            str(file), f"has an invalid spacing in its header: pixdim (x, y, z) must be finite and not 0, got {wrong}"
        )


def check_size(file: Path, shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Check that the size of an image is possible for a scan; pictures, whose files have no spacing, are not checked.

    Args:
        file: Image file.
        shape: Shape (z, y, x) in voxels.
        spacing_mm: Spacing (z, y, x) in mm.

    Raises:
        CaseError: If the size is impossible.
    """
    if ending_of(file, PICTURE_ENDINGS):
        return
    longest_mm = longest_side_mm(shape, spacing_mm)
    if not SHORTEST_MM <= longest_mm <= LONGEST_MM or min(spacing_mm) < THINNEST_MM:
        spacing = tuple(float(f"{mm:.6g}") for mm in spacing_mm)
        raise CaseError(
            str(file),
            f"is {longest_mm:,.6g} mm long, which no scan is, with {tuple(shape)} voxels of {spacing} mm (z, y, x); correct the "
            "spacing in its header or, in a NIfTI file, the unit (xyzt_units)",
        )


def longest_side_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Return the length of the longest side of an image in mm; a single slice has no thickness."""
    return max(size * mm for size, mm in zip(shape, spacing_mm, strict=True) if size > 1 or len(set(shape)) == 1)


def check_finite(file: Path) -> None:
    """Check that a NIfTI file contains neither NaN nor infinity, which ITK silently replaces by 0.

    Files of other formats need no check here, since their readers return such values. Integers cannot hold them.

    Raises:
        CaseError: If there is at least one such value.
    """
    import nibabel

    if file.name.lower().endswith((".nii", ".nii.gz")):
        proxy = nibabel.load(file).dataobj  # type: ignore[attr-defined]
        if proxy.dtype.kind in "fc" and not np.isfinite(proxy.get_unscaled()).all():
            raise CaseError(str(file), "contains NaN or infinite intensities")


def find_source_state(file: Path) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in ns of an image, for a series over all its slices.

    Raises:
        OSError: If the file does not exist.
        CaseError: If a slice does not exist.
    """
    status = [file.stat()]
    if file.name.endswith(SERIES_ENDING):
        status += [path.stat() for path in find_slices(file)]
    return sum(each.st_size for each in status), max(each.st_mtime_ns for each in status)


def read_file_header(file: Path, reader: str, is_segmentation: bool = False) -> Header:
    """Return the geometry of one image file, or of one label map or mask, as given by nnU-Net's reader.

    Formats whose geometry nnU-Net does not take from a header (tif, png, bmp) are read completely.

    Raises:
        CaseError: If the header cannot be read.
    """
    check_file(file)
    if reader == DICOM_READER:
        return Header(1, *measure_series(read_series(file)))
    if reader.startswith("SimpleITKIO"):
        header = _read_itk_header(file)
    elif reader.startswith("NibabelIO"):
        header = _read_nibabel_header(file)
    else:
        volume, properties = read_segmentation(file, reader) if is_segmentation else read_images((file,), reader)
        return Header(volume.shape[0], volume.shape[1:], tuple(float(mm) for mm in properties["spacing"]), "")
    if reader.endswith("WithReorient") and header.orientation:
        axes = [_axis_along(pair, header.orientation) for pair in ("SI", "AP", "RL")]
        shape = tuple(header.shape[axis] for axis in axes)
        spacing_mm = tuple(header.spacing_mm[axis] for axis in axes)
        return Header(header.channels, shape, spacing_mm, "RAS", header.origin_mm)
    return header


def _axis_along(pair: str, orientation: str) -> int:
    """Return the array axis (0 is z) that runs along an anatomical direction."""
    return 2 - next(x for x, letter in enumerate(orientation) if letter in pair)


def _read_itk_header(file: Path) -> Header:
    import SimpleITK as sitk  # noqa: N813

    header = open_itk_header(file)
    size, spacing = header.GetSize()[::-1], [abs(mm) for mm in header.GetSpacing()[::-1]]
    if header.GetNumberOfComponents() > 1 or len(size) not in (2, 3, 4):
        raise CaseError(str(file), "has vector voxels or more than four axes; write one file per channel")
    if len(size) == 2:
        return Header(1, (1, *size), (max(spacing) * 999, *spacing), "")
    direction = np.reshape(header.GetDirection(), (len(size), len(size)))[:3, :3].ravel().tolist()
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(direction)
    channels = size[0] if len(size) == 4 else 1
    return Header(channels, tuple(size[-3:]), tuple(spacing[-3:]), orientation, tuple(header.GetOrigin()[:3]))


def _read_nibabel_header(file: Path) -> Header:
    import nibabel

    try:
        image: Any = nibabel.load(file)
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise CaseError(str(file), f"has an unreadable header ({last_line(error)})") from error
    if image.ndim != 3:
        raise CaseError(str(file), f"must have 3 axes for nnU-Net's nibabel reader, got {image.ndim}")
    unit = unit_mm(file)
    spacing_mm = tuple(float(length) * unit for length in image.header.get_zooms()[::-1])
    orientation = "".join(map(str, nibabel.aff2axcodes(image.affine)))
    origin_mm = tuple(float(length) * unit for length in image.affine[:3, 3])
    return Header(1, tuple(image.shape[::-1]), spacing_mm, orientation, origin_mm)
