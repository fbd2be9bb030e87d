"""Points belong to the supervoxel that they lie in, and the accuracy is that of loops over points and prototypes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl.data.supervoxels import folder_of, prepare_supervoxels
from nnssl.evaluation.region_probe import LEAST_POINTS, RegionSample, draw_regions, measure_regions
from nnssl.networks.dense import ENCODER
from tests.nnssl.evaluation.test_view_retrieval import CPU, PATCHES, SHAPE, Voxels, make_store, noise, ramps
from tests.nnssl.methods.tiny_configuration import make_configuration

EDGE_MM = {2: 6.0, 3: 4.0}
"""Edges of supervoxels; with 4 mm, every slice of 2.5 mm is partitioned on its own."""
GRIDS = {2: (6, 9), 3: (3, 6, 9)}
POINTS, REGIONS, CHANNELS = 60, 5, 7


def make_sample(dim: int, seed: int, channels: int = CHANNELS) -> RegionSample:
    """A sample of four patches of noise; the last one has no regions."""
    generator = torch.Generator().manual_seed(seed)
    grid = GRIDS[dim]
    first, second = (torch.randn(4, channels, *grid, generator=generator) for _ in range(2))
    points = [
        torch.stack([torch.randint(n, (4, POINTS), generator=generator) for n in grid], dim=-1).float()
        for _ in range(2)
    ]
    regions = torch.randint(-1, REGIONS, (4, POINTS), generator=generator)
    regions[0][regions[0] >= 3] = -1
    regions[3] = -1
    used = torch.stack([torch.isin(torch.arange(REGIONS + 2), row[::2]) for row in regions])
    return RegionSample(first, second, points[0], points[1], regions, used)


def slow_accuracy(sample: RegionSample) -> float:
    """The accuracy from the definition, one point and one prototype after the other."""
    patches, points = sample.regions.shape
    views = ((sample.first, sample.points_first), (sample.second, sample.points_second))
    features = [
        {
            (patch, point): volume[(patch, slice(None), *place[patch, point].long().tolist())].double().numpy()
            for patch in range(patches)
            for point in range(points)
            if sample.regions[patch, point] >= 0
        }
        for volume, place in views
    ]
    everything = np.array([*features[0].values(), *features[1].values()])
    mean, std = everything.mean(axis=0), everything.std(axis=0)
    right = []
    for reference, query in ((0, 1), (1, 0)):
        for patch in range(patches):
            prototypes = {}
            for region in range(REGIONS):
                own = [
                    (features[reference][patch, point] - mean) / std
                    for point in range(0, points, 2)
                    if sample.regions[patch, point] == region
                ]
                if own:
                    prototypes[region] = sum(own) / len(own)
            for point in range(1, points, 2):
                region = int(sample.regions[patch, point])
                if region < 0:
                    continue
                value = (features[query][patch, point] - mean) / std
                cosine = {
                    each: value @ centre / np.linalg.norm(value) / np.linalg.norm(centre)
                    for each, centre in prototypes.items()
                }
                right.append(max(cosine, key=cosine.get) == region)
    return float(np.mean(right))


@pytest.mark.parametrize("dim", [2, 3])
def test_accuracy_is_that_of_loops(dim):
    for seed in range(3):
        sample = make_sample(dim, seed)
        assert measure_regions(Voxels(1.0), sample, ENCODER, {}, CPU) == {
            "encoder_0": pytest.approx(slow_accuracy(sample), abs=1e-6)
        }


@pytest.mark.parametrize("dim", [2, 3])
def test_perfect_features_find_all_regions_and_others_are_near_chance(dim):
    sample = make_sample(dim, 0)
    chance = sample.chance
    shares = [
        1 / int(used.sum()) for row, used in zip(sample.regions, sample.used, strict=True) for r in row[1::2] if r >= 0
    ]
    assert chance == pytest.approx(sum(shares) / len(shares))
    found = [measure_regions(Voxels(1.0), make_sample(dim, s), ENCODER, {}, CPU)["encoder_0"] for s in range(12)]
    assert np.mean(found) == pytest.approx(np.mean([make_sample(dim, s).chance for s in range(12)]), abs=0.04)
    assert measure_regions(Voxels(0.0), sample, ENCODER, {}, CPU)["encoder_0"] == pytest.approx(chance)
    codes = torch.eye(CHANNELS)
    views = [torch.zeros_like(sample.first) for _ in range(2)]
    regions = sample.regions.clone()
    for patch in range(4):
        taken: dict[tuple[int, ...], int] = {}
        for point in range(POINTS):  # a voxel can show one region only
            for side, places in enumerate((sample.points_first, sample.points_second)):
                place = tuple(places[patch, point].long().tolist())
                if taken.setdefault((side, *place), int(regions[patch, point])) != int(regions[patch, point]):
                    regions[patch, point] = -1
        for point in range(POINTS):
            if regions[patch, point] >= 0:
                for view, places in zip(views, (sample.points_first, sample.points_second), strict=True):
                    view[(patch, slice(None), *places[patch, point].long().tolist())] = codes[regions[patch, point]]
    used = torch.stack([torch.isin(torch.arange(REGIONS + 2), row[::2]) for row in regions])
    regions[:, 1::2] = regions[:, 1::2].where(used.gather(1, regions[:, 1::2].clamp_min(0)), -1)
    perfect = replace(sample, first=views[0], second=views[1], regions=regions, used=used)
    assert int((regions[:, 1::2] >= 0).sum()) > 20
    assert measure_regions(Voxels(1.0), perfect, ENCODER, {}, CPU) == {"encoder_0": 1.0}


@pytest.mark.parametrize("dim", [2, 3])
def test_points_belong_to_the_supervoxel_that_they_show(tmp_path, dim):
    """The values of the views are positions in the case, so they say in which supervoxel a point lies."""
    store = make_store(tmp_path, [ramps(), ramps()])
    edge = EDGE_MM[dim]
    assert prepare_supervoxels(store, (edge,)) == 2
    data = replace(make_configuration(dim), intensity_views=(), flip_axes=(-1,))
    sample = draw_regions(store, store.names, PATCHES[dim], data, edge, 6)
    again = draw_regions(store, store.names, PATCHES[dim], data, edge, 6)
    assert all(torch.equal(getattr(sample, name), getattr(again, name)) for name in ("first", "regions", "used"))
    partitions = [
        store.case(name).read_supervoxels(folder_of(tmp_path, edge), (0, 0, 0), SHAPE) for name in store.names
    ]
    known = 0
    for patch in range(6):
        seen: dict[int, set[int]] = {}
        counts: dict[int, int] = {}
        for point in range(sample.regions.shape[1]):
            region = int(sample.regions[patch, point])
            if region < 0:
                continue
            place = sample.points_first[patch, point].long().tolist()
            exact = sample.first[(patch, slice(None), *place)].numpy()
            if np.abs(exact - np.floor(exact) - 0.5).min() < 0.05:
                continue  # between two voxels, rounding decides
            seen.setdefault(region, set()).add(int(partitions[patch % 2][tuple(np.rint(exact).astype(int))]))
            counts[region] = counts.get(region, 0) + (point % 2 == 0)
            known += 1
        numbers = [next(iter(each)) for each in seen.values()]
        assert all(len(each) == 1 for each in seen.values())
        assert len(set(numbers)) == len(numbers)
        assert int(sample.used[patch].sum()) >= len(seen) > 1
    assert known > 200


def test_a_patch_of_one_supervoxel_is_left_out(tmp_path):
    store = make_store(tmp_path, [noise(0, channels=2)])
    prepare_supervoxels(store, (500.0,))
    sample = draw_regions(store, store.names, PATCHES[3], make_configuration(3), 500.0, 3)
    counts = sample.used.sum(dim=1)
    assert all(int(count) == 0 or int(count) >= LEAST_POINTS for count in counts)
    assert (sample.regions[counts == 0] == -1).all()
    if not sample.used.any():
        assert sample.chance is None
