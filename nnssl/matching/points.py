"""The interface of point matchers, and the cycle check that selects reliable matches."""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float

LARGEST_CYCLE_MM = 20.0
LEAST_SCORE_RANK = 0.25


class Matches(NamedTuple):
    """Matches of points.

    Attributes:
        points_mm: Positions (z, y, x) in mm from the centre of the first voxel of the preprocessed key case.
        score: Similarity of both places, at most 1; NaN if the matcher has no score.
    """

    points_mm: Float[np.ndarray, "point 3"]
    score: Float[np.ndarray, " point"]


class PointMatcher(Protocol):
    """Matches places of one case to another."""

    def match_points(self, query: str, points_mm: Float[np.ndarray, "point 3"], key: str) -> Matches:
        """Match points of a case to another case.

        Args:
            query: Name of the case that the points belong to.
            points_mm: Positions (z, y, x) in mm from the centre of the first voxel of the preprocessed query case.
            key: Name of the other case.
        """
        ...


def cycle_error_mm(
    matcher: PointMatcher, query: str, points_mm: Float[np.ndarray, "point 3"], key: str, matches: Matches
) -> Float[np.ndarray, " point"]:
    """Return the distance in mm between each point and the match of its match in the query case.

    Args:
        matcher: Matcher that made the matches.
        query: Name of the case that the points belong to.
        points_mm: Positions (z, y, x) of the points in mm.
        key: Name of the other case.
        matches: Matches of the points in the key case.
    """
    back = matcher.match_points(key, matches.points_mm, query)
    return np.linalg.norm(back.points_mm - points_mm, axis=1)


def least_score(scores: Float[np.ndarray, " point"]) -> float:
    """Return the score threshold of a data set, which excludes the lowest quarter of all matches."""
    return float(np.quantile(scores, LEAST_SCORE_RANK))


def reliable(
    scores: Float[np.ndarray, " point"], cycles_mm: Float[np.ndarray, " point"], least: float
) -> Bool[np.ndarray, " point"]:
    """Return which matches are reliable: those with a small cycle error and a sufficient score.

    Args:
        scores: Scores of the matches.
        cycles_mm: Cycle errors of the matches from ``cycle_error_mm``.
        least: Score threshold from ``least_score``.
    """
    return (cycles_mm <= LARGEST_CYCLE_MM) & (scores >= least)
