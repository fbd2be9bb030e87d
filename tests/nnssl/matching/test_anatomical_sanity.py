"""Sanity checks of SAM on scans with known places, and on untrained embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import nnssl.matching.anatomical_sanity as sanity_module
from nnssl.data.case_store import CaseProperties, CaseStore, SourceFile, write_case
from nnssl.matching.anatomical_sanity import (
    Sanity,
    describe,
    draw_pairs,
    examine,
    hit_within_mm,
    likeness,
    self_match,
    surroundings_vox,
    what_fails,
    what_is_coarse,
)
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.paired_bootstrap import Comparison, interval_of_mean
from nnssl.matching.points import Matches
from nnssl.methods.sam import SAM
from nnssl.methods.settings import resolve_stage
from nnssl.networks.anatomical_embedding import Embeddings
from nnssl.networks.backbone import build_network
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import architecture

SPACING = (6.0, 1.0, 1.5)
GOOD = {
    "self_error_mm": 2.0,
    "self_hit_share": 0.9,
    "permuted_error_mm": 20.0,
    "cycle_error_mm": 5.0,
    "rank_correlation": (0.99, 0.95, 0.95),
    "likeness": 0.5,
    "box_likeness": 0.3,
    "unit": "pairs of scans",
    "differences": (0.1, 0.2, 0.2, 0.2, 0.2, 0.3),
    "difference_interval": (0.15, 0.25),
    "hit_mm": 10.0,
}


def make_store(folder, shifts: tuple[int, ...] = (0, 4)) -> CaseStore:
    """Return scans of one anatomy, shifted in their boxes: three channels rise along the axes, one has a pattern."""
    for name, shift in zip("abcdef", shifts, strict=False):
        shape = (6, 24, 40)
        z, y, x = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij")
        pattern = 9 * np.cos((y - shift) / 2.6) * np.cos((x - shift) / 1.7)
        noise = 0.02 * np.random.default_rng(shift).standard_normal((4, *shape))
        image = (np.stack([z - 3, (y - shift) / 8 - 1, (x - shift) / 12 - 1, pattern]) + noise).astype(np.float32)
        body = np.stack(np.meshgrid(*[np.arange(2, n - 2) for n in shape], indexing="ij"), axis=-1).reshape(-1, 3)
        properties = CaseProperties(2, shape, 4, SPACING, (SourceFile("a", 1, 1),), "digest", 0.5, 1.0, None)
        write_case(folder, name, image, body, properties, (4, 12, 20))
    return CaseStore(folder)


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch) -> None:
    """Reduce the number of pairs; that of a real examination would only take more time."""
    monkeypatch.setattr(sanity_module, "PAIRS", 10)


@pytest.fixture
def method() -> SAM:
    configuration = make_configuration(3)
    overrides = ("dimensions=8", "fine_queries=30", "coarse_queries=5", "intensity_views=")
    settings, _ = resolve_stage(SAM, planned(configuration), "sam.embedding", overrides)
    network = build_network(architecture(3, False, False), 4, 3, seed=0)
    torch.manual_seed(0)
    return SAM(network, settings, configuration).eval()


class Known(torch.nn.Module):
    """Embedding of a place by its first three intensities on the unit sphere, like a network that knows the anatomy."""

    def __init__(self, method: SAM) -> None:
        super().__init__()
        self.network = method.network
        self.grids = method.embedding.grids

    def forward(self, volumes: torch.Tensor) -> Embeddings:
        fine, coarse = (torch.nn.functional.avg_pool3d(volumes[:, :3], kernel) for kernel in ((1, 2, 2), (2, 4, 4)))
        unit = lambda m: torch.cat([m, torch.ones_like(m[:, :1])], dim=1) / (m.square().sum(1, True) + 1).sqrt()  # noqa: E731
        return Embeddings(unit(fine), unit(coarse))


def test_known_places_are_found_and_shuffled_ones_are_not(method, tmp_path):
    store = make_store(tmp_path)
    method.embedding = Known(method)
    errors, permuted = self_match(method, store, 0, torch.device("cpu"), torch.no_grad)
    assert np.median(errors) <= np.linalg.norm([3.0, 1.0, 1.5])  # half a cell of 6 x 2 x 3 mm along every axis
    assert np.median(permuted) > 10
    content, lines = examine(method, store, 0, torch.device("cpu"))
    assert content["cycle_error_mm"] < 6
    assert min(content["rank_correlation"]) > 0.9
    assert content["likeness"] > content["box_likeness"]
    assert content["usable"], content
    assert "better than the body's box" in lines[-1]
    assert "% interval" in lines[2]
    assert content["unit"] == "points"  # two scans are one pair
    assert content["difference_interval"][0] > 0
    assert content["warnings"] == ()


class Boxes(sanity_module.EmbeddingMatcher):
    """The body's box under the name of embeddings: its order and way back are perfect, its score is the largest."""

    moved_mm = 0.0

    def match_points(self, query, points_mm, key):
        found = BodyBoxMatcher(self.store).match_points(query, points_mm, key).points_mm
        return Matches(found + np.array([0, self.moved_mm, 0]), np.ones(len(found)))


