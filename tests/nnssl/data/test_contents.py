"""Digests of raw files: they follow the bytes, and bytes are read again only where size or times have changed."""

import os
from pathlib import Path

import pytest

from nnssl import schema
from nnssl.data import contents
from nnssl.data.contents import (
    Content,
    changed_cases,
    describe_changes,
    digest_files,
    digest_together,
    read_contents,
    write_contents,
)
from nnssl.data.dicom_series import SERIES_ENDING, DicomSeries, Slice
from nnssl.paths import Folders, resolve_folders

NAME = "Dataset007_Files"


@pytest.fixture
def folders(nnunet_folders) -> Folders:
    return resolve_folders()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files whose bytes were read, in order."""
    names: list[str] = []
    original = contents._digest_of
    monkeypatch.setattr(contents, "_digest_of", lambda file: names.append(file.name) or original(file))
    return names


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_bytes_decide_and_unchanged_files_are_not_read(folders, tmp_path, reads):
    first, second = write(tmp_path / "a.nii", "one"), write(tmp_path / "b.nii", "two")
    before = digest_files([first, second], NAME, folders)
    assert (sorted(reads), len(set(before.values()))) == (["a.nii", "b.nii"], 2)
    reads.clear()
    assert digest_files([second, first], NAME, folders) == before
    assert reads == []
    os.utime(first, ns=(0, 0))  # another time, the same bytes
    assert digest_files([first, second], NAME, folders) == before
    assert reads == ["a.nii"]
    reads.clear()
    state = second.stat()
    write(tmp_path / "new", "six").replace(second)  # another file of the same size and time
    os.utime(second, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = digest_files([first, second], NAME, folders)
    assert reads == ["b.nii"]
    assert (after[first] == before[first], after[second] == before[second]) == (True, False)


def test_files_that_do_not_exist_are_left_out_and_a_damaged_list_is_made_again(folders, tmp_path, reads):
    file = write(tmp_path / "a.nii", "one")
    before = digest_files([file, tmp_path / "gone.nii"], NAME, folders)
    assert list(before) == [file]
    write(folders.preprocessed / NAME / contents.FILE_NAME, '{"schema_version": 1, "files": {"x": 3')
    assert digest_files([file], NAME, folders) == before
    assert reads == ["a.nii", "a.nii"]


def test_the_spacing_of_a_tiff_belongs_to_it(folders, tmp_path):
    image, label = write(tmp_path / "a_0000.tif", "image"), write(tmp_path / "b.tif", "label")
    before = digest_files([image, label], NAME, folders)
    write(tmp_path / "a.json", '{"spacing": [1, 2, 3]}')  # as nnU-Net's reader finds it for an image
    middle = digest_files([image, label], NAME, folders)
    write(tmp_path / "b.json", '{"spacing": [1, 2, 3]}')  # and for a label
    after = digest_files([image, label], NAME, folders)
    assert (middle[image] != before[image], middle[label] == before[label]) == (True, True)
    assert (after[image] == middle[image], after[label] != middle[label]) == (True, True)


def make_series(folder: Path, *slices: str) -> Path:
    """Write slices and the series file that lists them."""
    for number, content in enumerate(slices):
        write(folder / f"slice{number}.dcm", content)
    entries = tuple(Slice(f"slice{number}.dcm", len(content)) for number, content in enumerate(slices))
    file = folder / f"a_0000{SERIES_ENDING}"
    schema.write(file, DicomSeries(DicomSeries.__schema_version__, "1.2", "CT", "", str(folder), entries))
    return file


def test_slices_belong_to_their_series_and_a_byte_belongs_to_its_slice(folders, tmp_path):
    series = make_series(tmp_path, "ab", "cd")
    before = digest_files([series], NAME, folders)[series]
    write(tmp_path / "slice1.dcm", "cX")
    changed = digest_files([series], NAME, folders)[series]
    assert changed != before
    parts = [tmp_path / "one", tmp_path / "two"]
    both = []
    for first, second in (("ab", "c"), ("a", "bc")):
        write(parts[0], first)
        write(parts[1], second)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contents, "_parts_of", lambda file: parts)
            both.append(contents._digest_of(parts[0]))
    assert both[0] != both[1]


def test_the_digest_of_a_case_covers_names_bytes_and_order():
    first, second = Path("x/a_0000.nii"), Path("x/a_0001.nii")
    digests = {first: "1", second: "2"}
    whole = digest_together([first, second], digests)
    assert whole == digest_together([Path("y") / first.name, Path("y") / second.name],
                                    {Path("y") / first.name: "1", Path("y") / second.name: "2"})  # fmt: skip
    renamed = Path("x/b_0001.nii")
    others = (
        ([first, renamed], {first: "1", renamed: "2"}),
        ([second, first], digests),
        ([first, second], {**digests, second: "3"}),
        ([first, second], {first: "1"}),
    )
    assert all(digest_together(*other) != whole for other in others)


def test_changes_are_named_case_by_case(tmp_path):
    before = {
        "a": Content("1", "x"),
        "b": Content("2", "x"),
        "c": Content("3", "x"),
        "d": Content("4"),
        "e": Content("5"),
    }
    now = {"a": Content("1", "x"), "b": Content("2", "y"), "c": Content("9", "y"), "d": Content("8"), "f": Content("1")}
    changes = changed_cases(before, now)
    assert changes == {"b": "label", "c": "image and label", "d": "image"}
    assert describe_changes(changes) == "b (label), c (image and label), d (image)"
    path = tmp_path / "contents.json"
    assert read_contents(path) is None
    write_contents(path, before)
    assert read_contents(path) == before
    path.write_text('{"a": {"images": 3}}')
    assert read_contents(path) is None
