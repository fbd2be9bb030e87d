"""Comparison of two ways to match places, by a paired bootstrap over pairs of scans.

Both ways are measured at the same points, so only differences are resampled. The unit is the pair of scans, because points of
one pair are alike. With few pairs of scans, the unit is the point: methods that pair scans then only ever see these pairs, and
what varies is the choice of points. An interval that covers other scans would need more of them.

Source: Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 1979; percentile interval of the mean.
Deviations: pairs that share a scan are resampled independently.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from nnssl.draws import draw_seed

CONFIDENCE = 0.95
RESAMPLES = 4000
LEAST_PAIRS = 6
"""Smallest number of pairs of scans that are resampled, which four scans have. The interval of fewer values mostly reflects
their number; that of a single one has no width."""
LEAST_POINTS = 20
"""Smallest number of points that are compared at all."""

Unit = Literal["pairs of scans", "points"]


class Comparison(NamedTuple):
    """Mean values of two ways to match, and the interval of their difference.

    Attributes:
        unit: What was resampled.
        first: Mean of the first way over all units; NaN without points.
        second: Mean of the second way over all units; NaN without points.
        differences: First minus second, of every unit.
        interval: Bounds of the 95 % interval of the mean difference; NaN with fewer than ``LEAST_POINTS`` points, or if only a
            few of many pairs of scans have any.
    """

    unit: Unit
    first: float
    second: float
    differences: tuple[float, ...]
    interval: tuple[float, float]


def compare(
    scans: Sequence[tuple[str, str]],
    first: Sequence[Float[np.ndarray, " point"]],
    second: Sequence[Float[np.ndarray, " point"]],
    seed: int,
) -> Comparison:
    """Compare two ways to match places by the values that they reach at the same points.

    Args:
        scans: Names of both scans for each group of points. Groups of the same two scans form one pair, in either order.
        first: Values of the first way at the points of each group. NaN counts as 0 if the other way has a value; points at
            which neither has one are left out.
        second: Values of the second way at the same points.
        seed: Random seed of the bootstrap.
    """
    few = len({tuple(sorted(names)) for names in scans}) < LEAST_PAIRS
    unit: Unit = "points" if few else "pairs of scans"
    pairs: dict[tuple[str, ...], list[np.ndarray]] = {}
    for names, one, other in zip(scans, first, second, strict=True):
        values = np.stack([one, other], axis=1)
        known = ~np.isnan(values).all(axis=1)
        if known.any():
            pairs.setdefault(tuple(sorted(names)), []).append(np.nan_to_num(values[known]))
    of_pairs = [np.concatenate(groups) for _, groups in sorted(pairs.items())]
    points = np.concatenate(of_pairs) if of_pairs else np.zeros((0, 2))
    units = points if few or not of_pairs else np.stack([each.mean(axis=0) for each in of_pairs])
    # Differences are rounded before they are resampled, so that a file that holds them gives the same interval.
    differences = np.round(units[:, 0] - units[:, 1], 6)
    means = units.mean(axis=0) if len(units) else np.full(2, np.nan)
    enough = len(points) >= LEAST_POINTS and (few or len(of_pairs) >= LEAST_PAIRS)
    interval = interval_of_mean(differences, seed) if enough else (float("nan"), float("nan"))
    return Comparison(unit, float(means[0]), float(means[1]), tuple(differences.tolist()), interval)


def interval_of_mean(values: Float[np.ndarray, " value"], seed: int) -> tuple[float, float]:
    """Return the bounds of the percentile interval of a mean, from resampled values.

    Args:
        values: At least one value.
        seed: Random seed.
    """
    rng = np.random.default_rng(draw_seed(seed, "bootstrap"))
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
