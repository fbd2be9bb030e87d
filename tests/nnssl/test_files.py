"""Files are whole or not there: order of flush, sync and rename, names of temporary files, and what failures leave."""

import csv
import os

import pytest

from nnssl.errors import UserError
from nnssl.files import file_digest, read_json, read_names, some, write_atomically, write_csv, write_json


def test_every_byte_is_on_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"old")
    done = []
    sync, rename = os.fsync, os.replace

    def watch_sync(descriptor):
        done.append(("sync", os.fstat(descriptor).st_size, path.read_bytes()))
        sync(descriptor)

    def watch_rename(source, target):
        done.append(("rename", os.stat(source).st_size, path.read_bytes()))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_rename)
    write_atomically(path, lambda file: file.write(b"12345"))  # less than a buffer: nothing is written before a flush
    assert done == [("sync", 5, b"old"), ("rename", 5, b"old")]
    assert path.read_bytes() == b"12345"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    """The one that ends last wins, and each had a hidden file of its own."""
    path = tmp_path / "a.json"

    def outer(file):
        monkeypatch.setattr(os, "getpid", lambda: 2)
        write_atomically(path, lambda inner: inner.write(b"inner"))
        assert path.read_bytes() == b"inner"
        hidden = [each.name for each in tmp_path.iterdir() if each != path]
        assert len(hidden) == 1
        assert hidden[0].startswith(".a.json.")
        assert hidden[0].endswith(".tmp")
        file.write(b"outer")

    monkeypatch.setattr(os, "getpid", lambda: 1)
    write_atomically(path, outer)
    assert path.read_bytes() == b"outer"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [2]})
    before = path.read_bytes()

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UserError, match=r"none/a.json: cannot be written \(No such file or directory\); free space"):
        write_json(tmp_path / "none" / "a.json", {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert list(read_json(path, "plan")) == ["b", "a"]  # keys in the order given


def test_a_digest_is_of_the_whole_file(tmp_path):
    """Files longer than what is read at once, which differ in one byte at either end."""
    digests = set()
    for place in (None, 0, (1 << 20) - 1, 1 << 20, (1 << 20) + 4):
        content = bytearray((1 << 20) + 5)
        if place is not None:
            content[place] = 1
        (tmp_path / "a").write_bytes(content)
        digests.add(file_digest(tmp_path / "a"))
    assert len(digests) == 5
    assert all(len(digest) == 16 for digest in digests)


def test_lists_of_names(tmp_path):
    path = tmp_path / "cases.txt"
    path.write_text("# training\n b \n\na\n#c\nd#1\n")
    assert read_names(path) == ["b", "a", "d#1"]
    for text, message in (("# nothing\n\n", "holds no case name"), ("a\nb\n a\n", "lists a more than once")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"cases.txt: {message}"):
            read_names(path)
    path.write_bytes(b"\xff\xfe")
    for file in (path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match="cannot be read as a list of cases"):
            read_names(file)


def test_some_names():
    assert [some("abcde"[:n]) for n in (1, 3, 4, 5)] == ["a", "a, b, c", "a, b, c and 1 more", "a, b, c and 2 more"]


def test_a_table_is_read_back(tmp_path):
    write_csv(tmp_path / "a.csv", ["case", "dice"], [["a, b", 0.5], ['"c"', None]])
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["case", "dice"], ["a, b", "0.5"], ['"c"', ""]]
