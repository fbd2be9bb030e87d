"""What every way of matching points offers, and the check that any of them can be put to."""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float

LARGEST_CYCLE_MM = 20.0
LEAST_SCORE_RANK = 0.25


class Matches(NamedTuple):
    """Where points were found.

    Attributes:
        points_mm: zyx from the centre of the first voxel of the preprocessed key case.
        score: how much the two places are alike, at most 1; NaN where the way of matching has no such number.
    """

    points_mm: Float[np.ndarray, "point 3"]
    score: Float[np.ndarray, " point"]


class PointMatcher(Protocol):
    """Finds the places of one case in another."""

    def match_points(self, query: str, points_mm: Float[np.ndarray, "point 3"], key: str) -> Matches:
        """Return where points of a case lie in another case.

        Args:
            query: name of the case that the points belong to.
            points_mm: zyx from the centre of the first voxel of the preprocessed query case.
            key: name of the other case.
        """
        ...


def cycle_error_mm(
    matcher: PointMatcher, query: str, points_mm: Float[np.ndarray, "point 3"], key: str, matches: Matches
) -> Float[np.ndarray, " point"]:
    """Return how far from each point one ends when its match is looked for in the query case again.

    Args:
        matcher: that made the matches.
        query: name of the case that the points belong to.
        points_mm: zyx.
        key: name of the other case.
        matches: of the points in the key case.
    """
    back = matcher.match_points(key, matches.points_mm, query)
    return np.linalg.norm(back.points_mm - points_mm, axis=1)


def least_score(scores: Float[np.ndarray, " point"]) -> float:
    """Return the score that matches of a data set have to reach, so that the lowest quarter of them all is left out."""
    return float(np.quantile(scores, LEAST_SCORE_RANK))


def reliable(
    scores: Float[np.ndarray, " point"], cycles_mm: Float[np.ndarray, " point"], least: float
) -> Bool[np.ndarray, " point"]:
    """Return which matches are taken: those that lead back to near their point, and score high enough.

    Args:
        scores: of matches.
        cycles_mm: how far from their point one ends, as ``cycle_error_mm`` says it.
        least: as ``least_score`` says it.
    """
    return (cycles_mm <= LARGEST_CYCLE_MM) & (scores >= least)
