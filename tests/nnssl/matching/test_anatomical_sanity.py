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
    "hit_mm": 10.0,
}


def make_store(folder) -> CaseStore:
    """Return two scans of one anatomy, one of them shifted: three channels rise along the axes, one has a pattern."""
    for name, shift in (("a", 0), ("b", 4)):
        shape = (6, 24, 40)
        z, y, x = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij")
        pattern = 9 * np.cos((y - shift) / 2.6) * np.cos((x - shift) / 1.7)
        noise = 0.02 * np.random.default_rng(shift).standard_normal((4, *shape))
        image = (np.stack([z - 3, (y - shift) / 8 - 1, (x - shift) / 12 - 1, pattern]) + noise).astype(np.float32)
        body = np.stack(np.meshgrid(*[np.arange(2, n - 2) for n in shape], indexing="ij"), axis=-1).reshape(-1, 3)
        properties = CaseProperties(1, shape, 4, SPACING, (SourceFile("a", 1, 1),), "digest", 0.5)
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
    return SAM(build_network(architecture(3, False, False), 4, 3, seed=0), settings, configuration).eval()


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
    assert content["warnings"] == ()


def test_what_is_coarse_within_a_scan_is_a_warning_and_refuses_nothing():
    """The alternative, the body's box, is even coarser."""
    numbers = {**GOOD, "self_hit_share": 0.79}
    assert not what_fails(numbers)
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


def test_untrained_embeddings_are_not_usable(method, tmp_path):
    content, _ = examine(method, make_store(tmp_path), 0, torch.device("cpu"))
    assert not content["usable"]
    assert content["reasons"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"cycle_error_mm": 21.0}, "cycle error is 21 mm"),
        ({"cycle_error_mm": float("nan")}, "cycle error is nan mm"),
        ({"rank_correlation": (0.94, 0.95, 0.95)}, "along z"),
        ({"rank_correlation": (0.99, 0.89, 0.95)}, "along y"),
        ({"rank_correlation": (0.99, 0.95, float("nan"))}, "along x"),
        ({"likeness": 0.3}, "not more similar"),
    ],
)
def test_every_check_alone_can_fail(change, reason):
    reasons = what_fails({**GOOD, **change})
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]
    sanity = Sanity(**{**GOOD, **change}, usable=not reasons, reasons=tuple(reasons))
    assert ("better than the body's box" in describe(sanity)[-1]) is (reason is None)
    assert "chance 20.0 mm" in describe(replace(sanity))[0]


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
    properties = CaseProperties(1, image.shape[1:], 4, SPACING, (SourceFile("a", 1, 1),), "digest", 0.0)
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
