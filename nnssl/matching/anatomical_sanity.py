"""Sanity checks of anatomical embeddings after SAM's training: whether they find the same place, measured without labels.

In other scans, only reliable matches (``matching.points.reliable``) are evaluated, of which pairs of patches are made. They are
usable if the tissue around them is more similar to that around their points than the tissue at the same places of the body's
box is. No fixed bound can decide this: the box itself leads back to every point and keeps the order of places perfectly.

Source: the sanity checks that follow from Yan et al., SAM, TMI 2022; the comparison and the bounds of warnings are this
project's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import spearmanr

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import follow_jobs
from nnssl.data.patch_boxes import draw_box
from nnssl.draws import make_generator
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddingMatcher
from nnssl.matching.paired_bootstrap import CONFIDENCE, LEAST_PAIRS, LEAST_POINTS, Comparison, Unit, compare
from nnssl.matching.points import cycle_error_mm, least_score, reliable
from nnssl.schema import STRICT
from nnssl.views.points import cell_centres_vox
from nnssl.views.spatial import map_points

SCHEMA_VERSION = 3
"""Version 3: matches are compared with the body's box, and the order of places is a warning."""
PATCHES = 16
PAIRS = 50
POINTS_PER_PAIR = 20
HIT_MM = 10.0
"""Largest distance of a hit, unless the longest edge of a cell, whose centre a match is, is longer."""
LEAST_HIT_SHARE = 0.8
LEAST_CORRELATION = (0.95, 0.9, 0.9)
"""Smallest rank correlation between the positions of points and matches along z, y and x, without a warning."""


@dataclass(frozen=True)
class Sanity:
    """Results of the sanity checks; errors are medians.

    Attributes:
        self_error_mm: Error in mm of points matched to another crop of the same scan.
        self_hit_share: Share of these points with an error of at most ``hit_mm``.
        permuted_error_mm: The same error in mm for shuffled embeddings of the other crop, which is chance level.
        cycle_error_mm: Distance in mm between a point and the match of its match in another scan.
        rank_correlation: Spearman's correlation between the positions of points and their reliable matches in other scans, along
            z, y and x.
        likeness: Mean correlation of the voxels around a point with those around its reliable match, over all units.
        box_likeness: The same for the places of these points in the body's box.
        unit: What the differences are of: pairs of scans or, if there are few, points.
        differences: Likeness of the matches minus that of the places in the body's box, of every unit.
        difference_interval: Bounds of the 95 % interval of the mean difference, from a bootstrap over the units.
        usable: Whether matches in other scans are better than places in the body's box: the lower bound is above 0.
        reasons: Reasons why they are not; empty if usable.
        hit_mm: Largest distance in mm of a hit.
        reliable_share: Share of reliable matches in other scans.
        warnings: Failures within a scan or of the order of places, which do not affect ``usable``.
        schema_version: Version of the file's schema.
    """

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    self_error_mm: float
    self_hit_share: float
    permuted_error_mm: float
    cycle_error_mm: float
    rank_correlation: tuple[float, float, float]
    likeness: float
    box_likeness: float
    unit: Unit
    differences: tuple[float, ...]
    difference_interval: tuple[float, float]
    usable: bool
    reasons: tuple[str, ...]
    hit_mm: float = HIT_MM
    reliable_share: float = 1.0
    warnings: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION


