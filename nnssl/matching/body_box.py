"""Matching by the place in the box around the body: the way without learning, which any other has to beat."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from nnssl.data.case_store import CaseStore
from nnssl.matching.points import Matches

TAIL = 1.0
"""Per cent of the body's voxels that may lie outside its box along an axis, on either side: a table, a tube."""


class BodyBoxMatcher:
    """The place that lies as far along the box around the body, axis by axis.

    Source: none; the baseline of methods that learn to match.

    Args:
        store: the preprocessed cases.
    """

    def __init__(self, store: CaseStore) -> None:
        self.store = store
        self._box = lru_cache(maxsize=None)(self._measure)

    def match_points(self, query: str, points_mm: Float[np.ndarray, "point 3"], key: str) -> Matches:
        """Return where points of a case lie in another case; scores are NaN."""
        (low, size), (key_low, key_size) = self._box(query), self._box(key)
        found = (points_mm - low) / size * key_size + key_low
        return Matches(found, np.full(len(found), np.nan))

    def _measure(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower corner of the box around the body and its size, in mm; of the whole volume without a body."""
        case = self.store.case(name)
        spacing = np.array(case.spacing_mm)
        body = case.foreground_vox
        if not len(body):
            body = np.array([[0, 0, 0], np.array(case.shape) - 1])
        low, high = np.percentile(body, [TAIL, 100 - TAIL], axis=0) * spacing
        return low, np.maximum(high - low, spacing)
