"""Supervoxels of small phantoms: sizes in mm, borders that follow tissue, and files that say what they belong to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl import schema
from nnssl.data.case_store import (
    ENDING_OF_SUPERVOXELS,
    CaseProperties,
    CaseStore,
    complete_cases,
    remove_case,
    write_case,
)
from nnssl.data.loader import make_loader
from nnssl.data.supervoxels import are_current, partition, prepare_supervoxels

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
        properties = CaseProperties(1, SHAPE, len(volume), (2.0, 1.0, 1.0), (), digest, 1.0)
        write_case(folder, name, volume, np.zeros((0, 3), int), properties, SHAPE)
    return CaseStore(folder)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.5, 1.0, 1.5)])
def test_supervoxels_are_as_large_as_their_edge_says(spacing_mm):
    volume = make_volume((16, 32, 32))
    for edge_mm in (6.0, 10.0):
        parts = partition(volume, spacing_mm, edge_mm)
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
    parts = partition(volume, (1.0, 1.0, 1.0), 8.0)
    bright = volume[0] > 1.5
    share = np.bincount(parts.ravel(), bright.ravel()) / np.maximum(np.bincount(parts.ravel()), 1)
    explained = share[parts] > 0.5
    squares = np.add.outer(np.add.outer(np.arange(16) // 8 * 16, np.arange(32) // 8 * 4), np.arange(32) // 8)
    blind = np.bincount(squares.ravel(), bright.ravel()) / np.bincount(squares.ravel())
    assert (explained != bright).mean() < 0.6 * ((blind[squares] > 0.5) != bright).mean()


def test_thick_slices_are_partitioned_one_by_one():
    parts = partition(make_volume(), (6.0, 1.0, 1.0), 8.0)
    for first, second in zip(parts[:-1], parts[1:], strict=True):
        assert not set(np.unique(first)) & set(np.unique(second))
    through = partition(make_volume(), (2.0, 1.0, 1.0), 8.0)
    assert set(np.unique(through[2])) & set(np.unique(through[3]))
    assert partition(make_volume((1, 24, 32)), (1.0, 1.0, 1.0), 8.0).shape == (1, 24, 32)


def test_files_belong_to_voxels_edges_and_version(tmp_path):
    store = make_store(tmp_path)
    assert prepare_supervoxels(store, (4.0, 8.0)) == 2
    assert prepare_supervoxels(store, (4.0, 8.0)) == 0
    assert complete_cases(tmp_path) == ["a", "b"]
    case = CaseStore(tmp_path).case("a")
    stored = case.read_supervoxels((0, 0, 0), SHAPE)
    volume = case.read_box((0, 0, 0), SHAPE)
    for each, edge in zip(stored, (4.0, 8.0), strict=True):
        assert np.array_equal(each, partition(volume, (2.0, 1.0, 1.0), edge))
    assert not are_current(case, (4.0,))
    path = tmp_path / "a.json"
    schema.write(path, replace(schema.read(CaseProperties, path, "case"), digest="two"))
    assert not are_current(CaseStore(tmp_path).case("a"), (4.0, 8.0))
    (tmp_path / f"b{ENDING_OF_SUPERVOXELS}").write_bytes(b"damaged")
    assert prepare_supervoxels(CaseStore(tmp_path), (4.0, 8.0)) == 2
    remove_case(tmp_path, "a")
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("patch", [(6, 12, 16), (12, 16), (8, 28, 16)])
def test_loader_reads_the_supervoxels_of_its_patches(tmp_path, patch):
    store = make_store(tmp_path)
    prepare_supervoxels(store, (4.0, 8.0))
    loader = make_loader(store, patch, 2, seed=0, stage="s", first_step=0, last_step=2, supervoxels=True)
    for batch in loader:
        assert batch.supervoxels.shape == (2, 2, *patch)
        assert batch.supervoxels.dtype == torch.int32
        for sample, name in enumerate(batch.cases):
            size = patch if len(patch) == 3 else (1, *patch)
            lower = batch.lower_vox[sample].tolist()
            expected = store.case(name).read_supervoxels(lower, size).reshape(2, *patch)
            assert np.array_equal(batch.supervoxels[sample].numpy(), expected)
            inside = [range(max(n, 0), min(n + s, e)) for n, s, e in zip(lower, size, SHAPE, strict=True)]
            assert int((batch.supervoxels[sample, 0] > 0).sum()) == np.prod([len(each) for each in inside])
    plain = next(iter(make_loader(store, patch, 2, seed=0, stage="s", first_step=0, last_step=1)))
    assert plain.supervoxels is None
