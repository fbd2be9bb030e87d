"""Labels carried over by networks with known features: perfect ones give perfect labels."""

import numpy as np
import pytest

from nnssl.propagation import carry
from nnssl.propagation.carry import AnnotatedCase, fit_to_cases, probabilities_of
from nnssl.propagation.features import box_positions, read_points
from tests.nnssl.pictures.pointwise import make_network, random_volume, single_features, write_cases

SHAPE = (6, 10, 14)
FOREGROUND = np.array([[1, 1, 2], [4, 8, 11], [2, 5, 5]])
TILE = {2: (1, 8, 8), 3: (4, 8, 10)}


def blobs(seed: int, present=(1, 2)) -> np.ndarray:
    """Return a label map with a box for each label, elsewhere in every case."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.int64)
    for label in present:
        low = [rng.integers(0, n // 2) for n in SHAPE]
        labels[tuple(slice(start, start + n // 3) for start, n in zip(low, SHAPE, strict=True))] = label
    return labels


def image_of(labels: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Return an image whose intensities tell the labels apart."""
    values = np.array([-1.0, 0.5, 2.0])[labels] + noise * np.random.default_rng(seed).standard_normal(labels.shape)
    return values[None].astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_perfect_features_give_perfect_labels(tmp_path, dim, noise):
    labels = {name: blobs(seed) for seed, name in enumerate("abc")}
    volumes = {name: image_of(each, noise, seed) for seed, (name, each) in enumerate(labels.items())}
    store = write_cases(tmp_path / "cases", volumes, FOREGROUND)
    network = make_network(dim, TILE[dim])
    fitted = fit_to_cases(network, [AnnotatedCase(store.case("a"), labels["a"])], (0, 1, 2), 2, 0.0, 0)
    for name in "abc":
        found = probabilities_of(network, store.case(name), fitted, 0.0)
        assert found.sum(axis=0) == pytest.approx(np.ones(SHAPE), abs=1e-5)
        assert np.array_equal(found.argmax(axis=0), labels[name])


def test_two_annotated_cases_that_complete_each_other_find_what_one_does_not(tmp_path):
    labels = {"a": blobs(0, (1,)), "b": blobs(1, (2,)), "c": blobs(2)}
    store = write_cases(tmp_path / "cases", {name: image_of(each) for name, each in labels.items()}, FOREGROUND)
    network = make_network(3, TILE[3])
    annotated = [AnnotatedCase(store.case(name), labels[name]) for name in "ab"]
    both = fit_to_cases(network, annotated, (0, 1, 2), 2, 0.0, 0)
    one = fit_to_cases(network, annotated[:1], (0, 1), 2, 0.0, 0)
    found = [probabilities_of(network, store.case("c"), each, 0.0).argmax(axis=0) for each in (one, both)]
    assert not (found[0] == 2).any()
    assert np.array_equal(found[1], labels["c"])


def test_a_case_equal_to_the_annotated_one_gets_its_labels_back(tmp_path, monkeypatch):
    """With every voxel a prototype, whatever the features are worth."""
    monkeypatch.setattr(carry, "POINTS_PER_LABEL", 10_000)
    volume, labels = random_volume(0, SHAPE), blobs(3)
    store = write_cases(tmp_path / "cases", {"a": volume, "b": volume}, FOREGROUND)
    network = make_network(3, TILE[3])
    fitted = fit_to_cases(network, [AnnotatedCase(store.case("a"), labels)], (0, 1, 2), 10_000, 0.1, 0)
    found = probabilities_of(network, store.case("b"), fitted, 0.0).argmax(axis=0)
    assert np.array_equal(found, labels)


@pytest.mark.parametrize("dim", [2, 3])
def test_points_have_the_features_and_positions_of_their_voxels(tmp_path, dim):
    volume, labels = random_volume(0, SHAPE), blobs(4)
    labels[0, 0, :3] = 9  # not listed, as the ignore label is not
    store = write_cases(tmp_path / "cases", {"a": volume}, FOREGROUND)
    points = read_points(make_network(dim, TILE[dim]), store.case("a"), labels, (0, 1, 2), (50, 9, 9999), 0)
    assert points.labels.bincount().tolist() == [50, 9, (labels == 2).sum()]
    assert points.widths == (6,)
    positions = box_positions(store.case("a"))
    everywhere = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1).reshape(-1, 3)
    rows = {
        tuple(np.round(place, 5)): voxel
        for place, voxel in zip(positions.of_points(everywhere), everywhere, strict=True)
    }
    expected = single_features(volume)
    for feature, place, label in zip(points.features, points.positions, points.labels, strict=True):
        voxel = tuple(rows[tuple(np.round(place.numpy(), 5))])
        assert labels[voxel] == label
        assert np.allclose(feature, expected[voxel], atol=1e-3)


def test_positions_of_a_tile_are_those_of_its_voxels(tmp_path):
    store = write_cases(tmp_path / "cases", {"a": random_volume(0, SHAPE)}, FOREGROUND)
    positions, lower, size = box_positions(store.case("a")), (-1, 3, 2), (4, 5, 6)
    tile = positions.of_tile(lower, size)
    for place in np.ndindex(*size):
        voxel = np.array([place]) + lower
        assert np.allclose(tile[(slice(None), *place)], positions.of_points(voxel)[0], atol=1e-6)
    low, high = np.percentile(FOREGROUND, [1, 99], axis=0)
    assert np.allclose(positions.of_points(np.array([[2, 5, 5]]))[0], (np.array([2, 5, 5]) - low) / (high - low))


def test_smoothing_removes_a_single_voxel(tmp_path):
    labels = blobs(0)
    image = image_of(labels)
    image[0, 5, 9, 13] = 2.0
    store = write_cases(tmp_path / "cases", {"a": image_of(labels), "b": image}, FOREGROUND)
    network = make_network(3, TILE[3])
    fitted = fit_to_cases(network, [AnnotatedCase(store.case("a"), labels)], (0, 1, 2), 2, 0.0, 0)
    sharp, smooth = (probabilities_of(network, store.case("b"), fitted, mm).argmax(axis=0) for mm in (0.0, 2.0))
    assert sharp[5, 9, 13] == 2
    assert smooth[5, 9, 13] == 0
