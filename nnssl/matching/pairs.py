"""Pairs of places of different scans, found before training: which patches a method that compares patients looks at.

Each pair is a point in the body of one scan and its match in another. Matches are taken whose score is not in the lowest quarter
of all, and that lead back to within 20 mm of their point; where too few are found, the place in the body's box is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nnssl.data.case_store import CaseStore
from nnssl.data.patch_pairs import PairTable
from nnssl.data.patients import patient_in_name
from nnssl.draws import draw_seed
from nnssl.log import logger
from nnssl.matching.points import PointMatcher, cycle_error_mm, least_score, reliable

PARTNERS = 4
"""Other scans that a scan is paired with."""
POINTS = 64
"""Pairs of places of two scans."""
TRIES = 3
"""Points that are looked for, for each that is wanted."""


class Candidates(NamedTuple):
    """Points of one scan and where they were found in another.

    Attributes:
        query: index of the scan that the points belong to.
        key: index of the other.
        points_vox: zyx in the first scan.
        found_mm: zyx in the other.
        boxed_mm: zyx in the other, by the fallback.
        score: of the match, 0 without one.
        cycle_mm: how far the way back ends from the point, infinite without a match.
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
        store: the preprocessed cases; of a single one, places are paired with themselves.
        matcher: None to take the fallback for all.
        fallback: for places without a reliable match.
        seed: of partners and points.
    """
    names = store.names
    found = []
    for first, second in choose_partners(names, seed):
        # both ways at once, while the embeddings of both are there
        for query, key in ((first, second), (second, first)) if first != second else ((first, second),):
            found.append(_look(store, query, key, matcher, fallback, seed))
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
    """Return which scans are paired, by index and each pair once, in an order in which a scan's pairs are near one another.

    Scans of one patient, as their names tell, are paired only where there is no other patient; a single scan with itself.
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
    """Return the columns of a table for the reliable matches, or for the fallback's where they are too few."""
    good = reliable(found.score, found.cycle_mm, least)
    taken = np.nonzero(good)[0][:POINTS]
    rest = np.setdiff1d(np.arange(len(good)), taken)[: POINTS - len(taken)]
    places = np.concatenate([taken, rest])
    matched = np.arange(len(places)) < len(taken)
    found_mm = np.where(matched[:, None], found.found_mm[places], found.boxed_mm[places])
    query, key = (np.full(len(places), index) for index in (found.query, found.key))
    return query, key, found.points_vox[places], found_mm, matched
