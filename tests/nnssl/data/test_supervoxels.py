"""Supervoxels of small phantoms: sizes in mm, borders that follow tissue, and files that say what they belong to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl import schema
from nnssl.data.case_store import (
    SUPERVOXELS,
    CaseProperties,
    CaseStore,
    complete_cases,
    remove_case,
    write_case,
)
from nnssl.data.loader import make_loader
from nnssl.data.supervoxels import (
    folder_of,
    missing_supervoxels,
    partition,
    prepare_supervoxels,
    scale_intensities,
)
from nnssl.errors import UserError

SHAPE = (6, 24, 32)


def make_volume(shape=SHAPE, channels=2) -> np.ndarray:
    """A bright ball in a darker box, with a little noise."""
    z, y, x = np.meshgrid(*(np.arange(n) / n - 0.5 for n in shape), indexing="ij")
    image = (y**2 + x**2 + z**2 < 0.09) * 2.0 + (abs(x) < 0.4)
    noise = np.random.default_rng(0).normal(0, 0.02, (channels, *shape))
    return (image[None] + noise).astype(np.float32)


def make_store(folder, names=("a", "b"), digest="one") -> CaseStore:
    for name in names:
        volume = make_volume()
        properties = CaseProperties(2, SHAPE, len(volume), (2.0, 1.0, 1.0), (), digest, 1.0, 1.0, None)
        write_case(folder, name, volume, np.zeros((0, 3), int), properties, SHAPE)
    return CaseStore(folder)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.5, 1.0, 1.5)])
def test_supervoxels_are_as_large_as_their_edge_says(spacing_mm):
    volume = make_volume((16, 32, 32))
    for edge_mm in (6.0, 10.0):
        parts = partition(scale_intensities(volume), spacing_mm, edge_mm)
        assert parts.shape == volume.shape[1:]
        assert parts.dtype == np.int32
        assert parts.min() == 1
        volume_mm3 = np.prod(volume.shape[1:]) * np.prod(spacing_mm)
        wanted = volume_mm3 / edge_mm**3
        assert 0.3 * wanted < len(np.unique(parts)) < 3 * wanted
        extents = [
            np.ptp(np.nonzero(parts == label)[axis]) * mm
            for label in np.unique(parts)
            for axis, mm in enumerate(spacing_mm)
        ]
        assert np.median(extents) < 2 * edge_mm


def test_borders_follow_tissue():
    volume = make_volume((16, 32, 32))
    parts = partition(scale_intensities(volume), (1.0, 1.0, 1.0), 8.0)
    bright = volume[0] > 1.5
    share = np.bincount(parts.ravel(), bright.ravel()) / np.maximum(np.bincount(parts.ravel()), 1)
    explained = share[parts] > 0.5
    squares = np.add.outer(np.add.outer(np.arange(16) // 8 * 16, np.arange(32) // 8 * 4), np.arange(32) // 8)
    blind = np.bincount(squares.ravel(), bright.ravel()) / np.bincount(squares.ravel())
    assert (explained != bright).mean() < 0.6 * ((blind[squares] > 0.5) != bright).mean()


def test_thick_slices_are_partitioned_one_by_one():
    parts = partition(scale_intensities(make_volume()), (6.0, 1.0, 1.0), 8.0)
    for first, second in zip(parts[:-1], parts[1:], strict=True):
        assert not set(np.unique(first)) & set(np.unique(second))
    through = partition(scale_intensities(make_volume()), (2.0, 1.0, 1.0), 8.0)
    assert set(np.unique(through[2])) & set(np.unique(through[3]))
    assert partition(scale_intensities(make_volume((1, 24, 32))), (1.0, 1.0, 1.0), 8.0).shape == (1, 24, 32)


def test_three_channels_are_no_colours():
    """Equal channels must give the partition of one of them, whatever their number."""
    volume = make_volume((16, 32, 32), channels=1)
    parts = [partition(scale_intensities(np.repeat(volume, n, axis=0)), (1.0, 1.0, 1.0), 8.0) for n in (1, 2, 3, 4)]
    assert all((parts[0] == each).mean() > 0.98 for each in parts[1:])


def test_intensities_are_scaled_by_channel():
    volume = make_volume() * np.array([1, 100], np.float32).reshape(2, 1, 1, 1)
    scaled = scale_intensities(volume)
    assert scaled.dtype == np.float32
    assert scaled.min() == 0
    assert scaled.max() == pytest.approx(2**-0.5)
    low, high = np.percentile(volume[1], (1, 99))
    np.testing.assert_allclose(scaled[1], np.clip((volume[1] - low) / (high - low), 0, 1) / 2**0.5, atol=1e-5)
    assert not scale_intensities(np.full((1, 2, 3, 4), 5, np.float32)).any()


def test_files_belong_to_voxels_and_edge(tmp_path):
    store = make_store(tmp_path)
    assert prepare_supervoxels(store, (4.0, 8.0)) == 2
    assert prepare_supervoxels(store, (4.0, 8.0)) == 0
    assert complete_cases(tmp_path) == ["a", "b"]
    case = CaseStore(tmp_path).case("a")
    scaled = scale_intensities(case.read_box((0, 0, 0), SHAPE))
    for edge in (4.0, 8.0):
        stored = case.read_supervoxels(folder_of(tmp_path, edge), (0, 0, 0), SHAPE)
        assert np.array_equal(stored, partition(scaled, (2.0, 1.0, 1.0), edge))
    path = tmp_path / "a.json"
    schema.write(path, replace(schema.read(CaseProperties, path, "case"), digest="two"))
    fresh = CaseStore(tmp_path)
    assert missing_supervoxels(fresh, (8.0,)) == ["a"]
    with pytest.raises(
        UserError, match="was computed from other voxels than those of case a; delete it and start nnssl_p"
    ):
        fresh.case("a").read_supervoxels(folder_of(tmp_path, 8.0), (0, 0, 0), SHAPE)
    (folder_of(tmp_path, 4.0) / "b.b2nd").write_bytes(b"damaged")
    with pytest.raises(UserError, match="b.b2nd cannot be opened"):
        fresh.case("b").read_supervoxels(folder_of(tmp_path, 4.0), (0, 0, 0), SHAPE)
    assert prepare_supervoxels(CaseStore(tmp_path), (4.0, 8.0)) == 2
    remove_case(tmp_path, "a")
    assert not list(tmp_path.rglob("a*"))
    assert list((tmp_path / SUPERVOXELS).rglob("b.b2nd"))


def test_a_run_with_other_edges_does_not_disturb_a_reader(tmp_path):
    store = make_store(tmp_path)
    prepare_supervoxels(store, (4.0,))
    before = store.case("a").read_supervoxels(folder_of(tmp_path, 4.0), (0, 0, 0), SHAPE)
    prepare_supervoxels(CaseStore(tmp_path), (8.0, 12.0))
    assert prepare_supervoxels(CaseStore(tmp_path), (4.0,)) == 0
    for reader in (store, CaseStore(tmp_path)):
        assert np.array_equal(reader.case("a").read_supervoxels(folder_of(tmp_path, 4.0), (0, 0, 0), SHAPE), before)


@pytest.mark.parametrize("patch", [(6, 12, 16), (12, 16), (8, 28, 16)])
def test_loader_reads_one_partition_of_every_patch(tmp_path, patch):
    store = make_store(tmp_path)
    prepare_supervoxels(store, (4.0, 8.0))
    folders = [folder_of(tmp_path, edge) for edge in (4.0, 8.0)]
    loader = make_loader(store, patch, 2, seed=0, stage="s", first_step=0, last_step=8, partitions=folders)
    used = []
    for batch in loader:
        assert batch.supervoxels.shape == (2, *patch)
        assert batch.supervoxels.dtype == torch.int32
        for sample, name in enumerate(batch.cases):
            size = patch if len(patch) == 3 else (1, *patch)
            lower = batch.lower_vox[sample].tolist()
            both = [store.case(name).read_supervoxels(each, lower, size).reshape(patch) for each in folders]
            used.append([np.array_equal(batch.supervoxels[sample].numpy(), each) for each in both])
            inside = [range(max(n, 0), min(n + s, e)) for n, s, e in zip(lower, size, SHAPE, strict=True)]
            assert int((batch.supervoxels[sample] > 0).sum()) == np.prod([len(each) for each in inside])
    assert all(any(each) for each in used)
    assert {tuple(each) for each in used} >= {(True, False), (False, True)}
    again = make_loader(store, patch, 2, seed=0, stage="s", first_step=5, last_step=6, partitions=folders)
    (resumed,) = again
    assert torch.equal(resumed.supervoxels, list(loader)[5].supervoxels)
    plain = next(iter(make_loader(store, patch, 2, seed=0, stage="s", first_step=0, last_step=1)))
    assert plain.supervoxels is None