def examine(
    method: Any,
    store: CaseStore,
    seed: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[dict[str, Any], list[str]]:
    """Measure how well the embeddings of a finished run match places.

    Args:
        method: SAM in evaluation mode.
        store: Store of the preprocessed cases.
        seed: Random seed of the points.
        device: Device for the computation.
        autocast: Function that returns the context of mixed precision.

    Returns:
        The content of ``Sanity``, and lines for the user.
    """
    with torch.no_grad():
        sanity = measure(method, store, seed, device, autocast)
    return asdict(sanity), describe(sanity)


def measure(
    method: Any, store: CaseStore, seed: int, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> Sanity:
    """Run all checks of a method's embeddings; see ``examine``."""
    errors, permuted = self_match(method, store, seed, device, autocast)
    matcher = EmbeddingMatcher(method.embedding, store, method.configuration.patch_size, device, autocast)
    box = BodyBoxMatcher(store)

    def look(query: str, key: str, points_mm: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the points, their matches with scores and errors, and the likeness of matches and of the box."""
        matches = matcher.match_points(query, points_mm, key)
        cycles_mm = cycle_error_mm(matcher, query, points_mm, key, matches)
        boxed_mm = box.match_points(query, points_mm, key).points_mm
        alike = [likeness(store, query, points_mm, key, found_mm) for found_mm in (matches.points_mm, boxed_mm)]
        return points_mm, matches.points_mm, matches.score, cycles_mm, *alike

    pairs = draw_pairs(store, seed)
    scans = [(query, key) for query, key, _ in pairs]
    looked = follow_jobs((look(*pair) for pair in pairs), "matching", "matched", len(pairs), "pairs of scans")
    places, found, scores, cycles, own, other = zip(*looked, strict=True)
    least = least_score(np.concatenate(scores))
    taken = [reliable(score, cycle, least) for score, cycle in zip(scores, cycles, strict=True)]
    # Correlations are within each pair, because differences in size and position between scans are irrelevant to matching.
    of_pairs = [
        [_rank_correlation(a[good, axis], b[good, axis]) for a, b, good in zip(places, found, taken, strict=True)]
        for axis in range(3)
    ]
    of_matches, of_box = ([a[good] for a, good in zip(each, taken, strict=True)] for each in (own, other))
    compared = compare(scans, of_matches, of_box, seed)
    hit_mm = hit_within_mm(method)
    numbers: dict[str, Any] = {
        "self_error_mm": float(np.median(errors)),
        "self_hit_share": float((errors <= hit_mm).mean()),
        "permuted_error_mm": float(np.median(permuted)),
        "cycle_error_mm": float(np.median(np.concatenate(cycles))),
        "rank_correlation": tuple(_mean(np.array(each)) for each in of_pairs),
        "likeness": compared.first,
        "box_likeness": compared.second,
        "unit": compared.unit,
        "differences": compared.differences,
        "difference_interval": compared.interval,
        "hit_mm": hit_mm,
        "reliable_share": float(np.concatenate(taken).mean()),
    }
    reasons = what_fails(compared)
    return Sanity(**numbers, usable=not reasons, reasons=tuple(reasons), warnings=tuple(what_is_coarse(numbers)))


def what_fails(compared: Comparison) -> list[str]:
    """Return the reasons why matches in other scans are not better than places in the body's box.

    Args:
        compared: Likeness of the tissue at matches, compared with that at places in the body's box.
    """
    low, _ = compared.interval
    if low > 0:
        return []
    if np.isnan(low):
        return [
            f"fewer than {LEAST_POINTS} reliable matches in other scans, or in fewer than {LEAST_PAIRS} of many pairs of scans, "
            "are too few to compare them with the body's box"
        ]
    return [
        f"tissue around matches ({compared.first:.2f}) is not reliably more similar than at the same place in the body's box "
        f"({compared.second:.2f}): {describe_difference(compared.differences, compared.interval, compared.unit)}, and the "
        "lower bound must be above 0"
    ]


def describe_difference(differences: Sequence[float], interval: tuple[float, float], unit: Unit) -> str:
    """Return the mean difference with its interval as text."""
    mean = sum(differences) / max(1, len(differences))
    return (
        f"mean difference {mean:.3f}, {CONFIDENCE:.0%} interval {interval[0]:.3f} to {interval[1]:.3f} over "
        f"{len(differences)} {unit}"
    )


def what_is_coarse(numbers: dict[str, Any]) -> list[str]:
    """Return warnings on matches that are less exact than SAM allows, though they may still beat the box."""
    warnings = []
    if numbers["self_hit_share"] < LEAST_HIT_SHARE:
        share, hit_mm = numbers["self_hit_share"], numbers["hit_mm"]
        warnings.append(f"only {share:.0%} of points found within {hit_mm:g} mm in another crop of the scan")
    for axis, value, least in zip("zyx", numbers["rank_correlation"], LEAST_CORRELATION, strict=True):
        if value < least:
            warnings.append(f"the rank correlation of places along {axis} in other scans is only {value:.2f}")
    return warnings


def hit_within_mm(method: Any) -> float:
    """Return the largest distance of a hit: 10 mm, or the longest edge of a fine cell if that is longer."""
    own = method.configuration
    cells = method.embedding.grids(own.patch_size)["fine"]
    edges = zip(own.patch_size, cells, own.spacing_mm, strict=True)
    return max(HIT_MM, *(voxels / count * mm for voxels, count, mm in edges))


def describe(sanity: Sanity) -> list[str]:
    """Describe the checks in lines for the user."""
    z, y, x = sanity.rank_correlation
    lines = [
        f"Places found in another crop of the same scan: {sanity.self_hit_share:.0%} within {sanity.hit_mm:g} mm, median error "
        f"{sanity.self_error_mm:.1f} mm (chance {sanity.permuted_error_mm:.1f} mm)",
        f"Places found in other scans: cycle error {sanity.cycle_error_mm:.1f} mm; {sanity.reliable_share:.0%} are reliable, "
        f"with a rank correlation of {z:.2f} {y:.2f} {x:.2f} (z y x) and a tissue similarity of {sanity.likeness:.2f} "
        f"(body's box {sanity.box_likeness:.2f})",
    ]
    if not np.isnan(sanity.difference_interval).any():
        difference = describe_difference(sanity.differences, sanity.difference_interval, sanity.unit)
        lines.append(f"Tissue similarity of matches minus that of the body's box: {difference}")
    lines += [f"WARNING: {each}; train longer, or on more scans" for each in sanity.warnings]
    if sanity.usable:
        return [*lines, "The embeddings find places in other scans better than the body's box does."]
    return [
        *lines,
        f"The embeddings do NOT find places in other scans; use the body's box instead. Reasons: {'; '.join(sanity.reasons)}",
    ]


def self_match(
    method: Any, store: CaseStore, seed: int, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors in mm of points matched to another crop of their patch, and those of chance."""
    patch = method.configuration.patch_size
    spacing = torch.tensor(method.configuration.spacing_mm)
    errors: list[np.ndarray] = []
    permuted: list[np.ndarray] = []
    for index in range(PATCHES):
        case = store.case(store.names[index % len(store.names)])
        generator = make_generator(seed, "sanity/patches", index)
        lower = draw_box(case.shape, patch, case.foreground_vox, 1.0, generator)
        volume = torch.from_numpy(case.read_box(lower, patch))[None].to(device)
        views = method.make_views(volume, [generator])
        with autocast():
            maps = method.embedding(torch.cat([views.first, views.second]))
        here, there, valid = (each[0].cpu() for each in views.fine[0])
        cells = maps.fine.shape[2:]
        wide = torch.nn.functional.interpolate(maps.coarse, cells, mode="trilinear", align_corners=False)
        joined = torch.cat([maps.fine, torch.nn.functional.normalize(wide, dim=1)], dim=1).float().cpu()
        place = (here + 0.5) / torch.tensor(patch) * torch.tensor(cells) - 0.5
        z, y, x = place.round().long().T
        similarity = joined[0][:, z, y, x].T @ joined[1].flatten(1)
        centres = cell_centres_vox(cells, patch)
        second = views.params[1]
        truth_mm = map_points(there[None], second, "to_input")[0] * spacing
        cells_mm = map_points(centres[None], second, "to_input")[0] * spacing
        shuffled = torch.randperm(len(centres), generator=generator)
        for results, order in ((errors, torch.arange(len(centres))), (permuted, shuffled)):
            distance = (cells_mm[similarity[:, order].argmax(dim=1)] - truth_mm).norm(dim=1)
            results.append(distance[valid > 0].numpy())
    return np.concatenate(errors), np.concatenate(permuted)


def draw_pairs(store: CaseStore, seed: int) -> list[tuple[str, str, np.ndarray]]:
    """Return pairs of different cases, or of a single case with itself, with points in mm in the body of the first."""
    pairs = []
    for index in range(PAIRS):
        rng = np.random.default_rng([seed, index])
        first = index % len(store.names)
        second = (first + 1 + int(rng.integers(max(1, len(store.names) - 1)))) % len(store.names)
        case = store.case(store.names[first])
        body = case.foreground_vox
        if not len(body):  # no body was found, so points are drawn anywhere
            body = rng.integers(case.shape, size=(POINTS_PER_PAIR, 3))
        points = body[rng.integers(len(body), size=POINTS_PER_PAIR)]
        pairs.append((case.name, store.names[second], points * np.array(case.spacing_mm)))
    return sorted(pairs, key=lambda pair: pair[:2])  # sorted for reuse of cached embeddings


def likeness(store: CaseStore, query: str, points_mm: np.ndarray, key: str, found_mm: np.ndarray) -> np.ndarray:
    """Return the correlation (-1 to 1) of voxels around points with those around their matches, averaged over channels.

    Voxels outside either scan are ignored. The result is NaN if the remaining voxels are constant.
    """
    values = []
    for pair_mm in zip(points_mm, found_mm, strict=True):
        boxes, common = [], np.array(True)
        for name, place_mm in zip((query, key), pair_mm, strict=True):
            case = store.case(name)
            size = surroundings_vox(case.spacing_mm)
            lower = np.round(place_mm / np.array(case.spacing_mm)).astype(int) - np.array(size) // 2
            boxes.append(case.read_box(lower.tolist(), size))
            axes = [
                (np.arange(n) + first >= 0) & (np.arange(n) + first < length)
                for first, n, length in zip(lower, size, case.shape, strict=True)
            ]
            common = common & axes[0][:, None, None] & axes[1][:, None] & axes[2]
        of_channels = [_correlation(a[common], b[common]) for a, b in zip(*boxes, strict=True)]
        varying = [value for value in of_channels if not np.isnan(value)]
        values.append(np.mean(varying) if varying else np.nan)
    return np.array(values)


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's correlation; NaN if either side is constant."""
    if len(first) < 2 or min(np.ptp(first), np.ptp(second)) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _mean(values: np.ndarray) -> float:
    """Return the mean of all values except NaN; NaN if there are none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; NaN if either side is constant."""
    if not len(first) or min(first.std(), second.std()) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def surroundings_vox(spacing_mm: Sequence[float], reach_mm: float = 15.0) -> tuple[int, ...]:
    """Return the shape in voxels of a box that extends ``reach_mm`` to every side."""
    return tuple(2 * max(1, round(reach_mm / mm)) + 1 for mm in spacing_mm)
