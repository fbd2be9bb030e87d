"""Similarity and components of dense features, compared with loops over voxels for networks with known features."""

import itertools

import numpy as np
import pytest
import torch

from nnssl.errors import UserError
from nnssl.pictures import features as dense_features
from nnssl.pictures.components import embed_cases, fit_components, project
from nnssl.pictures.features import (
    Standardisation,
    embed_point,
    features_at,
    fit_standardisation,
    sample_features,
)
from nnssl.pictures.places import fullest_slice, middle_of
from nnssl.pictures.similarity import compare_cases, cosines, find_nearest
from nnssl.pictures.tiles import average_over_tiles, tile_around, tile_corners, tile_weights
from tests.nnssl.pictures.pointwise import SPACING_MM, make_network, random_volume, single_features, write_cases

SHAPE = (6, 10, 14)
FLIPS = (1, 3)
TILES = {2: (1, 6, 8), 3: (4, 6, 8)}


def everywhere(shape=SHAPE) -> np.ndarray:
    return np.argwhere(np.ones(shape, bool))


@pytest.fixture
def store(tmp_path):
    """Return a case, its flipped copy, in which the most similar voxel is known, and a third case."""
    volume = random_volume(0, SHAPE)
    volumes = {"a": volume, "b": np.flip(volume, FLIPS).copy(), "c": random_volume(1, SHAPE)}
    return write_cases(tmp_path / "cases", volumes, everywhere()[::3])


