"""Pairs of places: selection of matches, the fallback, and the file."""

import itertools

import numpy as np
import pytest
import torch

from nnssl.data.case_store import CaseProperties, CaseStore, write_case
from nnssl.data.loader import make_loader
from nnssl.data.patch_boxes import shared_move
from nnssl.data.patch_pairs import PairTable, read_pairs, write_pairs
from nnssl.data.patients import patient_in_name
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import CASES_KEPT
from nnssl.matching.pairs import PARTNERS, POINTS, choose_partners, make_pairs
from nnssl.matching.points import LARGEST_CYCLE_MM, Matches
from tests.nnssl.matching.test_matching import SPACING, everywhere, make_image, store_of


class Shifted:
    """Matcher that shifts by 3 mm along y and back; matches at low z have a large cycle error, those at high x a low score."""

    def match_points(self, query: str, points_mm: np.ndarray, key: str) -> Matches:
        way = np.where(query < key, 3.0, -3.0)
        found = points_mm + np.array([0.0, way, 0.0])
        if query < key:
            found[:, 1] += np.where(points_mm[:, 0] < 12, 2 * LARGEST_CYCLE_MM, 0)
        return Matches(found, -points_mm[:, 2])


def test_reliable_matches_are_taken_and_the_box_stands_in(tmp_path):
    image = make_image()
    store = store_of(tmp_path, a=(image, everywhere()), b=(image, everywhere()[:, [0, 1, 2]]))
    lines = []
    with lines_to(lines.append):
        table = make_pairs(store, Shifted(), BodyBoxMatcher(store), 0)
    with lines_to(lines.append):
        again = make_pairs(store, Shifted(), BodyBoxMatcher(store), 0)
    assert all(np.array_equal(getattr(table, n), getattr(again, n)) for n in ("query", "key", "query_vox", "key_vox"))
    assert len(table.query) == 2 * POINTS
    assert (table.query != table.key).all()
    rows = table.of_case(0)
    assert len(rows) == POINTS
    spacing = np.array(SPACING)
    moved = (table.key_vox - table.query_vox)[rows] * spacing
    matched = table.matched[rows]
    assert matched.sum() > 0
    np.testing.assert_allclose(moved[matched], np.array([[0.0, 3.0, 0.0]] * matched.sum()), atol=1e-9)
    assert (table.query_vox[rows][matched][:, 0] * spacing[0] >= 12).all()
    np.testing.assert_allclose(moved[~matched], 0, atol=1e-9)  # boxes are alike
    assert lines[:2] == lines[2:]
    assert lines[0] == "matched 2 of 2 pairs of scans"
    assert f"{table.matched.mean():.0%} with a reliable match" in lines[1]


def test_low_scores_are_left_out(tmp_path):
    image = make_image()
    store = store_of(tmp_path, a=(image, everywhere()), b=(image, everywhere()))

    class Perfect(Shifted):
        def match_points(self, query, points_mm, key):
            return Matches(points_mm.copy(), -points_mm[:, 2])

    table = make_pairs(store, Perfect(), BodyBoxMatcher(store), 0)
    assert table.matched.all()
    assert table.query_vox[:, 2].max() < np.quantile(everywhere()[:, 2], 0.85)


def test_a_pair_of_scans_that_score_low_is_left_to_the_box(tmp_path):
    """All pairs of scans share one threshold, so two scans with nothing in common have no reliable matches of their own."""
    image = make_image()
    store = store_of(tmp_path, **{name: (image, everywhere()) for name in "abc"})

    class Strangers:
        def match_points(self, query, points_mm, key):
            strange = "c" in (query, key)
            return Matches(points_mm.copy(), np.full(len(points_mm), 0.1 if strange else 0.9))

    table = make_pairs(store, Strangers(), BodyBoxMatcher(store), 0)
    strange = (table.query == 2) | (table.key == 2)
    assert table.matched[~strange].all()
    # Two thirds of the scores are those of strangers, so the lowest quarter is among them.
    assert table.matched[strange].all()

    class Friends(Strangers):
        def match_points(self, query, points_mm, key):
            found = super().match_points(query, points_mm, key)
            low = {query, key} == {"a", "c"}
            return Matches(found.points_mm, np.where(low, 0.1 + 1e-3 * np.arange(len(points_mm)), 0.9))

    table = make_pairs(store, Friends(), BodyBoxMatcher(store), 0)
    low = (table.query + table.key == 2) & (table.query != 1)
    assert table.matched[~low].all()
    assert table.matched[low].mean() < 0.8  # a quarter of all matches is three quarters of theirs


