import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.data import case_store
from nnssl.data.case_store import CaseProperties, CaseStore, SourceFile, complete_cases, write_case
from nnssl.data.packed_arrays import layout
from nnssl.errors import UserError
from tests.waiting import receive


def properties_of(volume, digest="abc") -> CaseProperties:
    source = SourceFile("/images/a_0000.nii.gz", 1234, 1_700_000_000_123_456_789)
    return CaseProperties(
        2, volume.shape[1:], len(volume), (3.5, 0.7, 0.9), (source,) * len(volume), digest, 0.25, 1.0, None
    )


def write_random_case(folder, name="a", shape=(2, 7, 133, 90), patch=(5, 64, 48), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=shape).astype(np.float32)
    foreground = rng.integers(0, shape[1:], size=(50, 3))
    write_case(folder, name, volume, foreground, properties_of(volume), patch)
    return volume


def crop_by_loop(volume, lower, size) -> np.ndarray:
    box = np.zeros((len(volume), *size), dtype=np.float32)
    for index in np.ndindex(*size):
        at = tuple(low + step for low, step in zip(lower, index, strict=True))
        if all(0 <= place < extent for place, extent in zip(at, volume.shape[1:], strict=True)):
            box[(slice(None), *index)] = volume[(slice(None), *at)]
    return box


@pytest.mark.parametrize("patch", [(5, 64, 48), (60, 40)])
@pytest.mark.parametrize(
    ("lower", "size"),
    [
        ((0, 0, 0), (7, 133, 90)),
        ((2, 60, 61), (3, 10, 7)),
        ((-2, 130, -3), (12, 6, 9)),
        ((6, 5, 3), (1, 20, 11)),
        ((7, 0, 0), (2, 3, 4)),
        ((0, -9, 0), (2, 9, 4)),
    ],
)
def test_box_is_the_volume_rounded_to_half_and_zero_outside(tmp_path, patch, lower, size):
    volume = write_random_case(tmp_path, patch=patch)
    box = CaseStore(tmp_path).case("a").read_box(lower, size)
    assert box.dtype == np.float32
    expected = crop_by_loop(volume.astype(np.float16).astype(np.float32), lower, size)
    np.testing.assert_array_equal(box, expected)


def test_conversion_does_not_depend_on_threads(tmp_path):
    write_random_case(tmp_path)
    case = CaseStore(tmp_path).case("a")
    boxes = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        boxes.append(case.read_box((1, -3, 5), (3, 90, 99)))
    torch.set_num_threads(before)
    assert boxes[0].any()
    np.testing.assert_array_equal(*boxes)


def test_rounding_keeps_eleven_bits(tmp_path):
    volume = write_random_case(tmp_path)
    box = CaseStore(tmp_path).case("a").read_box((0, 0, 0), volume.shape[1:])
    np.testing.assert_allclose(box, volume, rtol=2**-11, atol=2**-25)


def test_properties_and_coordinates_come_back(tmp_path):
    volume = np.zeros((3, 4, 5, 6), np.float32)
    foreground = np.array([[3, 4, 5], [0, 0, 0], [1, 2, 3]])
    write_case(tmp_path, "b.c_1", volume, foreground, properties_of(volume), (4, 4, 4))
    case = CaseStore(tmp_path).case("b.c_1")
    assert (case.shape, case.channels, case.spacing_mm) == ((4, 5, 6), 3, (3.5, 0.7, 0.9))
    assert case.properties == properties_of(volume)
    np.testing.assert_array_equal(case.foreground_vox, foreground)
    np.testing.assert_array_equal(case.body_vox, foreground)


def test_a_case_without_foreground_has_no_coordinates(tmp_path):
    volume = np.zeros((1, 4, 5, 6), np.float32)
    write_case(tmp_path, "a", volume, np.zeros((0, 3), np.int64), properties_of(volume), (4, 4))
    case = CaseStore(tmp_path).case("a")
    assert case.foreground_vox.shape == (0, 3)
    assert case.body_vox.tolist() == [[2, 2, 3]]


def test_long_volumes_keep_their_coordinates(tmp_path):
    volume = np.zeros((1, 1, 1, 40_000), np.float32)
    write_case(tmp_path, "a", volume, np.array([[0, 0, 39_999]]), properties_of(volume), (1, 1, 64))
    assert CaseStore(tmp_path).case("a").foreground_vox.tolist() == [[0, 0, 39_999]]


@pytest.mark.parametrize(
    ("shape", "patch", "block", "chunk"),
    [
        ((100, 300, 200), (64, 128, 160), (4, 64, 64), (64, 128, 192)),
        ((100, 300, 200), (256, 224), (1, 64, 64), (16, 256, 200)),
        ((3, 30, 200), (10, 40, 40), (3, 30, 64), (3, 30, 64)),
    ],
)
def test_layout(shape, patch, block, chunk):
    assert layout(shape, patch) == (block, chunk)