def brute_cosines(features: np.ndarray, query: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    first = (query - mean) / std
    result = np.zeros(features.shape[:-1])
    for place in np.ndindex(*result.shape):
        second = (features[place] - mean) / std
        result[place] = first @ second / np.sqrt((first @ first) * (second @ second))
    return result


@pytest.mark.parametrize("dim", [2, 3])
def test_flipped_voxel_is_the_nearest(store, dim):
    query = (4, 2, 11)
    flipped = (SHAPE[0] - 1 - 4, 2, SHAPE[2] - 1 - 11)
    comparison = compare_cases(make_network(dim, TILES[dim]), store, "a", query, ["b", "c"], 0)
    own, found, other = comparison.similarities
    assert comparison.query_vox == own.nearest_vox == query
    assert found.nearest_vox == flipped
    assert found.nearest_cosine == pytest.approx(1, abs=1e-5)
    assert other.nearest_cosine < 0.9999
    assert np.isnan(own.cosine).any() == (dim == 2)
    assert not np.isnan(found.cosine).any()
    if dim == 2:
        assert np.isfinite(own.cosine[4]).all()
        assert np.isnan(np.delete(own.cosine, 4, axis=0)).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_maps_equal_a_loop_over_voxels(store, dim):
    """Cases are processed in tiles; mean and standard deviation come from the same sample."""
    network = make_network(dim, TILES[dim])
    comparison = compare_cases(network, store, "a", (1, 7, 3), ["c"], 3)
    features = {name: single_features(store.case(name).read_box((0, 0, 0), SHAPE)) for name in "ac"}
    sample = torch.cat([sample_features(network, store.case(name), 3) for name in "ac"]).numpy().astype(np.float64)
    for similarity in comparison.similarities:
        expected = brute_cosines(
            features[similarity.case.name], features["a"][1, 7, 3], sample.mean(axis=0), sample.std(axis=0)
        )
        seen = np.isfinite(similarity.cosine)
        assert np.allclose(similarity.cosine[seen], expected[seen], atol=1e-4)
        assert expected.std() > 0.1
        if similarity.case.name == "c":
            assert similarity.nearest_vox == np.unravel_index(expected.argmax(), SHAPE)


def test_raw_features_would_all_look_alike(store):
    """The reason for standardisation."""
    features = single_features(store.case("a").read_box((0, 0, 0), SHAPE))
    raw = brute_cosines(features, features[1, 7, 3], np.zeros(6), np.ones(6))
    standardised = compare_cases(make_network(3, SHAPE), store, "a", (1, 7, 3), [], 0).similarities[0].cosine
    assert raw.min() > 0.9
    assert np.median(standardised) < 0.3


@pytest.mark.parametrize("dim", [2, 3])
def test_sample_is_of_stored_voxels_of_the_case(store, dim):
    network = make_network(dim, TILES[dim])
    case = store.case("a")
    sample = sample_features(network, case, 0)
    stored = single_features(case.read_box((0, 0, 0), SHAPE))[tuple(case.foreground_vox.T)].astype(np.float32)
    stored_rows = {tuple(np.round(row, 3)) for row in stored}
    assert {tuple(np.round(row, 3)) for row in sample.numpy()} <= stored_rows
    assert len({tuple(row) for row in sample.tolist()}) > 50
    assert torch.equal(sample, sample_features(network, case, 0))
    assert not torch.equal(sample, sample_features(network, case, 1))


def test_case_without_body_is_sampled_anywhere(tmp_path):
    store = write_cases(tmp_path / "cases", {"a": random_volume(0, SHAPE)}, np.zeros((0, 3), int))
    case = store.case("a")
    assert sample_features(make_network(3, TILES[3]), case, 0).shape[1] == 6
    assert middle_of(case) == (3, 5, 7)
    assert fullest_slice(case) == 3


@pytest.mark.parametrize("dim", [2, 3])
def test_tiles_equal_one_big_tile(store, dim):
    """Tiles do not matter to features that depend only on the voxel."""
    whole = (1, *SHAPE[1:]) if dim == 2 else SHAPE
    case = store.case("a")
    query, standardisation = torch.randn(6), Standardisation(100 + torch.randn(6), torch.rand(6) + 0.5)
    results = []
    for tile in (whole, TILES[dim], (1, 16, 16) if dim == 2 else (8, 12, 16)):
        network = make_network(dim, tile)
        lowers = tile_corners(SHAPE, tile)
        assert (len(lowers) > SHAPE[0]) == (tile == TILES[dim])
        shape = network.shape
        results.append(
            average_over_tiles(network, case, lowers, 1, lambda m, _, s=shape: cosines(m, s, query, standardisation))
        )
    for other in results[1:]:
        assert np.allclose(results[0], other, atol=1e-5)


def test_average_weighs_tiles_by_their_centre(store):
    """Each tile returns its own number; a loop over voxels and tiles computes the expected average."""
    tile = TILES[3]
    lowers = tile_corners(SHAPE, tile)
    numbers = iter(range(len(lowers)))
    average = average_over_tiles(
        make_network(3, tile), store.case("a"), lowers, 1, lambda *_: torch.full((1, *tile), float(next(numbers)))
    )[0]
    for voxel in np.ndindex(*SHAPE):
        weights, values = [], []
        for number, lower in enumerate(lowers):
            place = np.subtract(voxel, lower)
            if np.all(place >= 0) and np.all(place < tile):
                to_rim = [
                    min(p + 1, n - p) for p, n in zip(place, tile, strict=True)
                ]  # 1 at the rim, most in the middle
                weights.append(np.prod(to_rim))
                values.append(number)
        assert average[voxel] == pytest.approx(np.average(values, weights=weights), abs=1e-4), voxel
    assert len(np.unique(average)) > len(lowers)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [((6, 10, 14), (4, 6, 8)), ((7, 9, 20), (1, 9, 6)), ((3, 30, 5), (8, 7, 8)), ((5, 5, 5), (5, 5, 5))],
)
def test_tiles_cover_and_overlap_by_half(shape, tile):
    lowers = tile_corners(shape, tile)
    assert len(set(lowers)) == len(lowers)
    for axis, (extent, length) in enumerate(zip(shape, tile, strict=True)):
        starts = sorted({lower[axis] for lower in lowers})
        if extent <= length:
            (start,) = starts
            assert abs((start + length) - extent + start) <= 1  # as much before as behind
        else:
            assert starts[0] == 0
            assert starts[-1] + length == extent
            assert all(b - a <= max(length // 2, 1) for a, b in itertools.pairwise(starts))
    assert len(lowers) == np.prod([len({lower[axis] for lower in lowers}) for axis in range(3)])


def test_tile_around_a_point_is_inside_and_central():
    assert tile_around((20, 20, 20), (4, 6, 8), (10, 1, 19)) == (8, 0, 12)
    assert tile_around((3, 20, 20), (8, 6, 8), (1, 10, 10)) == (-2, 7, 6)
    assert tile_weights((1, 4, 3)).shape == (1, 4, 3)
    assert tile_weights((5, 4, 3)).min() > 0


@pytest.mark.parametrize(
    ("shape", "grids"), [((8, 12), [(3, 4), (8, 6)]), ((4, 6, 8), [(2, 3, 2), (4, 3, 8), (4, 6, 8)])]
)
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_full_resolution_equals_interpolation_at_every_voxel(monkeypatch, shape, grids, chunk):
    monkeypatch.setattr(dense_features, "CHUNK_VALUES", chunk)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3 + level, *grid, generator=generator) for level, grid in enumerate(grids)]
    channels = sum(each.shape[1] for each in maps)
    standardisation = Standardisation(
        torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    )
    points = torch.from_numpy(everywhere(shape))
    features = standardisation.apply(features_at(maps, shape, points))
    query = torch.randn(channels, generator=generator)
    expected = torch.nn.functional.cosine_similarity(features, query[None], dim=1).view(1, *shape)
    before = [each.clone() for each in maps]
    assert torch.allclose(cosines(maps, shape, query, standardisation), expected, atol=1e-5)
    components = fit_components(features - features.mean(dim=0))
    expected = (features @ components.directions.T).T.view(3, *shape)
    assert torch.allclose(project(maps, shape, components, standardisation), expected, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


def test_query_reads_all_maps_of_its_voxel(tmp_path):
    """The coarse map comes first in a pyramid; a case smaller than the tile is padded with zeros."""
    shape, tile = (3, 6, 7), (4, 8, 8)
    store = write_cases(tmp_path / "cases", {"a": random_volume(0, shape, channels=1)}, everywhere(shape))
    network = make_network(3, tile, "pyramid")
    features = embed_point(network, store.case("a"), (1, 3, 2))
    volume = store.case("a").read_box((0, 0, 0), shape)
    assert features.shape == (3,)
    assert torch.allclose(features[1:], torch.from_numpy(single_features(volume)[1, 3, 2]).float(), atol=1e-4)
    lower = tile_around(shape, tile, (1, 3, 2))
    cells = store.case("a").read_box(lower, tile)[0].reshape(4, 4, 2, 4, 2).mean(axis=(2, 4)) ** 2
    (z, y, x) = np.subtract((1, 3, 2), lower)
    expected = 0.0
    for cell_y, cell_x in np.ndindex(4, 4):  # linear between the centres of cells of 2 x 2 voxels
        near = [max(0.0, 1 - abs((place - (2 * cell + 0.5)) / 2)) for place, cell in ((y, cell_y), (x, cell_x))]
        expected += near[0] * near[1] * cells[z, cell_y, cell_x]
    assert float(features[0]) == pytest.approx(expected, abs=1e-4)


def test_components_are_the_eigenvectors_of_the_covariance():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 5, generator=generator) @ torch.diag(torch.tensor([1.0, 5.0, 0.5, 3.0, 2.0]))
    features = (features - features.mean(dim=0)) @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    values, vectors = np.linalg.eigh(np.cov(features.numpy().T.astype(np.float64)))
    components = fit_components(features)
    for row, place in enumerate((4, 3, 2)):
        expected = vectors[:, place] * np.sign(vectors[np.abs(vectors[:, place]).argmax(), place])
        assert np.allclose(components.directions[row], expected, atol=1e-3)
        assert float(components.share[row]) == pytest.approx(values[place] / values.sum(), abs=1e-4)
        assert float(components.low[row]) == pytest.approx(np.percentile(features.numpy() @ expected, 1), abs=1e-2)
    few = fit_components(features[:, :2])
    assert torch.equal(few.directions[2], torch.zeros(2))
    assert float(few.share[2]) == 0