def test_partners_are_other_patients_and_stay_near():
    names = [f"patient{number:02}_frame{frame}" for number in range(9) for frame in (1, 2)]
    pairs = choose_partners(names, 0)
    assert pairs == choose_partners(names, 0) != choose_partners(names, 1)
    assert all(patient_in_name(names[a]) != patient_in_name(names[b]) for a, b in pairs)
    counts = np.bincount(np.array(pairs).ravel(), minlength=len(names))
    assert counts.min() >= PARTNERS // 2
    assert abs(counts.mean() - PARTNERS) < 0.5
    assert len(set(pairs)) == len(pairs)
    kept: list[int] = []
    made = 0
    for pair in pairs:  # with this many cached scans, few embeddings are computed twice
        for scan in pair:
            made += scan not in kept
            kept = [*(each for each in kept if each != scan), scan][-CASES_KEPT:]
    assert made <= 1.5 * len(names)
    frames = ["patient01_frame1", "patient01_frame2", "patient01_frame3"]
    assert {scan for pair in choose_partners(frames, 0) for scan in pair} == {0, 1, 2}
    assert choose_partners(["only"], 0) == [(0, 0)]


def test_without_a_matcher_and_with_one_scan(tmp_path):
    image = make_image()
    store = store_of(tmp_path, only=(image, np.zeros((0, 3), dtype=int)))
    lines = []
    with lines_to(lines.append):
        table = make_pairs(store, None, BodyBoxMatcher(store), 0)
    assert not table.matched.any()
    assert (table.query == table.key).all()
    np.testing.assert_allclose(table.key_vox, table.query_vox)
    assert "all by the body's box" in lines[0]


