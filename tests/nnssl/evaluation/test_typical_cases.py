"""Typical and different items of clouds whose answer is known."""

import numpy as np
import pytest

from nnssl.evaluation.typical_cases import choose_typical, find_duplicates


def clouds(sizes=(20, 10, 5), width=40, seed=0) -> np.ndarray:
    """Clouds of points around distant centres; the first point of each is its centre."""
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        centre = rng.normal(0, 20, width)
        found.append(np.vstack([centre, centre + rng.normal(0, 1, (size - 1, width))]))
    return np.concatenate(found)


def test_the_centre_of_every_cloud_is_chosen_and_the_largest_comes_first():
    features = clouds()
    chosen = choose_typical(features, 3, seed=0)
    assert [each.item for each in chosen] == [0, 20, 30]
    assert [each.group for each in chosen] == [tuple(range(20)), tuple(range(20, 30)), tuple(range(30, 35))]
    assert all(each.typicality > 1 for each in chosen)


def test_outliers_are_not_represented():
    features = np.vstack([clouds((15, 15)), np.full((1, 40), 60.0), np.full((1, 40), -60.0)])
    for count in (1, 2, 3):
        chosen = choose_typical(features, count, seed=0)
        assert len(chosen) == count
        assert not {30, 31} & {each.item for each in chosen}
    assert len(choose_typical(features, 32, seed=0)) == 32  # unless all are wanted


def test_copies_are_found_also_if_everything_has_one():
    features = clouds((12, 12))
    twins = np.vstack([features, features + 1e-3])
    assert find_duplicates(twins) == {24 + item: item for item in range(24)}


def test_items_that_coincide_count_once():
    features = clouds((12, 12))
    copied = np.vstack([features, features[3] + 1e-3, features[3] - 1e-3])
    assert find_duplicates(copied) == {24: 3, 25: 3}
    assert find_duplicates(features) == {}
    for count in (1, 2, 24):
        chosen = choose_typical(copied, count, seed=0)
        assert len({each.item for each in chosen}) == count
        assert not {24, 25} & {item for each in chosen for item in each.group}
    with pytest.raises(ValueError, match="count must be between 1 and 24, the number of different items, got 25"):
        choose_typical(copied, 25, seed=0)


def test_scale_and_constant_features_do_not_matter():
    features = clouds()
    scaled = np.hstack([features * np.geomspace(1e-3, 1e3, features.shape[1]), np.ones((len(features), 2))])
    assert [each.item for each in choose_typical(scaled, 3, seed=0)] == [0, 20, 30]
    assert len(choose_typical(np.zeros((1, 4)), 1, seed=0)) == 1
