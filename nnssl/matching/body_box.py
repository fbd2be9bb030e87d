"""Matching by the relative position in the body's box, the baseline without learning."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.matching.points import Matches

TAIL = 1.0
"""Percentage of body voxels that may lie outside the box at either end of an axis, such as a table or a tube."""


class BodyBoxMatcher:
    """Matcher that keeps the relative position in the body's box along each axis.

    Source: none; baseline for methods that learn to match.

    Args:
        store: Store of the preprocessed cases.
    """

    def __init__(self, store: CaseStore) -> None:
        self.store = store
        self._box = lru_cache(maxsize=None)(lambda name: body_box(store.case(name)))

    def match_points(self, query: str, points_mm: Float[np.ndarray, "point 3"], key: str) -> Matches:
        """Match points of a case to another case; scores are NaN."""
        (low, size), (key_low, key_size) = self._box(query), self._box(key)
        found = (points_mm - low) / size * key_size + key_low
        return Matches(found, np.full(len(found), np.nan))


def body_box(case: StoredCase) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Return the lower corner and the size (z, y, x) of the body's box in mm; those of the whole volume if there is no body."""
    spacing = np.array(case.spacing_mm)
    body = case.foreground_vox
    if not len(body):
        body = np.array([[0, 0, 0], np.array(case.shape) - 1])
    low, high = np.percentile(body, [TAIL, 100 - TAIL], axis=0) * spacing
    return low, np.maximum(high - low, spacing)