def test_the_file(tmp_path):
    image = make_image()
    store = store_of(tmp_path, a=(image, everywhere()), b=(image, everywhere()))
    table = make_pairs(store, None, BodyBoxMatcher(store), 0)
    write_pairs(tmp_path / "pairs.npz", table)
    read = read_pairs(tmp_path / "pairs.npz")
    assert read.cases == table.cases
    for name in ("query", "key", "query_vox", "key_vox", "matched"):
        assert np.array_equal(getattr(read, name), getattr(table, name))
    whole = (tmp_path / "pairs.npz").read_bytes()
    for broken in (b"no table", whole[: len(whole) // 2]):
        (tmp_path / "pairs.npz").write_bytes(broken)
        with pytest.raises(UserError, match=r"pairs\.npz cannot be read .*it is written again"):
            read_pairs(tmp_path / "pairs.npz")


def test_a_file_that_could_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    columns = {name: np.zeros(1) for name in ("query", "key", "query_vox", "key_vox", "matched")}
    np.savez(tmp_path / "pairs.npz", cases=np.array([Evil()], dtype=object), **columns)
    with pytest.raises(UserError, match=r"pairs\.npz cannot be read"):
        read_pairs(tmp_path / "pairs.npz")
    assert not (tmp_path / "ran").exists()


def test_places_are_in_voxels_of_their_own_scan(tmp_path):
    """Two scans of the same body differ in voxel size, so the same position in the box is another voxel."""
    shapes, spacings = {"a": (20, 44, 52), "b": (30, 22, 26)}, {"a": (3.0, 1.0, 1.5), "b": (2.0, 2.0, 3.0)}
    for name, shape in shapes.items():
        properties = CaseProperties(2, shape, 1, spacings[name], (), "digest", 0.5, 1.0, None)
        volume = np.zeros((1, *shape), dtype=np.float32)
        write_case(tmp_path, name, volume, np.zeros((0, 3), dtype=int), properties, (8, 16, 16))
    store = CaseStore(tmp_path)
    table = make_pairs(store, None, BodyBoxMatcher(store), 0)
    last = [np.array(shapes[name]) - 1 for name in "ab"]
    share = table.query_vox / np.array([last[index] for index in table.query])
    np.testing.assert_allclose(table.key_vox / np.array([last[index] for index in table.key]), share, atol=1e-6)


def test_every_pair_of_scans_has_points_of_its_own(tmp_path):
    image = make_image()
    store = store_of(tmp_path, **{name: (image, everywhere()) for name in "abc"})
    table = make_pairs(store, None, BodyBoxMatcher(store), 0)
    seen = {}
    for query, key in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        rows = table.query_vox[(table.query == query) & (table.key == key)]
        assert len(rows) == POINTS
        seen[query, key] = {tuple(row) for row in rows.tolist()}
    for one, other in itertools.combinations(seen, 2):
        assert len(seen[one] & seen[other]) < POINTS / 8


def test_each_scan_is_the_first_of_a_pair_once_in_each_pass(tmp_path):
    image = make_image()
    store = store_of(tmp_path, **{name: (image, everywhere()) for name in "abc"})
    table = make_pairs(store, None, BodyBoxMatcher(store), 0)
    for size in (2, 4):  # one pair, two pairs in a step
        batches = make_loader(store, (8, 16, 16), size, 3, "test", 0, 12, pairs=table)
        first = [batch.cases[place] for batch in batches for place in range(0, size, 2)]
        assert all(sorted(first[start : start + 3]) == ["a", "b", "c"] for start in range(0, len(first), 3))


@pytest.mark.parametrize(
    ("corners", "rooms", "move"),
    [
        ((3, 5), (10, 10), 0),
        ((-2, 5), (10, 10), 2),
        ((3, 12), (10, 10), -2),
        ((-2, 9), (10, 10), 1),  # no move keeps both inside; from 1 to 2 they leave as little, 1 is the least move
        ((3, -4), (-6, 10), 0),  # the first scan is shorter than the patch, which covers it when moved by -9 to -3
        ((-3, 2), (-6, 10), 0),
    ],
)
def test_pairs_are_moved_by_as_much(corners, rooms, move):
    assert shared_move(corners, rooms) == move

    def outside(by):
        lost = 0
        for corner, room in zip(corners, rooms, strict=True):
            first = corner + by
            lost += max(0, -first) + max(0, first - room) - (max(0, -room))
        return lost

    assert outside(move) == min(outside(by) for by in range(-30, 30))


def test_patches_of_a_pair_show_both_places_at_the_same_place(tmp_path):
    """Also at borders, where both patches are moved equally and as far as possible into their scans."""
    image, other = make_image(), make_image(shift=(2, 6, 4))
    store = store_of(tmp_path, a=(image, everywhere()), b=(other, everywhere()))
    rng = np.random.default_rng(0)
    query_vox = rng.integers([0, 0, 0], np.array(image.shape[1:]) - 8, size=(40, 3)).astype(float)
    key_vox = query_vox + [2, 6, 4]
    table = PairTable(
        ("a", "b"), np.repeat([0, 1], 20), np.repeat([1, 0], 20), query_vox, key_vox, np.ones(40, dtype=bool)
    )
    loader = make_loader(store, (8, 16, 16), 4, 0, "test", 0, 12, pairs=table)
    again = make_loader(store, (8, 16, 16), 4, 0, "test", 5, 12, num_workers=1, pairs=table)
    batches = list(loader)
    assert torch.equal(next(iter(again)).volumes, batches[5].volumes)
    compared = 0
    for batch in batches:
        for first in (0, 2):
            assert {batch.cases[first], batch.cases[first + 1]} == {"a", "b"}
            lower = batch.lower_vox[first]
            assert torch.equal(batch.lower_vox[first + 1] - lower, torch.tensor([2, 6, 4]))
            if batch.cases[first] == "a":
                shown = batch.volumes[first + 1].abs().sum(dim=0) > 0
                torch.testing.assert_close(
                    batch.volumes[first][:, shown], batch.volumes[first + 1][:, shown], atol=2e-3, rtol=0
                )
                compared += int(shown.sum())
    assert compared > 1000
    two = [list(make_loader(store, (8, 16, 16), 4, 0, "test", 0, 2, rank, 2, pairs=table))[1] for rank in range(2)]
    assert torch.equal(torch.cat([each.volumes for each in two]), batches[1].volumes)
    with pytest.raises(UserError, match="needs pairs of patches"):
        make_loader(store, (8, 16, 16), 2, 0, "test", 0, 1, 0, 2, pairs=table)
