"""Image files: their headers, their voxels through nnU-Net's readers, and whether all of the file is there.

ITK says nothing when a NIfTI or GIPL file is cut short or damaged: it returns zeros or stale memory for what is missing
(SimpleITK 2.5: half of a ``.nii.gz`` reads without an error). Those files are checked before they are read.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHUNK_BYTES = 1 << 20
GIPL_HEADER_BYTES = 256


class CaseError(Exception):
    """A case that cannot be used.

    Attributes:
        file: the image file at fault.
        reason: what is wrong with it.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class Header(NamedTuple):
    """What an image file says of itself, with axes as nnU-Net's reader orders them."""

    channels: int
    shape: tuple[int, ...]
    """(z, y, x)"""
    spacing_mm: tuple[float, ...]
    """(z, y, x)"""
    orientation: str
    """Directions towards which x, y and z grow, such as "LPS"; empty where the format does not say."""


def read_images(files: Sequence[Path], reader: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Call nnU-Net's reader on whole files, silently.

    Args:
        files: one per channel.
        reader: name of nnU-Net's reader class.

    Returns:
        What the reader returns: intensities and properties.

    Raises:
        CaseError: a file is missing, truncated, damaged or unreadable, or the files do not fit together.
    """
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name  # slow to import

    for file in files:
        check_whole(file)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            return recursive_find_reader_writer_by_name(reader)().read_images([str(file) for file in files])
    except MemoryError:
        raise
    except Exception as error:  # the readers let through whatever ITK, nibabel, tifffile and PIL raise
        # a mismatch of channels is printed by nnU-Net and raised without a message
        reason = _last_line(error) or next((line for line in printed.getvalue().splitlines() if "ERROR" in line), "")
        raise CaseError(str(files[0]), f"cannot be read ({reason or type(error).__name__})") from error


def check_whole(file: Path) -> None:
    """Check that a NIfTI or GIPL file holds all the voxels that its header announces.

    A compressed file is decompressed once in small pieces, which compares its checksum too.

    Raises:
        CaseError: the file is missing, cut short or damaged.
    """
    if not file.is_file():
        raise CaseError(str(file), "is not there")
    name = file.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            expected = _nifti_bytes(file)
            present = _unpacked_bytes(file)
        elif name.endswith(".gipl"):
            expected = _gipl_bytes(file)
            present = file.stat().st_size
        else:
            return
    except EOFError as error:
        raise CaseError(str(file), "is truncated (its compressed stream ends early)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CaseError(str(file), f"is damaged ({error})") from error
    except OSError as error:
        raise CaseError(str(file), f"cannot be read ({_last_line(error)})") from error
    if present < expected:
        raise CaseError(str(file), f"is truncated (holds {present} of {expected} bytes)")


def check_finite(file: Path) -> None:
    """Check that a NIfTI file holds neither NaN nor infinity, which ITK turns into 0 and says nothing.

    Other formats hand such values on to the reader, and integers cannot be any.

    Raises:
        CaseError: there is at least one.
    """
    import nibabel

    if file.name.lower().endswith((".nii", ".nii.gz")):
        proxy = nibabel.load(file).dataobj  # type: ignore[attr-defined]
        if proxy.dtype.kind in "fc" and not np.isfinite(proxy.get_unscaled()).all():
            raise CaseError(str(file), "holds NaN or infinite intensities")


def _unpacked_bytes(file: Path) -> int:
    """Return the length of a file, decompressed if it is compressed."""
    with open(file, "rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            return file.stat().st_size
    length = 0
    with gzip.open(file) as unpacked:
        while piece := unpacked.read(CHUNK_BYTES):
            length += len(piece)
    return length


def _nifti_bytes(file: Path) -> int:
    import nibabel  # slow to import

    try:
        proxy = nibabel.load(file).dataobj  # type: ignore[attr-defined]  # the header forgets its offset once loaded
        return int(proxy.offset) + int(np.prod(proxy.shape, dtype=np.int64)) * proxy.dtype.itemsize
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise CaseError(str(file), f"its header cannot be read ({_last_line(error)})") from error


def _gipl_bytes(file: Path) -> int:
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    header = _open_itk_header(file)
    bytes_per_value = sitk.GetArrayViewFromImage(sitk.Image([1] * len(header.GetSize()), header.GetPixelID())).itemsize
    return GIPL_HEADER_BYTES + int(np.prod(header.GetSize(), dtype=np.int64)) * bytes_per_value


def read_file_header(file: Path, reader: str) -> Header:
    """Return the geometry of one image file as nnU-Net's reader gives it.

    Formats whose geometry nnU-Net does not take from a header (tif, png, bmp) are read.

    Raises:
        CaseError: the header cannot be read.
    """
    if not file.is_file():
        raise CaseError(str(file), "is not there")
    if reader.startswith("SimpleITKIO"):
        header = _read_itk_header(file)
    elif reader.startswith("NibabelIO"):
        header = _read_nibabel_header(file)
    else:
        volume, properties = read_images((file,), reader)
        return Header(volume.shape[0], volume.shape[1:], tuple(float(mm) for mm in properties["spacing"]), "")
    if reader.endswith("WithReorient") and header.orientation:
        axes = [_axis_along(pair, header.orientation) for pair in ("SI", "AP", "RL")]
        shape = tuple(header.shape[axis] for axis in axes)
        return Header(header.channels, shape, tuple(header.spacing_mm[axis] for axis in axes), "RAS")
    return header


def _axis_along(pair: str, orientation: str) -> int:
    """Return the array axis (0 is z) that runs along an anatomical direction."""
    return 2 - next(x for x, letter in enumerate(orientation) if letter in pair)


def _open_itk_header(file: Path) -> Any:
    import SimpleITK as sitk  # noqa: N813

    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    try:
        header.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(str(file), f"its header cannot be read ({_last_line(error)})") from error
    return header


def _read_itk_header(file: Path) -> Header:
    import SimpleITK as sitk  # noqa: N813

    header = _open_itk_header(file)
    size, spacing = header.GetSize()[::-1], [abs(mm) for mm in header.GetSpacing()[::-1]]
    if header.GetNumberOfComponents() > 1 or len(size) not in (2, 3, 4):
        raise CaseError(str(file), "has vector voxels or more than four axes; write one file per channel")
    if len(size) == 2:
        return Header(1, (1, *size), (max(spacing) * 999, *spacing), "")
    direction = np.reshape(header.GetDirection(), (len(size), len(size)))[:3, :3].ravel().tolist()
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(direction)
    return Header(size[0] if len(size) == 4 else 1, tuple(size[-3:]), tuple(spacing[-3:]), orientation)


def _read_nibabel_header(file: Path) -> Header:
    import nibabel

    try:
        image: Any = nibabel.load(file)
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise CaseError(str(file), f"its header cannot be read ({_last_line(error)})") from error
    if image.ndim != 3:
        raise CaseError(str(file), f"has {image.ndim} axes; nnU-Net's nibabel reader takes 3")
    spacing_mm = tuple(float(mm) for mm in image.header.get_zooms()[::-1])
    return Header(1, tuple(image.shape[::-1]), spacing_mm, "".join(map(str, nibabel.aff2axcodes(image.affine))))


def _last_line(error: Exception) -> str:
    """Return the last line of an error's message, where ITK puts the reason."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
