"""Do anatomical embeddings find the same place? Measured without labels, after SAM's training.

What is judged in other scans are the matches that pairs of patches are made of, those that ``matching.points.reliable`` takes.

Source: the sanity checks that follow from Yan et al., SAM, TMI 2022; thresholds are this project's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import spearmanr

from nnssl.data.case_store import CaseStore
from nnssl.data.loader import draw_box
from nnssl.draws import make_generator
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddingMatcher
from nnssl.matching.points import cycle_error_mm, least_score, reliable
from nnssl.schema import STRICT
from nnssl.views.points import cell_centres_vox
from nnssl.views.spatial import map_points

SCHEMA_VERSION = 2
"""2: reliable matches are judged, not all; what falls short within a scan is a warning."""
PATCHES = 16
PAIRS = 50
POINTS_PER_PAIR = 20
HIT_MM = 10.0
"""Or the longest edge of a cell where that is longer: a match is the centre of a cell."""
LEAST_HIT_SHARE = 0.8
LARGEST_MEDIAN_CYCLE_MM = 20.0
LEAST_CORRELATION = (0.95, 0.9, 0.9)
"""Of the place of a point and of its match along z, y and x, by ranks."""


@dataclass(frozen=True)
class Sanity:
    """How well places are found; lengths in mm, medians.

    Attributes:
        self_error_mm: between the true place of a point in another crop of the same scan and the one found.
        self_hit_share: of points that are found within ``hit_mm``.
        permuted_error_mm: the same with the other crop's embeddings shuffled: chance.
        cycle_error_mm: from a point to the place that its match in another scan is found at in the first one.
        rank_correlation: Spearman's, of the place of points and of their reliable matches in other scans, along z, y, x.
        likeness: mean correlation of the voxels around a point and around its reliable match.
        box_likeness: the same of these points with the body box instead of embeddings.
        usable: whether matches in other scans are better than the places of the body's box.
        reasons: why not, empty if usable.
        hit_mm: how near counts as found.
        reliable_share: of the matches in other scans.
        warnings: what falls short within a scan, which decides nothing.
        schema_version: of the file.
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
    """Measure how well the embeddings of a finished run find places.

    Args:
        method: SAM, in evaluation mode.
        store: the preprocessed cases.
        seed: of the points.
        device: where to compute.
        autocast: gives the context of mixed precision.

    Returns:
        The content of ``Sanity``, and lines for the user.
    """
    with torch.no_grad():
        sanity = measure(method, store, seed, device, autocast)
    return asdict(sanity), describe(sanity)


