"""Pairs of places in different scans, computed before training, for methods that compare patches of different patients.

A pair is a point in the body of one scan and its match in another. Matches are used if their score is not in the lowest quarter
of all and their cycle error is at most 20 mm. If there are too few, the place in the body's box is used instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import follow_jobs
from nnssl.data.patch_pairs import PairTable
from nnssl.data.patients import patient_in_name
from nnssl.draws import draw_seed
from nnssl.log import logger
from nnssl.matching.points import PointMatcher, cycle_error_mm, least_score, reliable

PARTNERS = 4
"""Number of other scans that a scan is paired with."""
POINTS = 64
"""Number of pairs of places for two scans."""
TRIES = 3
"""Number of points to match for each pair that is needed."""


class Candidates(NamedTuple):
    """Points of one scan and their matches in another.

    Attributes:
        query: Index of the scan that the points belong to.
        key: Index of the other scan.
        points_vox: Points (z, y, x) in the first scan in voxels.
        found_mm: Matches (z, y, x) in the other scan in mm.
        boxed_mm: Matches (z, y, x) by the fallback in the other scan in mm.
        score: Score of the match; 0 without one.
        cycle_mm: Cycle error of the match in mm; infinite without one.
    """

    query: int
    key: int
    points_vox: Float[np.ndarray, "point 3"]
    found_mm: Float[np.ndarray, "point 3"]
    boxed_mm: Float[np.ndarray, "point 3"]
    score: Float[np.ndarray, " point"]
    cycle_mm: Float[np.ndarray, " point"]


def make_pairs(store: CaseStore, matcher: PointMatcher | None, fallback: PointMatcher, seed: int) -> PairTable:
    """Pair places of every scan with places of other patients' scans.

    Args:
        store: Store of the preprocessed cases; the places of a single case are paired with themselves.
        matcher: Matcher by embeddings; None to use the fallback for all places.
        fallback: Matcher for places without a reliable match.
        seed: Random seed of partners and points.
    """
    names = store.names
    partners = choose_partners(names, seed)
    # Both directions are matched while the embeddings of both scans are in memory.
    ways = [way for first, second in partners for way in dict.fromkeys([(first, second), (second, first)])]
    looks = (_look(store, query, key, matcher, fallback, seed) for query, key in ways)
    found = list(looks if matcher is None else follow_jobs(looks, "matching", "matched", len(ways), "pairs of scans"))
    least = least_score(np.concatenate([each.score for each in found]))
    columns = [_take(each, least) for each in sorted(found, key=lambda each: (each.query, each.key))]
    spacings = np.array([store.case(name).spacing_mm for name in names])
    queries, keys, query_vox, key_mm, matched = (np.concatenate(column) for column in zip(*columns, strict=True))
    table = PairTable(tuple(names), queries, keys, query_vox, key_mm / spacings[keys], matched)
    by = "by embeddings" if matcher else "all by the body's box"
    logger.info(
        f"{len(table.query)} pairs of places of {len(names)} scans, {by}: {table.matched.mean():.0%} with a reliable match"
    )
    return table


def choose_partners(names: Sequence[str], seed: int) -> list[tuple[int, int]]:
    """Return the indices of paired scans, each pair once, in an order that keeps the pairs of a scan close together.

    Scans of one patient, identified by their names, are paired only if there is no other patient. A single scan is paired with
    itself.
    """
    order = np.random.default_rng(draw_seed(seed, "partners")).permutation(len(names)).tolist()
    patients = [patient_in_name(names[index]) for index in order]
    if len(set(patients)) == 1:
        patients = [str(place) for place in range(len(order))]
    pairs: dict[tuple[int, int], None] = {}
    for place in range(len(order)):
        ahead = [(place + step) % len(order) for step in range(1, len(order))]
        others = [other for other in ahead if patients[other] != patients[place]]
        for other in others[: PARTNERS // 2]:
            first, second = sorted((order[place], order[other]))
            pairs.setdefault((first, second))
    return list(pairs) or [(0, 0)]


def _look(
    store: CaseStore, query: int, key: int, matcher: PointMatcher | None, fallback: PointMatcher, seed: int
) -> Candidates:
    name, other = store.names[query], store.names[key]
    case = store.case(name)
    body = case.body_vox
    rng = np.random.default_rng(draw_seed(seed, "pairs", f"{name}/{other}"))
    points_vox = body[rng.integers(len(body), size=TRIES * POINTS)].astype(float)
    points_mm = points_vox * np.array(case.spacing_mm)
    boxed_mm = fallback.match_points(name, points_mm, other).points_mm
    if matcher is None:
        score, cycle_mm = np.zeros(len(points_mm)), np.full(len(points_mm), np.inf)
        return Candidates(query, key, points_vox, boxed_mm, boxed_mm, score, cycle_mm)
    matches = matcher.match_points(name, points_mm, other)
    cycle_mm = cycle_error_mm(matcher, name, points_mm, other, matches)
    return Candidates(query, key, points_vox, matches.points_mm, boxed_mm, matches.score, cycle_mm)


def _take(found: Candidates, least: float) -> tuple[np.ndarray, ...]:
    """Return the columns of a table with reliable matches, completed by matches of the fallback."""
    good = reliable(found.score, found.cycle_mm, least)
    taken = np.nonzero(good)[0][:POINTS]
    rest = np.setdiff1d(np.arange(len(good)), taken)[: POINTS - len(taken)]
    places = np.concatenate([taken, rest])
    matched = np.arange(len(places)) < len(taken)
    found_mm = np.where(matched[:, None], found.found_mm[places], found.boxed_mm[places])
    query, key = (np.full(len(places), index) for index in (found.query, found.key))
    return query, key, found.points_vox[places], found_mm, matched