def test_constant_feature_is_left_out():
    features = torch.tensor([[1.0, 3.0], [1.0, 5.0], [1.0, 7.0]])
    standardisation = fit_standardisation(features)
    assert torch.allclose(standardisation.apply(features), torch.tensor([[0, -1.2247], [0, 0], [0, 1.2247]]), atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_embedding_of_a_case(store, dim):
    case = store.case("a")
    network = make_network(dim, {2: TILES[2], 3: (2, 4, 6)}[dim])
    embedding = embed_cases(network, [case], 5 if dim == 2 else None, 0)
    (shown,) = embedding.cases
    z, y, x = shown.centre_vox
    assert dim == 3 or z == 5
    seen = np.isfinite(shown.components)
    assert seen[:, z].all()
    assert dim == 2 or (seen[:, :, y].all() and seen[:, :, :, x].all())
    assert not seen.all()  # tiles that meet no plane are left out
    assert dim == 3 or not np.delete(seen, 5, axis=1).any()
    sample = sample_features(network, case, 0)
    standardisation = fit_standardisation(sample)
    components = fit_components(standardisation.apply(sample))
    features = torch.from_numpy(single_features(case.read_box((0, 0, 0), SHAPE))[z]).float()
    along = standardisation.apply(features.flatten(0, 1)) @ components.directions.T
    expected = ((along - components.low) / (components.high - components.low)).clamp(0, 1)
    assert np.allclose(shown.components[:, z], expected.T.view(3, *SHAPE[1:]), atol=1e-3)
    assert 0 < sum(embedding.share) <= 1.0001


@pytest.mark.parametrize("dim", [2, 3])
def test_one_colour_is_one_feature_in_all_cases(store, dim):
    """Components and their range are fitted to all cases: a voxel has the value of its flipped copy."""
    network = make_network(dim, TILES[dim])
    cases = [store.case(name) for name in "acb"]
    embedding = embed_cases(network, cases, 2 if dim == 2 else None, 0)
    assert [each.case.name for each in embedding.cases] == ["a", "c", "b"]
    if dim == 2:  # the slice is the first case's, the others have their fullest one
        assert [each.centre_vox[0] for each in embedding.cases] == [2, fullest_slice(cases[1]), fullest_slice(cases[2])]
    sample = torch.cat([sample_features(network, case, 0) for case in cases])
    standardisation = fit_standardisation(sample)
    components = fit_components(standardisation.apply(sample))
    assert embedding.share == pytest.approx(components.share.tolist())
    for each in embedding.cases:
        features = torch.from_numpy(single_features(each.case.read_box((0, 0, 0), SHAPE))).float()
        along = standardisation.apply(features.flatten(0, 2)) @ components.directions.T
        scaled = ((along - components.low) / (components.high - components.low)).clamp(0, 1)
        seen = np.isfinite(each.components)
        assert np.allclose(each.components[seen], scaled.T.view(3, *SHAPE).numpy()[seen], atol=1e-3)
    first, last = embedding.cases[0].components, np.flip(embedding.cases[2].components, (1, 3))
    both = np.isfinite(first) & np.isfinite(last)
    assert both.any() or dim == 2
    assert np.allclose(first[both], last[both], atol=1e-3)
    alone = embed_cases(network, cases[:1], 2 if dim == 2 else None, 0).cases[0].components
    assert not np.allclose(alone[np.isfinite(alone)], first[np.isfinite(alone)], atol=1e-2)


def test_slice_with_most_body_and_middle_of_the_body(tmp_path):
    """The mean of a ring lies in its hole, so the middle is the nearest voxel of the ring in mm."""
    ring = np.array([(1, 2, 2), (1, 2, 8), (1, 7, 5), (2, 2, 5), (4, 5, 5), (1, 8, 3)])
    store = write_cases(tmp_path / "cases", {"a": random_volume(0, SHAPE)}, ring)
    case = store.case("a")
    distance = np.linalg.norm((ring - ring.mean(axis=0)) * SPACING_MM, axis=1)
    assert middle_of(case) == tuple(ring[distance.argmin()]) != tuple(np.round(ring.mean(axis=0)))
    assert fullest_slice(case) == 1
    assert embed_cases(make_network(2, TILES[2]), [case], None, 0).cases[0].centre_vox[0] == 1
    assert compare_cases(make_network(2, TILES[2]), store, "a", None, [], 0).query_vox == middle_of(case)


def test_what_is_not_there_is_refused(store):
    network = make_network(3, TILES[3])
    with pytest.raises(UserError, match=r"point 6 0 0: lies outside case a, whose shape .* is 6 10 14"):
        compare_cases(network, store, "a", (6, 0, 0), [], 0)
    with pytest.raises(UserError, match=r"case d: .* has no such case; it has a, b, c"):
        compare_cases(network, store, "a", (0, 0, 0), ["d"], 0)
    with pytest.raises(UserError, match=r"slice 2: these weights are 3D"):
        embed_cases(network, [store.case("a")], 2, 0)
    with pytest.raises(UserError, match=r"lies outside case a"):
        embed_cases(make_network(2, TILES[2]), [store.case("a")], 6, 0)


def test_nearest_ignores_what_was_not_computed():
    cosine = np.full((2, 3, 4), np.nan, np.float32)
    cosine[1, 2, 0], cosine[0, 1, 3] = -0.5, 0.25
    assert find_nearest(cosine) == (0, 1, 3)
