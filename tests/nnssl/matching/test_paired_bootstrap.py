"""The paired bootstrap against loops, its units, and how often it accepts what is no better."""

import numpy as np
import pytest

import nnssl.matching.paired_bootstrap as bootstrap_module
from nnssl.draws import draw_seed
from nnssl.matching.paired_bootstrap import LEAST_PAIRS, LEAST_POINTS, RESAMPLES, compare, interval_of_mean

NAN = float("nan")


def groups(pairs: int, points: int, seed: int = 0) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """Return pairs of scans, each pair with two others, and values at its points, of which no two pairs have as many."""
    rng = np.random.default_rng(seed)
    scans = [(f"case_{i}", f"case_{i + 1}") for i in range(pairs)]
    return scans, [rng.uniform(0, 0.4, size=points + i) for i in range(pairs)]


def slow_interval(values: list[float], seed: int) -> tuple[float, float]:
    """Return the interval with every resampled mean added up value by value, and quantiles from the sorted means."""
    chosen = np.random.default_rng(draw_seed(seed, "bootstrap")).integers(len(values), size=(RESAMPLES, len(values)))
    means = []
    for row in chosen:
        total = 0.0
        for index in row:
            total += values[index]
        means.append(total / len(values))
    means.sort()
    bounds = []
    for share in (0.025, 0.975):
        place = share * (len(means) - 1)
        below = int(place)
        bounds.append(means[below] + (place - below) * (means[below + 1] - means[below]))
    return bounds[0], bounds[1]


def test_interval_against_loops():
    values = [0.3, -0.1, 0.25, 0.0, 0.9, 0.12, 0.07]
    for seed in (0, 5):
        assert interval_of_mean(np.array(values), seed) == pytest.approx(slow_interval(values, seed), abs=1e-12)
    assert interval_of_mean(np.array(values), 0) == interval_of_mean(np.array(values), 0)
    assert interval_of_mean(np.array(values), 0) != interval_of_mean(np.array(values), 1)


def test_pairs_of_scans_are_compared_by_their_means():
    scans, first = groups(LEAST_PAIRS, 9)
    _, second = groups(LEAST_PAIRS, 9, seed=1)
    found = compare(scans, first, second, 3)
    wanted = [float(np.mean([a - b for a, b in zip(*pair, strict=True)])) for pair in zip(first, second, strict=True)]
    assert found.unit == "pairs of scans"
    assert found.differences == pytest.approx(wanted, abs=1e-6)
    assert found.interval == pytest.approx(slow_interval(wanted, 3), abs=1e-5)
    assert found.first - found.second == pytest.approx(np.mean(wanted), abs=1e-6)
    assert found == compare(scans, first, second, 3)


def test_the_file_gives_the_same_interval():
    scans, first = groups(8, 9)
    found = compare(scans, first, [each * 0.9 for each in first], 3)
    assert interval_of_mean(np.array(found.differences), 3) == found.interval


def test_two_scans_are_one_pair_in_either_order():
    scans, first = groups(LEAST_PAIRS, 9)
    _, second = groups(LEAST_PAIRS, 9, seed=1)
    twice = compare([*scans, *[names[::-1] for names in scans]], [*first, *first[::-1]], [*second, *first[::-1]], 0)
    assert len(twice.differences) == LEAST_PAIRS


@pytest.mark.parametrize(
    ("pairs", "unit"), [(1, "points"), (LEAST_PAIRS - 1, "points"), (LEAST_PAIRS, "pairs of scans")]
)
def test_few_pairs_are_compared_by_their_points(pairs, unit):
    scans, first = groups(pairs, 30)
    _, second = groups(pairs, 30, seed=1)
    found = compare(scans, first, second, 0)
    assert found.unit == unit
    assert len(found.differences) == (pairs if unit == "pairs of scans" else sum(map(len, first)))
    assert found.interval[0] < np.mean(found.differences) < found.interval[1]


def test_too_few_points_give_no_interval():
    for count in (0, 1, LEAST_POINTS - 1):
        found = compare([("a", "b")], [np.ones(count)], [np.zeros(count)], 0)
        assert np.isnan(found.interval).all()
        assert not found.interval[0] > 0
    assert compare([("a", "b")], [np.ones(LEAST_POINTS)], [np.zeros(LEAST_POINTS)], 0).interval == (1.0, 1.0)
    spread = compare(*[[each] * 10 for each in (("a", "b"), np.ones(1), np.zeros(1))], 0)
    assert np.isnan(spread.interval).all()


def test_matches_in_a_few_of_many_pairs_give_no_interval():
    """They would be the pairs that happen to be alike; points decide only if there are no other pairs."""
    scans, first = groups(2 * LEAST_PAIRS, 30)
    zeros = [np.zeros(len(each)) for each in first]
    none = [each[: len(each) if index < LEAST_PAIRS - 1 else 0] for index, each in enumerate(first)]
    found = compare(scans, none, [each[: len(other)] for each, other in zip(zeros, none, strict=True)], 0)
    assert len(found.differences) == LEAST_PAIRS - 1
    assert np.isnan(found.interval).all()
    assert compare(scans, first, zeros, 0).interval[0] > 0


def test_a_place_without_tissue_is_not_alike():
    """A match in air has no likeness, which must not take the point out of the comparison."""
    first, second = np.array([NAN, 0.4, NAN, 0.2]), np.array([0.5, NAN, NAN, 0.1])
    found = compare([("a", "b")], [first], [second], 0)
    assert found.differences == pytest.approx((-0.5, 0.4, 0.1))


def test_equal_ways_are_rarely_accepted_and_a_better_one_is(monkeypatch):
    """Of noise around 0, the lower bound is above 0 in about a fortieth of the trials; in a few more with so few pairs."""
    monkeypatch.setattr(bootstrap_module, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    lower = [interval_of_mean(rng.normal(0, 1, size=20), seed)[0] for seed in range(400)]
    assert np.mean([low > 0 for low in lower]) < 0.06
    better = [interval_of_mean(rng.normal(1, 1, size=20), seed)[0] for seed in range(100)]
    assert np.mean([low > 0 for low in better]) > 0.95
