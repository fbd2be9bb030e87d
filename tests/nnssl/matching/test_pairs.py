"""Pairs of places: which matches are taken, what stands in for the others, and the file."""

import numpy as np
import pytest
import torch

from nnssl.data.loader import make_loader
from nnssl.data.patch_pairs import PairTable, read_pairs, write_pairs
from nnssl.errors import UserError
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.pairs import LARGEST_CYCLE_MM, POINTS, make_pairs
from nnssl.matching.points import Matches
from tests.nnssl.matching.test_matching import SPACING, everywhere, make_image, store_of


class Shifted:
    """Finds every place 3 mm away along y, and from there back; places at low z lead astray, those at high x score low."""

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
    table = make_pairs(store, Shifted(), BodyBoxMatcher(store), 0, lines.append)
    again = make_pairs(store, Shifted(), BodyBoxMatcher(store), 0, lines.append)
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
    assert lines[0] == lines[1]
    assert f"{table.matched.mean():.0%} with a reliable match" in lines[0]


def test_low_scores_are_left_out(tmp_path):
    image = make_image()
    store = store_of(tmp_path, a=(image, everywhere()), b=(image, everywhere()))

    class Perfect(Shifted):
        def match_points(self, query, points_mm, key):
            return Matches(points_mm.copy(), -points_mm[:, 2])

    table = make_pairs(store, Perfect(), BodyBoxMatcher(store), 0, lambda line: None)
    assert table.matched.all()
    assert table.query_vox[:, 2].max() < np.quantile(everywhere()[:, 2], 0.85)


def test_without_a_matcher_and_with_one_scan(tmp_path):
    image = make_image()
    store = store_of(tmp_path, only=(image, np.zeros((0, 3), dtype=int)))
    lines = []
    table = make_pairs(store, None, BodyBoxMatcher(store), 0, lines.append)
    assert not table.matched.any()
    assert (table.query == table.key).all()
    np.testing.assert_allclose(table.key_vox, table.query_vox)
    assert "all by the body's box" in lines[0]


def test_the_file(tmp_path):
    image = make_image()
    store = store_of(tmp_path, a=(image, everywhere()), b=(image, everywhere()))
    table = make_pairs(store, None, BodyBoxMatcher(store), 0, lambda line: None)
    write_pairs(tmp_path / "pairs.npz", table)
    read = read_pairs(tmp_path / "pairs.npz")
    assert read.cases == table.cases
    for name in ("query", "key", "query_vox", "key_vox", "matched"):
        assert np.array_equal(getattr(read, name), getattr(table, name))
    (tmp_path / "pairs.npz").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"pairs\.npz: cannot be read .*it is made again"):
        read_pairs(tmp_path / "pairs.npz")


def test_patches_of_a_pair_show_both_places_at_the_same_place(tmp_path):
    """At every border too: the first patch stays in its scan, the second moves with it."""
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
            assert ((lower >= 0) & (lower + torch.tensor([8, 16, 16]) <= torch.tensor(image.shape[1:]))).all()
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
    with pytest.raises(UserError, match="patches go in pairs"):
        make_loader(store, (8, 16, 16), 2, 0, "test", 0, 1, 0, 2, pairs=table)
