"""Pairs of places of different scans, found before training: which patches a method that compares patients looks at.

Each pair is a point in the body of one scan and its match in another. Matches are taken whose score is not in the lowest quarter
and that lead back to within 20 mm of their point; where too few are found, the place in the body's box is.
"""

from collections.abc import Callable

import numpy as np

from nnssl.data.case_store import CaseStore
from nnssl.data.patch_pairs import PairTable
from nnssl.draws import draw_seed
from nnssl.matching.points import PointMatcher, cycle_error_mm

PARTNERS = 8
"""Other scans that a scan is paired with."""
POINTS = 32
"""Pairs of places of two scans."""
TRIES = 3
"""Points that are looked for, for each that is wanted."""
LARGEST_CYCLE_MM = 20.0
LEAST_SCORE_RANK = 0.25


def make_pairs(
    store: CaseStore, matcher: PointMatcher | None, fallback: PointMatcher, seed: int, say: Callable[[str], None]
) -> PairTable:
    """Pair places of every scan with places of others.

    Args:
        store: the preprocessed cases; of a single one, places are paired with themselves.
        matcher: None to take the fallback for all.
        fallback: for places without a reliable match.
        seed: of partners and points.
        say: called with a line about what was found.
    """
    names = store.names
    columns: dict[str, list] = {"query": [], "key": [], "query_vox": [], "key_vox": [], "matched": []}
    for first, name in enumerate(names):
        case = store.case(name)
        spacing = np.array(case.spacing_mm)
        body = case.foreground_vox
        if not len(body):
            body = np.array(case.shape)[None] // 2
        rng = np.random.default_rng(draw_seed(seed, "pairs", name))
        others = [index for index in rng.permutation(len(names)).tolist() if index != first][:PARTNERS] or [first]
        for second in others:
            points = body[rng.integers(len(body), size=TRIES * POINTS)].astype(float)
            chosen, found_mm, matched = _match(name, points * spacing, names[second], matcher, fallback)
            columns["query"] += [first] * len(chosen)
            columns["key"] += [second] * len(chosen)
            columns["query_vox"].append(points[chosen])
            columns["key_vox"].append(found_mm / np.array(store.case(names[second]).spacing_mm))
            columns["matched"].append(matched)
    table = PairTable(
        tuple(names),
        np.array(columns["query"]),
        np.array(columns["key"]),
        np.concatenate(columns["query_vox"]),
        np.concatenate(columns["key_vox"]),
        np.concatenate(columns["matched"]),
    )
    by = "by embeddings" if matcher else "all by the body's box"
    say(
        f"{len(table.query)} pairs of places of {len(names)} scans, {by}: {table.matched.mean():.0%} with a reliable match"
    )
    return table


def _match(
    query: str, points_mm: np.ndarray, key: str, matcher: PointMatcher | None, fallback: PointMatcher
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which points are taken, where they lie in the other scan, and which of them were matched."""
    taken = np.zeros(0, dtype=int)
    found = np.zeros((0, 3))
    if matcher is not None:
        matches = matcher.match_points(query, points_mm, key)
        cycle = cycle_error_mm(matcher, query, points_mm, key, matches)
        good = (cycle <= LARGEST_CYCLE_MM) & (matches.score >= np.quantile(matches.score, LEAST_SCORE_RANK))
        taken = np.nonzero(good)[0][:POINTS]
        found = matches.points_mm[taken]
    rest = np.setdiff1d(np.arange(len(points_mm)), taken)[: POINTS - len(taken)]
    boxed = fallback.match_points(query, points_mm[rest], key).points_mm
    matched = np.arange(len(taken) + len(rest)) < len(taken)
    return np.concatenate([taken, rest]), np.concatenate([found, boxed]), matched
