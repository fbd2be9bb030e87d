"""Truncated and damaged files are named, also where ITK returns wrong voxels without an error."""

import gzip
import struct
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data.case_error import CaseError
from nnssl.data.image_files import check_size, check_spacing, read_file_header, read_images, read_segmentation
from nnssl.data.whole_files import check_whole

SHAPE = (9, 14, 11)


def labels():
    return np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)


def write(path, compressed, array=None):
    image = sitk.GetImageFromArray(labels() if array is None else array)
    image.SetSpacing((1.2, 1.5, 3.0))
    sitk.WriteImage(image, str(path), compressed)
    return path.read_bytes()


def changed(content, place):
    """Return content with two bytes changed."""
    content = bytearray(content)
    for each in (place, place + 1):
        content[each] ^= 0x55
    return bytes(content)


def refusal(path, trust_length=False):
    with pytest.raises(CaseError) as error:
        check_whole(path, trust_length)
    assert error.value.file == str(path)
    assert "\n" not in error.value.reason
    return error.value.reason


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_two_changed_bytes_that_itk_reads_as_other_voxels_are_noticed(ending, tmp_path):
    path = tmp_path / f"a{ending}"
    content = write(path, True)
    silent = 0
    for place in range(len(content) // 2, len(content) - 12, 61):
        path.write_bytes(changed(content, place))
        try:
            wrong = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) != labels()).mean()
        except RuntimeError:
            wrong = None
        silent += wrong is not None and wrong > 0
        assert refusal(path).startswith(("is damaged (", "is truncated ("))
        with pytest.raises(CaseError, match="is damaged|is truncated"):
            read_images((path,), "SimpleITKIO")
    assert silent  # otherwise ITK has learned to notice it
    path.write_bytes(content)
    np.testing.assert_array_equal(read_images((path,), "SimpleITKIO")[0][0], labels())


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii", ".nii.gz", ".gipl"])
def test_every_cut_is_called_truncated(ending, compressed, tmp_path):
    path = tmp_path / f"a{ending}"
    content = write(path, compressed)
    check_whole(path)
    check_whole(path, trust_length=True)
    for cut in (1, 5, 100, len(content) // 3):
        path.write_bytes(content[:-cut])
        assert "truncated" in refusal(path)
    for keep in (0, 3, 40):
        path.write_bytes(content[:keep])
        refusal(path)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_lengths_are_enough_for_an_import(ending, tmp_path, monkeypatch):
    path = tmp_path / f"a{ending}"
    content = write(path, True)
    monkeypatch.setattr(zlib, "decompressobj", lambda **options: pytest.fail("decompressed"))
    monkeypatch.setattr(gzip, "GzipFile", lambda **options: pytest.fail("decompressed"))
    check_whole(path, trust_length=True)
    path.write_bytes(changed(content, len(content) - 200))
    check_whole(path, trust_length=True)


def test_headers_as_other_programs_write_them(tmp_path):
    """Comments, key/value pairs, alternative names, gzip in MetaImage, bzip2 in NRRD, and voxels in another file."""
    array = labels()
    path = tmp_path / "a.nrrd"
    header = b"NRRD0005\n# comment: sizes: 1\nTYPE: signed short\ndimension: 3\nsizes:  11 14 9\nendian: little\nx:=type: 3\n"
    path.write_bytes(header + b"encoding: raw\n\n" + array.tobytes())
    check_whole(path)
    path.write_bytes(header + b"encoding: raw\n\n" + array.tobytes()[:-2])
    assert refusal(path) == "is truncated (has 2770 of 2772 bytes)"
    import bz2

    packed = bz2.compress(array.tobytes())
    path.write_bytes(header + b"encoding: bz2\n\n" + packed)
    check_whole(path)
    path.write_bytes(header + b"encoding: bz2\n\n" + changed(packed, 300))
    assert refusal(path).startswith(("is damaged", "cannot be read"))
    path.write_bytes(header + b"encoding: raw\ndata file: a.raw\n")
    check_whole(path)  # the other file is left to ITK
    path = tmp_path / "a.mha"
    header = "NDims = 3\r\nDimSize = 11 14 9\r\nElementType = MET_SHORT\r\nCompressedData = True\r\nElementDataFile = LOCAL\r\n"
    packed = gzip.compress(array.tobytes())
    path.write_bytes(header.encode() + packed)
    check_whole(path)
    path.write_bytes(header.encode() + packed[:-9])
    assert "truncated" in refusal(path)
    path.write_bytes(header.replace("11 14 9", "11 x 9").encode() + packed)
    assert "sizes must be whole numbers" in refusal(path)
    path.write_bytes(header.replace("ElementType", "Type").encode() + packed)
    assert "lacks ElementType" in refusal(path)


def test_vectors_count_all_their_values(tmp_path):
    path = tmp_path / "a.mha"
    image = sitk.Compose([sitk.GetImageFromArray(labels())] * 3)
    sitk.WriteImage(image, str(path), False)
    check_whole(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(path) == "is truncated (has 8315 of 8316 bytes)"


# units and sizes


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize(("unit", "length"), [("meter", 0.001), ("mm", 1.0), ("micron", 1000.0), ("unknown", 1.0)])
def test_spacings_are_in_mm_whatever_the_unit_of_the_header(unit, length, reader, tmp_path):
    affine = np.diag([1.2 * length, 1.5 * length, 3.0 * length, 1])
    image = nibabel.Nifti1Image(labels().T, affine)
    image.header.set_xyzt_units(unit)
    path = tmp_path / "a.nii.gz"
    nibabel.save(image, path)
    expected = pytest.approx((3.0, 1.5, 1.2), rel=1e-6)
    assert tuple(read_images((path,), reader)[1]["spacing"]) == expected
    assert tuple(read_segmentation(path, reader)[1]["spacing"]) == expected
    assert read_file_header(path, reader).spacing_mm == expected


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "possible"),
    [
        ((400, 512, 512), (5.0, 1.0, 1.0), True),
        ((1200, 512, 512), (1.5, 0.98, 0.98), True),
        ((40, 30, 20), (0.01, 0.01, 0.01), True),
        ((40, 30, 20), (2500.0, 1500.0, 1500.0), False),
        ((1, 512, 512), (999.0, 1.0, 1.0), True),
        ((1, 512, 512), (1.0, 1.0, 12.0), False),
        ((40, 512, 512), (1.0, 1.0, 12.0), False),
        ((40, 30, 20), (1e-5, 1e-5, 1e-5), False),
        ((40, 30, 20), (3.0, 1e-30, 1.0), False),
        ((1, 1, 1), (3.0, 1.0, 1.0), True),
    ],
)
def test_sizes_that_no_scan_has_are_refused(shape, spacing_mm, possible, tmp_path):
    path = tmp_path / "a.nii.gz"
    if possible:
        check_size(path, shape, spacing_mm)
        return
    with pytest.raises(CaseError, match="mm long, which no scan is") as error:
        check_size(path, shape, spacing_mm)
    assert error.value.file == str(path)
    check_size(tmp_path / "a.png", shape, spacing_mm)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("length", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_spacing_that_readers_replace_is_refused(ending, length, order, tmp_path):
    path = tmp_path / "a.nii"
    nibabel.save(
        nibabel.Nifti1Image(labels(), np.diag([1.2, 1.5, 3.0, 1]), nibabel.Nifti1Header(endianness=order)), path
    )
    content = bytearray(path.read_bytes())
    struct.pack_into(f"{order}f", content, 84, length)
    path = tmp_path / f"b{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    spacing_mm = read_images((path,), "SimpleITKIO")[1]["spacing"]
    assert all(np.isfinite(spacing_mm))
    assert min(spacing_mm) > 0  # without a word
    with pytest.raises(CaseError, match=r"pixdim \(x, y, z\) must be finite and not 0, got \(1.2, "):
        check_spacing(path, spacing_mm)
    struct.pack_into(f"{order}f", content, 84, -1.5)  # a sign is no harm
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    check_spacing(path, spacing_mm)