def measure(
    method: Any, store: CaseStore, seed: int, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> Sanity:
    """Return all checks of a method's embeddings; see ``examine``."""
    errors, permuted = self_match(method, store, seed, device, autocast)
    matcher = EmbeddingMatcher(method.embedding, store, method.configuration.patch_size, device, autocast)
    box = BodyBoxMatcher(store)
    looked = []
    for query, key, points_mm in draw_pairs(store, seed):
        matches = matcher.match_points(query, points_mm, key)
        cycles_mm = cycle_error_mm(matcher, query, points_mm, key, matches)
        boxed_mm = box.match_points(query, points_mm, key).points_mm
        alike = [likeness(store, query, points_mm, key, found_mm) for found_mm in (matches.points_mm, boxed_mm)]
        looked.append((points_mm, matches.points_mm, matches.score, cycles_mm, *alike))
    places, found, scores, cycles, own, other = zip(*looked, strict=True)
    least = least_score(np.concatenate(scores))
    taken = [reliable(score, cycle, least) for score, cycle in zip(scores, cycles, strict=True)]
    # within each pair: scans that are larger or begin elsewhere say nothing of how well places are found
    of_pairs = [
        [_rank_correlation(a[good, axis], b[good, axis]) for a, b, good in zip(places, found, taken, strict=True)]
        for axis in range(3)
    ]
    good, hit_mm = np.concatenate(taken), hit_within_mm(method)
    numbers: dict[str, Any] = {
        "self_error_mm": float(np.median(errors)),
        "self_hit_share": float((errors <= hit_mm).mean()),
        "permuted_error_mm": float(np.median(permuted)),
        "cycle_error_mm": float(np.median(np.concatenate(cycles))),
        "rank_correlation": tuple(_mean(np.array(each)) for each in of_pairs),
        "likeness": _mean(np.concatenate(own)[good]),
        "box_likeness": _mean(np.concatenate(other)[good]),
        "hit_mm": hit_mm,
        "reliable_share": float(good.mean()),
    }
    reasons = what_fails(numbers)
    return Sanity(**numbers, usable=not reasons, reasons=tuple(reasons), warnings=tuple(what_is_coarse(numbers)))


def what_fails(numbers: dict[str, Any]) -> list[str]:
    """Return why matches in other scans are worth less than the places of the body's box, in words."""
    failing = []
    if not numbers["cycle_error_mm"] <= LARGEST_MEDIAN_CYCLE_MM:
        failing.append(f"matches lead back to a place {numbers['cycle_error_mm']:.0f} mm away")
    for axis, value, least in zip("zyx", numbers["rank_correlation"], LEAST_CORRELATION, strict=True):
        if not value >= least:
            failing.append(f"order of places along {axis} kept with a correlation of {value:.2f} only")
    if not numbers["likeness"] > numbers["box_likeness"]:
        failing.append(
            f"tissue around matches is no more alike ({numbers['likeness']:.2f}) than at the same place of the body box "
            f"({numbers['box_likeness']:.2f})"
        )
    return failing


def what_is_coarse(numbers: dict[str, Any]) -> list[str]:
    """Return what falls short within a scan: places are found less exactly than SAM can, be it better than the box does."""
    if numbers["self_hit_share"] >= LEAST_HIT_SHARE:
        return []
    share, hit_mm = numbers["self_hit_share"], numbers["hit_mm"]
    return [f"only {share:.0%} of points found within {hit_mm:g} mm in another crop of the scan"]


def hit_within_mm(method: Any) -> float:
    """Return how near to a place counts as found: 10 mm, or the longest edge of a fine cell."""
    own = method.configuration
    cells = method.embedding.grids(own.patch_size)["fine"]
    edges = zip(own.patch_size, cells, own.spacing_mm, strict=True)
    return max(HIT_MM, *(voxels / count * mm for voxels, count, mm in edges))


def describe(sanity: Sanity) -> list[str]:
    """Return the checks as lines for the user."""
    z, y, x = sanity.rank_correlation
    lines = [
        f"Places found in another crop of the same scan: {sanity.self_hit_share:.0%} within {sanity.hit_mm:g} mm, median error "
        f"{sanity.self_error_mm:.1f} mm (chance {sanity.permuted_error_mm:.1f} mm)",
        f"Places found in other scans: back within {sanity.cycle_error_mm:.1f} mm, {sanity.reliable_share:.0%} of them reliable: "
        f"correlation of places {z:.2f} {y:.2f} {x:.2f} (z y x), likeness of the tissue {sanity.likeness:.2f} "
        f"(body box {sanity.box_likeness:.2f})",
    ]
    lines += [f"WARNING: {each}; train longer, or on more scans" for each in sanity.warnings]
    if sanity.usable:
        return [*lines, "The embeddings find places in other scans better than the body's box does"]
    return [
        *lines,
        f"The embeddings do NOT find places in other scans; take the place in the body box instead: {'; '.join(sanity.reasons)}",
    ]


def self_match(
    method: Any, store: CaseStore, seed: int, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors in mm of points that are looked for in another crop of their patch, and those of chance."""
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
    """Return pairs of different cases with points in mm in the body of the first; a single case with itself."""
    pairs = []
    for index in range(PAIRS):
        rng = np.random.default_rng([seed, index])
        first = index % len(store.names)
        second = (first + 1 + int(rng.integers(max(1, len(store.names) - 1)))) % len(store.names)
        case = store.case(store.names[first])
        body = case.foreground_vox
        if not len(body):  # nothing brighter than the rest was found: anywhere will do
            body = rng.integers(case.shape, size=(POINTS_PER_PAIR, 3))
        points = body[rng.integers(len(body), size=POINTS_PER_PAIR)]
        pairs.append((case.name, store.names[second], points * np.array(case.spacing_mm)))
    return sorted(pairs, key=lambda pair: pair[:2])  # so that embeddings that were made are used again


def likeness(store: CaseStore, query: str, points_mm: np.ndarray, key: str, found_mm: np.ndarray) -> np.ndarray:
    """Return the correlation of the voxels around points and around their matches, -1 to 1, the mean over channels.

    Voxels that lie outside either scan are left out; NaN where nothing is left that varies.
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
    """Return Spearman's correlation; NaN where a side does not vary."""
    if len(first) < 2 or min(np.ptp(first), np.ptp(second)) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is a number; NaN where nothing is."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; NaN where one side does not vary."""
    if not len(first) or min(first.std(), second.std()) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def surroundings_vox(spacing_mm: Sequence[float], reach_mm: float = 15.0) -> tuple[int, ...]:
    """Return the voxels of a box that reaches so far to every side; cases of a plan have one spacing."""
    return tuple(2 * max(1, round(reach_mm / mm)) + 1 for mm in spacing_mm)