class Moved(Boxes):
    """The body's box, with all places moved by half a period of the pattern."""

    moved_mm = -8.0


@pytest.mark.parametrize("shifts", [(0, 4), (0, 4, 2, 6)])
def test_the_box_is_no_better_than_itself(method, tmp_path, monkeypatch, shifts):
    monkeypatch.setattr(sanity_module, "EmbeddingMatcher", Boxes)
    monkeypatch.setattr(sanity_module, "PAIRS", 40)
    content, lines = examine(method, make_store(tmp_path, shifts), 0, torch.device("cpu"))
    assert content["cycle_error_mm"] == pytest.approx(0, abs=1e-9)
    assert content["rank_correlation"] == pytest.approx((1, 1, 1))
    assert content["reliable_share"] == 1
    assert content["difference_interval"] == (0, 0)
    assert not content["usable"]
    assert "not reliably more similar" in content["reasons"][0]
    assert "95% interval 0.000 to 0.000 over" in content["reasons"][0]
    assert content["reasons"][0] in lines[-1]


def test_places_worse_than_the_box_are_not_usable(method, tmp_path, monkeypatch):
    """The way back is within 20 mm and the order is perfect."""
    monkeypatch.setattr(sanity_module, "EmbeddingMatcher", Moved)
    content, _ = examine(method, make_store(tmp_path, (0, 0)), 0, torch.device("cpu"))
    assert content["reliable_share"] == 1
    assert content["rank_correlation"] == pytest.approx((1, 1, 1))
    assert content["difference_interval"][1] < 0
    assert not content["usable"]


def test_four_scans_are_compared_by_pairs_and_in_the_same_way_every_time(method, tmp_path, monkeypatch):
    monkeypatch.setattr(sanity_module, "PAIRS", 40)
    store = make_store(tmp_path, (0, 4, 2, 6))
    method.embedding = Known(method)
    content, lines = examine(method, store, 0, torch.device("cpu"))
    assert content["unit"] == "pairs of scans"
    assert len(content["differences"]) == 6
    assert content["usable"], content
    assert "over 6 pairs of scans" in lines[2]
    assert examine(method, store, 0, torch.device("cpu"))[0] == content
    assert interval_of_mean(np.array(content["differences"]), 0) == content["difference_interval"]
    assert content["likeness"] - content["box_likeness"] == pytest.approx(np.mean(content["differences"]), abs=1e-6)


def test_the_order_of_places_is_a_warning_and_refuses_nothing():
    """The body's box keeps it perfectly, and embeddings that miss a bound by a little may find more."""
    (warning,) = what_is_coarse({**GOOD, "rank_correlation": (0.947, 0.91, 0.92)})
    assert "along z in other scans is only 0.95" in warning
    assert not what_is_coarse({**GOOD, "rank_correlation": (0.95, 0.9, 0.9)})
    assert len(what_is_coarse({**GOOD, "rank_correlation": (0.9, 0.89, 0.8)})) == 3
    lines = describe(Sanity(**GOOD, usable=True, reasons=(), warnings=(warning,)))
    assert lines[-2].startswith("WARNING: the rank correlation")
    assert "better than the body's box" in lines[-1]


def test_what_is_coarse_within_a_scan_is_a_warning_and_refuses_nothing():
    """The alternative, the body's box, is even coarser."""
    numbers = {**GOOD, "self_hit_share": 0.79}
    assert not what_is_coarse({**GOOD, "self_hit_share": 0.8})
    (warning,) = what_is_coarse(numbers)
    assert "79% of points found within 10 mm" in warning
    lines = describe(Sanity(**numbers, usable=True, reasons=(), warnings=(warning,)))
    assert lines[-2].startswith("WARNING: only 79%")
    assert "better than the body's box" in lines[-1]


def test_a_place_that_is_a_cell_away_is_found(method):
    """A match is the centre of a cell, which measures 6 x 2 x 3 mm here and 16 x 2 x 3 mm for thick slices."""
    assert hit_within_mm(method) == 10
    method.configuration = replace(method.configuration, spacing_mm=(16.0, 1.0, 1.5))
    assert hit_within_mm(method) == 16


def test_matches_that_are_not_reliable_are_not_judged(method, tmp_path, monkeypatch):
    """Half of the points have random matches with large cycle errors, which pairs would not be made of."""
    store = make_store(tmp_path)
    method.embedding = Known(method)

    class HalfLost(sanity_module.EmbeddingMatcher):
        def match_points(self, query, points_mm, key):
            found = super().match_points(query, points_mm, key)
            lost = np.arange(len(points_mm)) % 2 == 0
            anywhere = np.roll(found.points_mm[::-1], 3, axis=0) * [1, -1, 1] + [0, 90, 0]
            return Matches(np.where(lost[:, None], anywhere, found.points_mm), np.where(lost, 0.1, found.score))

    monkeypatch.setattr(sanity_module, "EmbeddingMatcher", HalfLost)
    content, _ = examine(method, store, 0, torch.device("cpu"))
    assert 0.3 < content["reliable_share"] <= 0.5
    assert min(content["rank_correlation"]) > 0.9
    assert content["likeness"] > content["box_likeness"]


