"""Names that files have on real disks: not UTF-8, as long as a file system allows, with line breaks."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data.case_error import CaseError, fault_of_name
from nnssl.data.image_files import read_file_header, read_images, write_segmentation
from nnssl.data.raw import read_dataset
from nnssl.data.whole_files import check_whole
from nnssl.errors import UserError
from nnssl.files import printable, temporary_path, whole_folder, write_atomically
from nnssl.imports.folders import find_in_folder
from nnssl.imports.sources import Choices
from nnssl.log import print_line
from nnssl.paths import resolve_folders

LATIN_1 = os.fsdecode(b"lat\xe9")
LONG = "ä" * 100 + "n" * 40
"""Name of 240 bytes; with ``_0000.nii.gz``, a file name has 252."""


def write(path):
    """Write an image; ITK cannot do so under a name that is not UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(300, 50, (5, 7, 6)).astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "written.nii.gz")
        sitk.WriteImage(image, str(written))
        shutil.move(written, path)
    return path


@pytest.fixture
def folders(nnunet_folders):
    return resolve_folders()


def test_a_name_that_is_not_utf8_is_set_aside(folders):
    """ITK would end the process without a message."""
    images = folders.raw / "Dataset501_Names" / "imagesTr"
    for case in ("a", "b", LATIN_1):
        write(images / f"{case}_0000.nii.gz")
    dataset = read_dataset(501, folders)
    assert [case.name for case in dataset.cases] == ["a", "b"]
    (entry,) = dataset.set_aside
    assert entry.case == r"lat\xe9"
    assert entry.file == f"{images}/lat\\xe9_0000.nii.gz"
    assert entry.reason == "has a path that is not UTF-8, which ITK cannot open; rename it"
    json.dumps(entry.file).encode("ascii").decode()
    entry.file.encode("utf-8")


def test_no_reader_is_given_such_a_name(tmp_path):
    path = write(tmp_path / f"{LATIN_1}.nii.gz")
    for read in (
        check_whole,
        lambda path: read_file_header(path, "SimpleITKIO"),
        lambda path: read_images((path,), "SimpleITKIO"),
    ):
        with pytest.raises(CaseError, match="not UTF-8") as error:
            read(path)
        error.value.file.encode("utf-8")


def test_a_folder_with_such_a_name_is_named(folders, monkeypatch, tmp_path):
    bad = tmp_path / LATIN_1
    write(bad / "Dataset501_Names" / "imagesTr" / "a_0000.nii.gz")
    monkeypatch.setenv("nnUNet_raw", str(bad))
    with pytest.raises(UserError, match=r"lat\\xe9.*not UTF-8"):
        resolve_folders()


def test_an_import_refuses_such_a_name(tmp_path):
    write(tmp_path / f"{LATIN_1}.nii.gz")
    write(tmp_path / "b.nii.gz")
    found = find_in_folder(tmp_path, Choices())
    assert [candidate.name for candidate in found.candidates] == ["b"]
    assert [refusal.file for refusal in found.refused] == [f"{tmp_path}/lat\\xe9.nii.gz"]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("patient 1 (ä)", None),
        ("n" * 240, None),
        (LONG, None),
        ("n" * 241, "too long: that of a case may have 240 bytes"),
        (LONG + "n", "too long"),
        ("a\nb", "cannot be that of a file"),
        ("a/b", "cannot be that of a file"),
        ("../a", "cannot be that of a file"),
        (".a", "cannot be that of a file"),
        ("", "cannot be that of a file"),
        (" ", "cannot be that of a file"),
        ("a\0", "cannot be that of a file"),
        (LATIN_1, "not UTF-8"),
        ("\ud800", "not UTF-8"),
    ],
)
def test_names_of_cases(case, fault):
    found = fault_of_name(case)
    assert (found is None) if fault is None else (fault in found)
    printable(case).encode("utf-8")


def test_names_that_cannot_be_stored_are_set_aside_when_the_data_set_is_read(folders):
    folder = folders.raw / "Dataset501_Names"
    for case in ("a", LONG, LONG + "n", "line\nbreak"):
        write(folder / "imagesTr" / f"{case}_0000.nii.gz")
    dataset = read_dataset(501, folders)
    assert [case.name for case in dataset.cases] == ["a", LONG]
    assert dataset.set_aside[0].case == r"line\nbreak"
    assert dataset.set_aside[0].file.endswith(r"line\nbreak_0000.nii.gz")
    assert [(entry.case[:4], entry.reason.split(";")[0][:30]) for entry in dataset.set_aside] == [
        ("line", "belongs to a case whose name c"),
        ("ääää", "has a name that is too long: t"),
    ]


def test_names_in_dataset_json_are_checked_as_well(folders):
    folder = folders.raw / "Dataset501_Names"
    for name in ("a", LATIN_1):
        write(folder / f"{name}.nii.gz")
    listed = {
        "a": {"images": ["a.nii.gz"]},
        "b": {"images": "a.nii.gz"},
        "../up": {"images": ["a.nii.gz"]},
        "n" * 241: {"images": ["a.nii.gz"]},
        "c": {"images": [f"{LATIN_1}.nii.gz"]},
    }
    content = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "dataset": listed}
    (folder / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(501, folders)
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert sorted(entry.case for entry in dataset.set_aside) == ["../up", "c", "n" * 241]
    for wrong in ([], {"a": "a.nii.gz"}, {"a": {"image": []}}, {"a": {"images": [1]}}):
        (folder / "dataset.json").write_text(json.dumps({**content, "dataset": wrong}))
        with pytest.raises(UserError, match="'dataset' must have the form|none of the images listed") as error:
            read_dataset(501, folders)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "n" * 255, "ä" * 127])
def test_files_and_folders_of_any_name_are_written(name, tmp_path):
    path = tmp_path / name
    write_atomically(path, lambda file: file.write(b"x"))
    assert path.read_bytes() == b"x"
    path.unlink()
    with whole_folder(path) as folder:
        (folder / "b").touch()
    assert os.listdir(tmp_path) == [name]
    assert temporary_path(path).name.startswith(".")
    assert temporary_path(path).name.endswith(".tmp")
    assert temporary_path(path) != temporary_path(tmp_path / ("x" + name[1:]))


def test_a_segmentation_of_any_name_is_written(tmp_path):
    image = write(tmp_path / f"{LONG}_0000.nii.gz")
    _, properties = read_images((image,), "SimpleITKIO")
    path = tmp_path / f"{'n' * 248}.nii.gz"
    write_segmentation(path, np.ones((5, 7, 6), np.uint8), properties, "SimpleITKIO")
    assert read_images((path,), "SimpleITKIO")[0].all()
    assert len(list(tmp_path.iterdir())) == 2


def test_lines_with_any_name_are_printed(capsys, monkeypatch):
    import io
    import sys

    for encoding in ("utf-8", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        print_line(f"a {LATIN_1}")
        assert stream.buffer.getvalue() == b"a lat\\udce9\n"
