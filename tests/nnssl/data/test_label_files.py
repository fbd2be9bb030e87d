"""Label files are compared with dataset.json and their images before anything is trained, and read once."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data import label_files
from nnssl.data.label_files import LabelFile, check_labels
from nnssl.errors import UserError
from nnssl.log import lines_to

SHAPE, SPACING_MM = (5, 7, 6), (3.0, 1.5, 1.2)
DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}


def write(path, array, spacing_mm=SPACING_MM):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    sitk.WriteImage(image, str(path))


@pytest.fixture
def files(tmp_path):
    """Three cases with liver and spleen."""
    found = []
    for number in range(3):
        image, label = tmp_path / f"c{number}_0000.nii.gz", tmp_path / f"c{number}.nii.gz"
        labels = np.zeros(SHAPE, np.uint8)
        labels[1:3, 2, 1], labels[4, 5:, 2] = 1, 2
        write(image, np.random.default_rng(number).normal(size=SHAPE).astype(np.float32))
        write(label, labels)
        found.append(LabelFile(f"c{number}", label, (image,)))
    return found


def check(files, content=DATASET_JSON, reader="SimpleITKIO"):
    said = []
    with lines_to(said.append):
        check_labels(files, content, "Dataset004_A", reader, files[0].label.parent, 1)
    return said


def with_voxel(file, value, dtype):
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(file.label))).astype(dtype)
    labels[2, 3, 4] = value
    write(file.label, labels)


def refused(files, message, **arguments):
    with pytest.raises(UserError, match=message) as error:
        check(files, **arguments)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("Dataset004_A, case c1: ")
    return line


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7, np.uint8, "contains the value 7, which is not a label in dataset.json"),
        (-1, np.int16, "contains the value -1"),
        (255, np.uint8, "contains the value 255"),
        (0.5, np.float32, "contains the value 0.5, which is not a whole number"),
        (np.nan, np.float32, "contains NaN or infinite"),
        (np.inf, np.float32, "contains NaN or infinite"),
    ],
)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
def test_a_value_that_is_no_label_is_named_with_case_and_file(value, dtype, message, reader, files):
    with_voxel(files[1], value, dtype)
    assert str(files[1].label) in refused(files, message, reader=reader)


def test_several_such_cases_are_counted(files):
    for file in files[1:]:
        with_voxel(file, 9, np.uint8)
    assert refused(files, "value 9").endswith("(2 of 3 cases have such labels)")


def test_whole_numbers_in_a_file_of_floats_are_labels(files):
    with_voxel(files[1], 2.0, np.float64)
    assert check(files) == ["Checking 3 labels of Dataset004_A ...", "checked 3 of 3 cases"]


def test_background_in_every_case_is_refused_and_in_one_is_not(files):
    write(files[1].label, np.zeros(SHAPE, np.uint8))
    check(files)
    for file in files:
        write(file.label, np.zeros(SHAPE, np.uint8))
    with pytest.raises(
        UserError, match=r"Dataset004_A: the labels of all 3 cases contain background only \(case c0: .*c0.nii"
    ):
        check(files)


def test_background_and_ignored_voxels_alone_are_refused(files):
    for file in files:
        write(file.label, np.full(SHAPE, 3, np.uint8))
    with pytest.raises(UserError, match="background only"):
        check(files, {**DATASET_JSON, "labels": {**DATASET_JSON["labels"], "ignore": 3}})


def test_a_label_that_no_case_has_is_told(files):
    content = {**DATASET_JSON, "labels": {**DATASET_JSON["labels"], "kidney": 3}}
    assert check(files, content)[-1] == "Note: kidney occur in none of the 3 label files of Dataset004_A"


@pytest.mark.parametrize(
    ("array", "spacing_mm", "message"),
    [
        (
            np.zeros((5, 7, 5), np.uint8),
            SPACING_MM,
            r"has \(5, 7, 5\) voxels \(z, y, x\), but its image .* has \(5, 7, 6\)",
        ),
        (np.zeros(SHAPE, np.uint8), (3.0, 1.5, 1.3), r"spacing \(z, y, x\) of \(3.0, 1.5, 1.3\) mm, but its image"),
        (np.arange(210, dtype=np.int16).reshape(SHAPE) * 2, SPACING_MM, "contains the value 4"),
        (
            np.random.default_rng(0).integers(0, 9999, (15, 7, 6)).astype(np.int16),
            SPACING_MM,
            "more than 256 different",
        ),
    ],
)
def test_labels_must_lie_on_the_grid_of_the_image(array, spacing_mm, message, files):
    write(files[1].label, array, spacing_mm)
    assert str(files[1].label) in refused(files, message)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_another_origin_or_orientation_is_told(reader, files):
    """nnU-Net goes by voxels, and many public data sets have such headers, so this is no error."""
    label = sitk.ReadImage(str(files[1].label))
    label.SetOrigin((0.0, 4.0, 0.0))
    sitk.WriteImage(label, str(files[1].label))
    assert (
        "1 of 3 label files of Dataset004_A differ in origin from their images (case c1: "
        in check(files, reader=reader)[-1]
    )
    label.SetOrigin((0.0, 0.1, 0.0))
    label.SetDirection((-1.0, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(label, str(files[1].label))
    assert "differ in orientation from" in check(files, reader=reader)[-1]


def test_vectors_and_damaged_files_are_named(files):
    label = sitk.ReadImage(str(files[1].label))
    sitk.WriteImage(sitk.JoinSeries([label, label]), str(files[1].label))
    refused(files, "values per voxel|voxels")
    files[1].label.write_bytes(files[0].label.read_bytes()[:-20])
    refused(files, "truncated|unreadable header")
    files[1].label.write_bytes(b"")
    refused(files, "unreadable header|truncated|cannot be read")
    files[1].label.unlink()
    refused(files, "cannot be found")


def test_the_number_of_channels_is_that_of_the_images(files):
    two = {**DATASET_JSON, "channel_names": {"0": "T1", "1": "T2"}}
    with pytest.raises(UserError, match=r"case c0: .* have 1 channel\(s\), but dataset.json names 2"):
        check(files, two)


def test_each_file_is_read_once_and_again_when_it_changed(files, monkeypatch):
    read = []
    examine = label_files.examine_label
    monkeypatch.setattr(label_files, "examine_label", lambda job: read.append(job.file.case) or examine(job))
    check(files[:2])
    assert sorted(read) == ["c0", "c1"]
    read.clear()
    check(files)
    assert read == ["c2"]
    read.clear()
    assert check(files) == []
    assert read == []
    # what was found is compared with the dataset.json of today
    with pytest.raises(UserError, match="case c0: .*contains the value 2"):
        check(files, {**DATASET_JSON, "labels": {"background": 0, "liver": 1}})
    assert read == []
    status = os.stat(files[1].label)
    os.utime(files[1].label, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    check(files)
    assert read == ["c1"]
    read.clear()
    check(files, reader="NibabelIO")
    assert sorted(read) == ["c0", "c1", "c2"]


def test_a_damaged_record_is_written_again(files):
    check(files)
    path = files[0].label.parent / label_files.FILE_NAME
    good = json.loads(path.read_text())
    path.write_text("{")
    assert "checking the labels again" in check(files)[0]
    assert json.loads(path.read_text()) == good


def test_a_wrong_file_does_not_lose_what_was_found_in_the_others(files):
    with_voxel(files[1], 0.5, np.float32)
    refused(files, "0.5")
    path = files[0].label.parent / label_files.FILE_NAME
    assert sorted(json.loads(path.read_text())["cases"]) == ["c0", "c2"]