def test_untrained_embeddings_of_noise_are_not_usable(method, tmp_path):
    """Scans that have nothing in common; single matches pass the way back."""
    for index, name in enumerate("abcd"):
        image = np.random.default_rng(index).standard_normal((4, 6, 24, 40)).astype(np.float32)
        body = np.argwhere(np.ones(image.shape[1:]))
        properties = CaseProperties(2, image.shape[1:], 4, SPACING, (SourceFile("a", 1, 1),), "digest", 1.0, 1.0, None)
        write_case(tmp_path, name, image, body, properties, (4, 12, 20))
    content, _ = examine(method, CaseStore(tmp_path), 0, torch.device("cpu"))
    assert not content["usable"], content
    assert content["reasons"]


def test_untrained_embeddings_that_find_similar_tissue_are_warned_about(method, tmp_path):
    """Here the pattern repeats, and similarity cannot tell one period from the next: only the order of places can."""
    content, lines = examine(method, make_store(tmp_path), 0, torch.device("cpu"))
    assert content["likeness"] > content["box_likeness"]
    assert min(content["rank_correlation"]) < 0.8
    assert any(line.startswith("WARNING: the rank correlation of places along") for line in lines)


@pytest.mark.parametrize(
    ("interval", "reason"),
    [
        ((0.001, 0.2), None),
        ((0.0, 0.2), "95% interval 0.000 to 0.200 over 3 pairs of scans, and the lower bound must be above 0"),
        ((-0.01, 0.2), "mean difference 0.100, 95% interval -0.010 to 0.200"),
        ((-0.2, -0.1), "not reliably more similar than at the same place in the body's box (0.30)"),
        ((float("nan"), float("nan")), "fewer than 20 reliable matches"),
    ],
)
def test_the_lower_bound_decides(interval, reason):
    compared = Comparison("pairs of scans", 0.4, 0.3, (0.0, 0.1, 0.2), interval)
    reasons = what_fails(compared)
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]
    sanity = Sanity(**{**GOOD, "difference_interval": interval}, usable=not reasons, reasons=tuple(reasons))
    lines = describe(sanity)
    assert ("better than the body's box" in lines[-1]) is (reason is None)
    assert "chance 20.0 mm" in lines[0]
    assert any("Tissue similarity of matches minus" in line for line in lines) == (not np.isnan(interval[0]))


def test_likeness_is_the_correlation_of_what_both_scans_have(tmp_path):
    """Computed voxel by voxel; voxels outside either scan are ignored on both sides."""
    store = make_store(tmp_path)
    size = surroundings_vox(SPACING)
    assert size == (5, 31, 21)
    first, second = (3, 11, 16), (2, 15, 20)
    pairs = [[] for _ in range(4)]
    volumes = [store.case(name).read_box((0, 0, 0), (6, 24, 40)) for name in "ab"]
    for offset in np.ndindex(*size):
        places = [
            tuple(p + o - n // 2 for p, o, n in zip(place, offset, size, strict=True)) for place in (first, second)
        ]
        if all(0 <= v < n for place in places for v, n in zip(place, (6, 24, 40), strict=True)):
            for channel in range(4):
                pairs[channel].append(
                    [volume[(channel, *place)] for volume, place in zip(volumes, places, strict=True)]
                )
    expected = np.mean([np.corrcoef(np.array(each).T)[0, 1] for each in pairs])
    places_mm = [np.array([place]) * np.array(SPACING) for place in (first, second)]
    assert likeness(store, "a", places_mm[0], "b", places_mm[1])[0] == pytest.approx(expected, abs=1e-4)


def test_scans_without_a_body_are_examined_too(method, tmp_path):
    image = np.random.default_rng(0).standard_normal((4, 6, 24, 40)).astype(np.float32)
    properties = CaseProperties(2, image.shape[1:], 4, SPACING, (SourceFile("a", 1, 1),), "digest", 0.0, 1.0, None)
    write_case(tmp_path, "a", image, np.zeros((0, 3), dtype=int), properties, (4, 12, 20))
    content, _ = examine(method, CaseStore(tmp_path), 0, torch.device("cpu"))
    assert not content["usable"]


def test_pairs_are_of_different_cases_and_points_in_the_body(tmp_path):
    store = make_store(tmp_path)
    pairs = draw_pairs(store, 0)
    again = draw_pairs(store, 0)
    assert all(first != second for first, second, _ in pairs)
    assert {first for first, _, _ in pairs} == {"a", "b"}
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(pairs, again, strict=True))
    for _, _, points in pairs:
        assert (points >= np.array([2, 2, 2]) * SPACING).all()
