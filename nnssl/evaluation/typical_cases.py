"""Choice of a few typical and different items by their features.

Source: Hacohen et al., Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets (TypiClust), ICML 2022: as many
clusters as items to choose, and from each the item in the densest place. With few labels, typical items teach more than those at
the border, which a k-centre selection would take first.

Deviations: items that nearly coincide with an earlier one are set aside first, because copies make each other look
typical.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

NEIGHBOURS = 20
"""Largest number of neighbours whose mean distance is the inverse of the typicality (TypiClust)."""
COMPONENTS = 32
"""Largest number of principal components that distances are measured in."""
DUPLICATE_SHARE = 0.1
"""Distance below which two items coincide, as a share of the median distance to the nearest neighbour."""


@dataclass(frozen=True)
class Choice:
    """A chosen item.

    Attributes:
        item: Its index.
        group: Indices of the items of its cluster, itself included.
        typicality: Inverse of its mean distance to its nearest neighbours in the cluster, relative to the median of all items of
            the cluster; 1 in a cluster of fewer than three.
    """

    item: int
    group: tuple[int, ...]
    typicality: float


def find_duplicates(features: Float[np.ndarray, "item feature"]) -> dict[int, int]:
    """Return the items that nearly coincide with an earlier one, with the index of that one.

    Args:
        features: Features of the items.
    """
    distance = _distances(_components(features))
    if len(distance) < 3:
        return {}
    nearest = distance.copy()
    np.fill_diagonal(nearest, np.inf)
    limit = DUPLICATE_SHARE * float(np.median(nearest.min(axis=1)))
    found: dict[int, int] = {}
    for item in range(1, len(distance)):
        earlier = [other for other in range(item) if other not in found and distance[item, other] <= limit]
        if earlier:
            found[item] = earlier[0]
    return found


def choose_typical(features: Float[np.ndarray, "item feature"], count: int, seed: int) -> list[Choice]:
    """Choose items, those of the largest clusters first.

    Args:
        features: Features of the items.
        count: Number of items to choose.
        seed: Random seed of the clusters.

    Raises:
        ValueError: If there are fewer different items.
    """
    from sklearn.cluster import KMeans  # slow to import
    from sklearn.exceptions import ConvergenceWarning

    copies = find_duplicates(features)
    items = np.array([item for item in range(len(features)) if item not in copies])
    if not 1 <= count <= len(items):
        raise ValueError(f"count must be between 1 and {len(items)}, the number of different items, got {count}")
    reduced = _components(features)[items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = KMeans(count, n_init=10, random_state=seed).fit_predict(reduced)
    choices = [_most_typical(reduced, items, np.flatnonzero(clusters == number)) for number in np.unique(clusters)]
    return sorted(choices, key=lambda choice: (-len(choice.group), choice.item))


def _most_typical(reduced: np.ndarray, items: np.ndarray, members: np.ndarray) -> Choice:
    group = tuple(int(item) for item in items[members])
    if len(members) < 3:
        return Choice(group[0], group, 1.0)
    distance = np.sort(_distances(reduced[members]), axis=1)[:, 1 : NEIGHBOURS + 1].mean(axis=1)
    place = int(np.argmin(distance))
    return Choice(group[place], group, float(np.median(distance) / distance[place]))


def _components(features: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Return standardised features in their principal components."""
    values = np.asarray(features, dtype=np.float64)
    deviation = values.std(axis=0)
    values = (values - values.mean(axis=0)) / np.where(deviation > 1e-12, deviation, 1.0)
    left, sizes, _ = np.linalg.svd(values, full_matrices=False)
    kept = min(COMPONENTS, len(sizes))
    return left[:, :kept] * sizes[:kept]


def _distances(values: np.ndarray) -> np.ndarray:
    return np.linalg.norm(values[:, None] - values[None], axis=2)
