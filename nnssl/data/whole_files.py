"""Checks that an image file is complete and, where its format allows to notice it, undamaged.

ITK reports no error for many truncated or damaged files: it returns zeros or stale memory for the voxels that are missing or
cannot be decompressed (SimpleITK 2.5 reads half of a ``.nii.gz``, and three quarters of a ``.mha`` in which two bytes have
changed, without an error). Compressed voxels are therefore decompressed here once in small pieces, which compares their checksum,
and lengths are compared with the header.

Source: NIfTI-1 (nifti.nimh.nih.gov), MetaImage (itk.org/Wiki/MetaIO/Documentation), NRRD
(teem.sourceforge.net/nrrd/format.html).
Deviations: Voxels that a header of MetaImage or NRRD places in another file are not checked. A changed byte of uncompressed
voxels cannot be noticed, because the formats have no checksum for them.
"""

import bz2
import gzip
import os
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nnssl.data.case_error import CaseError, check_file, last_line
from nnssl.data.dicom_series import SERIES_ENDING, find_slices

CHUNK_BYTES = 1 << 20
GIPL_HEADER_BYTES = 256
MOST_HEADER_BYTES = 1 << 20
"""Length that a text header does not exceed; otherwise the file is damaged or of another kind."""

META_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
"""Bytes of a value of MetaImage, without the prefix ``MET_`` and the ``U`` of unsigned types."""
NRRD_BYTES = (
    (1, ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t")),
    (2, ("short", "short int", "signed short", "signed short int", "int16", "int16_t")),
    (2, ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t")),
    (4, ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float")),
    (8, ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t")),
    (8, ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double")),
)
"""Bytes of a value of NRRD by the names of its types."""


def check_whole(file: Path, trust_length: bool = False) -> None:
    """Check that a file contains all voxels that its header announces, or a DICOM series all its slices.

    A compressed file is decompressed once in small pieces, which also compares its checksum.

    Args:
        file: Image file.
        trust_length: Whether to accept compressed voxels, without decompressing them, if the length stored beside them is the
            expected one. Damage in the middle is then noticed only when the file is read.

    Raises:
        CaseError: If the file is missing, truncated or damaged.
    """
    check_file(file)
    name = file.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            _check_nifti(file, trust_length)
        elif name.endswith(SERIES_ENDING):
            find_slices(file)
        elif name.endswith(".gipl"):
            _check_length(file, file.stat().st_size, _gipl_bytes(file))
        elif name.endswith(".mha"):
            _check_meta_image(file, trust_length)
        elif name.endswith(".nrrd"):
            _check_nrrd(file, trust_length)
    except EOFError as error:
        raise CaseError(str(file), "is truncated (the compressed stream ends early)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CaseError(str(file), f"is damaged ({error})") from error
    except OSError as error:
        raise CaseError(str(file), f"cannot be read ({last_line(error)})") from error


def open_itk_header(file: Path) -> Any:
    """Return ITK's reader of a file after it has read the header.

    Raises:
        CaseError: If it cannot read the header.
    """
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    try:
        header.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(str(file), f"has an unreadable header ({last_line(error)})") from error
    return header


def _check_length(file: Path, present: int, expected: int) -> None:
    if present < expected:
        raise CaseError(str(file), f"is truncated (has {present} of {expected} bytes)")


def _check_nifti(file: Path, trust_length: bool) -> None:
    expected = _nifti_bytes(file)
    if not (trust_length and _noted_bytes(file) == expected % 2**32):
        _check_length(file, unpacked_bytes(file), expected)


def unpacked_bytes(file: Path) -> int:
    """Return the length of a file in bytes, after decompression if gzip has compressed it."""
    with open(file, "rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            return file.stat().st_size
    with gzip.open(file) as unpacked:
        return _length_of(unpacked)


def _length_of(stream: Any) -> int:
    length = 0
    while piece := stream.read(CHUNK_BYTES):
        length += len(piece)
    return length


def _noted_bytes(file: Path) -> int | None:
    """Return the decompressed length, modulo 2^32, from the last 4 bytes of a gzip file; None for other files."""
    with open(file, "rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            return None
        raw.seek(-4, os.SEEK_END)
        return int.from_bytes(raw.read(4), "little")


def _nifti_bytes(file: Path) -> int:
    import nibabel  # slow to import

    try:
        proxy = nibabel.load(file).dataobj  # type: ignore[attr-defined]  # the offset is missing from a loaded header
        return int(proxy.offset) + int(np.prod(proxy.shape, dtype=np.int64)) * proxy.dtype.itemsize
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise CaseError(str(file), f"has an unreadable header ({last_line(error)})") from error


def _gipl_bytes(file: Path) -> int:
    import SimpleITK as sitk  # noqa: N813

    header = open_itk_header(file)
    bytes_per_value = sitk.GetArrayViewFromImage(sitk.Image([1] * len(header.GetSize()), header.GetPixelID())).itemsize
    return GIPL_HEADER_BYTES + int(np.prod(header.GetSize(), dtype=np.int64)) * bytes_per_value


def _check_meta_image(file: Path, trust_length: bool) -> None:
    """Check a MetaImage whose voxels follow the header."""
    with open(file, "rb") as raw:
        fields = _read_meta_header(file, raw)
        if fields["elementdatafile"].upper() != "LOCAL":
            return
        kind = fields["elementtype"].upper().removeprefix("MET_").removesuffix("_ARRAY")
        size = META_BYTES.get(kind) or META_BYTES.get(kind.removeprefix("U"))
        if size is None or fields.get("binarydata", "True").lower() == "false" or "headersize" in fields:
            return
        values = _product(file, f"{fields['dimsize']} {fields.get('elementnumberofchannels', '1')}")
        if fields.get("compresseddata", "False").lower() != "true":
            _check_length(file, file.stat().st_size - raw.tell(), values * size)
            return
        packed = file.stat().st_size - raw.tell()
        noted = _product(file, fields.get("compresseddatasize", "0"))
        if packed < noted:
            raise CaseError(str(file), f"is truncated (has {packed} of {noted} compressed bytes)")
        if not (trust_length and noted):
            _check_length(file, _inflated_bytes(raw), values * size)


def _read_meta_header(file: Path, raw: BinaryIO) -> dict[str, str]:
    """Return the fields of a MetaImage header, with names in lower case, and leave the file at the voxels.

    Raises:
        CaseError: If the header does not end, or lacks what says how many voxels there are.
    """
    fields: dict[str, str] = {}
    while "elementdatafile" not in fields:
        line = raw.readline(MOST_HEADER_BYTES)
        name, found, value = line.decode("latin-1").partition("=")
        if not found or raw.tell() > MOST_HEADER_BYTES:
            raise CaseError(str(file), "has an unreadable header (it ends before ElementDataFile)")
        fields[name.strip().lower()] = value.strip()
    missing = [name for name in ("DimSize", "ElementType") if name.lower() not in fields]
    if missing:
        raise CaseError(str(file), f"has an unreadable header (it lacks {missing[0]})")
    return fields


def _inflated_bytes(raw: BinaryIO) -> int:
    """Return the decompressed length of a zlib or gzip stream that follows in a file.

    Raises:
        EOFError: If the stream ends early.
        zlib.error: If it is damaged.
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # detects either header, and compares checksums at the end
    length = 0
    while not unpacker.eof:
        piece = unpacker.unconsumed_tail or raw.read(CHUNK_BYTES)
        if not piece:
            length += len(unpacker.flush())
            if not unpacker.eof:
                raise EOFError
        length += len(unpacker.decompress(piece, 16 * CHUNK_BYTES))
    return length


def _check_nrrd(file: Path, trust_length: bool) -> None:
    """Check a NRRD whose voxels follow the header."""
    with open(file, "rb") as raw:
        fields = _read_nrrd_header(file, raw)
        kind = fields["type"].lower()
        size = next((each for each, names in NRRD_BYTES if kind in names), None)
        elsewhere = {"data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip"} & set(fields)
        if size is None or elsewhere:
            return
        expected = _product(file, fields["sizes"]) * size
        encoding = fields["encoding"].lower()
        if encoding == "raw":
            _check_length(file, file.stat().st_size - raw.tell(), expected)
        elif encoding in ("gzip", "gz"):
            start = raw.tell()
            raw.seek(-4, os.SEEK_END)
            if trust_length and int.from_bytes(raw.read(4), "little") == expected % 2**32:
                return
            raw.seek(start)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                _check_length(file, _length_of(unpacked), expected)
        elif encoding in ("bzip2", "bz2") and not trust_length:
            with bz2.BZ2File(raw) as unpacked:
                _check_length(file, _length_of(unpacked), expected)


def _read_nrrd_header(file: Path, raw: BinaryIO) -> dict[str, str]:
    """Return the fields of a NRRD header, with names in lower case, and leave the file at the voxels.

    Raises:
        CaseError: If the header does not end, or lacks what says how many voxels there are.
    """
    if not raw.readline(MOST_HEADER_BYTES).startswith(b"NRRD"):
        raise CaseError(str(file), "has an unreadable header (it does not begin with NRRD)")
    fields: dict[str, str] = {}
    while line := raw.readline(MOST_HEADER_BYTES).decode("latin-1"):
        if not line.strip():
            break
        name, found, value = line.partition(":")
        if found and not value.startswith("="):  # := are key/value pairs of the user
            fields[name.strip().lower()] = value.strip()
    missing = [name for name in ("type", "sizes", "encoding") if name not in fields]
    if missing:
        raise CaseError(str(file), f"has an unreadable header (it lacks {missing[0]})")
    return fields


def _product(file: Path, sizes: str) -> int:
    """Return the product of whole numbers that are separated by spaces.

    Raises:
        CaseError: If an entry is not a whole number.
    """
    if not re.fullmatch(r"\s*\d+(\s+\d+)*\s*", sizes):
        raise CaseError(str(file), f"has an unreadable header (sizes must be whole numbers, got {sizes!r})")
    return int(np.prod([int(each) for each in sizes.split()], dtype=np.int64))
