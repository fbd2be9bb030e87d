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
from scipy.spatial.distance import cdist

NEIGHBOURS = 20
"""Largest number of neighbours whose mean distance is the inverse of the typicality (TypiClust)."""
COMPONENTS = 32
"""Largest number of principal components that distances are measured in."""
DUPLICATE_SHARE = 0.03
"""Distance below which two items coincide, as a share of the median distance of two items."""
LEAST_GROUP = 5
"""Number of items below which a cluster is not represented, if there are enough items (TypiClust)."""
MOST_CLUSTERS = 3
"""Largest number of clusters for each item to choose."""


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
    limit = DUPLICATE_SHARE * float(np.median(distance[np.triu_indices(len(distance), 1)]))
    found: dict[int, int] = {}
    for item in range(1, len(distance)):
        earlier = [other for other in range(item) if other not in found and distance[item, other] <= limit]
        if earlier:
            found[item] = earlier[0]
    return found


def choose_typical(features: Float[np.ndarray, "item feature"], count: int, seed: int) -> list[Choice]:
    """Choose items, those of the largest clusters first.

    If clusters are too small to be represented, the items are divided into more of them, up to three times as many.

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
    least = max(1, min(LEAST_GROUP, len(items) // (2 * count)))
    for number in range(count, min(MOST_CLUSTERS * count, len(items)) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            clusters = KMeans(number, n_init=10, random_state=seed).fit_predict(reduced)
        members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
        if sum(len(each) >= least for each in members) >= count:
            break
    choices = [_most_typical(reduced, items, each) for each in members]
    return sorted(choices, key=lambda choice: (-len(choice.group), choice.item))[:count]


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
    return cdist(values, values)