@pytest.mark.parametrize("patch", [(8, 64, 64), (64, 64)])
def test_a_slice_unpacks_few_blocks_only(tmp_path, patch):
    # two values only, so that blocks are compressed and damage to one cannot pass for voxels
    volume = np.random.default_rng(0).integers(0, 2, size=(1, 20, 128, 128)).astype(np.float32)
    write_case(tmp_path, "a", volume, np.zeros((0, 3), int), properties_of(volume), patch)
    path = tmp_path / "a.b2nd"
    content = bytearray(path.read_bytes())
    at = len(content) * 3 // 4
    content[at : at + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    case = CaseStore(tmp_path).case("a")
    readable = []
    for z in range(20):
        try:
            readable.append(np.array_equal(case.read_box((z, 0, 0), (1, 64, 64)), volume[:, z : z + 1, :64, :64]))
        except UserError:
            readable.append(False)
    assert sum(readable) >= 12
    with pytest.raises(UserError, match=r"a\.b2nd is damaged"):
        case.read_box((0, 0, 0), (20, 128, 128))


def test_a_damaged_array_is_named(tmp_path):
    write_random_case(tmp_path)
    (tmp_path / "a.b2nd").write_bytes(b"not an array")
    with pytest.raises(UserError, match="a.b2nd cannot be opened"):
        CaseStore(tmp_path).case("a").read_box((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("value", [65_520.0, -1e6, np.nan, np.inf])
def test_values_beyond_float16_are_refused_and_nothing_is_written(tmp_path, value):
    volume = np.zeros((1, 4, 5, 6), np.float32)
    volume[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="case a has values that float16 cannot represent"):
        write_case(tmp_path, "a", volume, np.zeros((0, 3), int), properties_of(volume), (4, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_the_largest_half_is_kept(tmp_path):
    volume = np.full((1, 2, 2, 2), 65_504.0, np.float32)
    write_case(tmp_path, "a", volume, np.zeros((0, 3), int), properties_of(volume), (2, 2, 2))
    assert CaseStore(tmp_path).case("a").read_box((0, 0, 0), (1, 1, 1)).item() == 65_504


def test_disagreeing_properties_and_coordinates_are_refused(tmp_path):
    volume = np.zeros((1, 4, 5, 6), np.float32)
    none = np.zeros((0, 3), int)
    with pytest.raises(ValueError, match="properties of case a must match its volume"):
        write_case(tmp_path, "a", volume, none, replace(properties_of(volume), shape=(4, 6, 5)), (4, 4, 4))
    with pytest.raises(ValueError, match="outside"):
        write_case(tmp_path, "a", volume, np.array([[0, 5, 0]]), properties_of(volume), (4, 4, 4))


def test_the_json_is_written_last_and_removed_first(tmp_path, monkeypatch):
    written = []
    rename = os.replace

    def watch(source, target):
        written.append((str(Path(target).relative_to(tmp_path)), (tmp_path / "a.json").exists()))
        rename(source, target)

    write_random_case(tmp_path)
    monkeypatch.setattr(os, "replace", watch)
    write_random_case(tmp_path, seed=1)
    assert written == [
        ("a.b2nd", False),
        ("learnable/a.b2nd", False),
        ("a_foreground.npy", False),
        ("a.json", False),
    ]


def test_a_half_removed_case_is_not_listed(tmp_path, monkeypatch):
    write_random_case(tmp_path)
    remove = Path.unlink

    def stop(path, **options):
        remove(path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        case_store.remove_case(tmp_path, "a")
    assert case_store.complete_cases(tmp_path) == []


def test_a_half_written_case_is_not_listed(tmp_path, monkeypatch):
    write_random_case(tmp_path, "whole")

    def stop(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(case_store.schema, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        write_random_case(tmp_path, "half")
    (tmp_path / ".half.json.77.tmp").write_text("{}")
    (tmp_path / ".half.json").write_text("{}")
    assert (tmp_path / "half.b2nd").exists()
    assert CaseStore(tmp_path).names == ["whole"]
    with pytest.raises(UserError, match="no complete case 'half'"):
        CaseStore(tmp_path).case("half")


def test_names_are_sorted(tmp_path):
    for name in ("c", "a", "b"):
        write_random_case(tmp_path, name, shape=(1, 2, 2, 2))
    assert CaseStore(tmp_path).names == ["a", "b", "c"]
    assert len(CaseStore(tmp_path)) == 3


def test_an_empty_or_missing_folder_says_what_to_do(tmp_path):
    assert complete_cases(tmp_path / "missing") == []
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no preprocessed case; run nnssl_plan_and_preprocess"):
            CaseStore(folder)


def test_an_unknown_key_in_the_properties_is_named(tmp_path):
    write_random_case(tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**content, "colour": "red"}))
    with pytest.raises(UserError, match=r"a\.json: colour"):
        _ = CaseStore(tmp_path).case("a").spacing_mm


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mapped files as Linux lists them")
def test_few_cases_are_open_at_a_time(tmp_path):
    for number in range(12):
        write_random_case(tmp_path, f"case{number:02d}", shape=(1, 2, 3, 4))
    store = CaseStore(tmp_path, max_open=4)
    for name in store.names * 2:
        store.case(name).read_box((0, 0, 0), (1, 1, 1))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert {Path(path).stem for path in mapped} == {"case08", "case09", "case10", "case11"}


def test_the_case_that_was_not_used_for_longest_is_closed(tmp_path):
    for name in "abc":
        write_random_case(tmp_path, name, shape=(1, 2, 3, 4))
    store = CaseStore(tmp_path, max_open=2)
    first, second = store.case("a"), store.case("b")
    assert store.case("a") is first
    store.case("c")
    assert store.case("a") is first
    assert store.case("b") is not second


def read_sum(store, name, parent):
    parent.send(float(store.case(name).read_box((0, 0, 0), (7, 133, 90)).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_in_use_can_go_to_another_process(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    write_random_case(tmp_path)
    store = CaseStore(tmp_path)
    expected = float(store.case("a").read_box((0, 0, 0), (7, 133, 90)).sum())
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=read_sum, args=(store, "a", there))
    process.start()
    assert receive(here, process) == expected
    process.join()
