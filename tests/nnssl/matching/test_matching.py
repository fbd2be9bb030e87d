"""Matching of points by the body's box, and by embeddings of whole scans composed of tiles."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl.data.case_store import CaseProperties, CaseStore, SourceFile, write_case
from nnssl.matching import embedded
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddedCase, EmbeddingMatcher, best_cells, corners_on_cells
from nnssl.matching.points import Matches, cycle_error_mm
from nnssl.networks.anatomical_embedding import Embeddings

SPACING = (3.0, 1.0, 1.5)
SHAPE = (20, 44, 52)
TILE = (8, 16, 16)


class Places(torch.nn.Module):
    """Embedding of a cell by the mean of its channels, whose intensities encode the position."""

    network = SimpleNamespace(encoder=SimpleNamespace(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]))

    def forward(self, volumes: torch.Tensor) -> Embeddings:
        fine, coarse = F.avg_pool3d(volumes, (1, 2, 2)), F.avg_pool3d(volumes, (2, 4, 4))
        return Embeddings(F.normalize(fine, dim=1), F.normalize(coarse, dim=1))


def make_image(shape=SHAPE, shift=(0, 0, 0)) -> np.ndarray:
    """Return channels that differ everywhere and are similar for neighbours."""
    z, y, x = np.meshgrid(*[np.arange(n) - s for n, s in zip(shape, shift, strict=True)], indexing="ij")
    angles = [z / 9, y / 17, x / 19]
    return np.stack([f(a) for a in angles for f in (np.cos, np.sin)]).astype(np.float32)


def store_of(folder, **images: np.ndarray) -> CaseStore:
    for name, (image, body) in images.items():
        properties = CaseProperties(
            2, image.shape[1:], len(image), SPACING, (SourceFile("a", 1, 1),), "digest", 0.5, 1.0, None
        )
        write_case(folder, name, image, body, properties, TILE)
    return CaseStore(folder)


def everywhere(shape=SHAPE) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1).reshape(-1, 3)


def body_points(shape=SHAPE, count=200, margin=4) -> np.ndarray:
    low, high = [margin] * 3, np.array(shape) - margin
    return np.random.default_rng(0).integers(low, high, size=(count, 3)) * np.array(SPACING)


def test_the_same_scan_gives_the_same_place(tmp_path):
    store = store_of(tmp_path, a=(make_image(), everywhere()))
    matcher = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu"))
    points = body_points()
    matches = matcher.match_points("a", points, "a")
    cell_mm = np.array([1, 2, 2]) * np.array(SPACING)
    assert (np.abs(matches.points_mm - points) <= cell_mm / 2 + 1e-6).all(axis=1).mean() >= 0.99
    assert matches.score.min() > 0.99
    assert cycle_error_mm(matcher, "a", points, "a", matches).max() <= np.linalg.norm(cell_mm / 2) + 1e-6


def test_a_shift_by_whole_cells_shifts_the_matches(tmp_path):
    shift = (2, 8, 4)
    bodies = everywhere()
    store = store_of(tmp_path, a=(make_image(), bodies), b=(make_image(shift=shift), bodies))
    matcher = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu"))
    points = body_points(margin=6) - np.array([0.0, 8.0, 6.0])
    points = points[(points >= 4 * np.array(SPACING)).all(axis=1)]
    own, other = (matcher.match_points("a", points, name).points_mm for name in "ab")
    inside = (other < (np.array(SHAPE) - 6) * np.array(SPACING)).all(axis=1)
    assert inside.sum() > 50
    np.testing.assert_allclose((other - own)[inside], np.array(shift) * np.array(SPACING) + np.zeros((inside.sum(), 3)))


def test_embeddings_of_a_scan_do_not_depend_on_its_tiles(tmp_path):
    """This network has no context beyond a cell, so tiles must join without a seam."""
    store = store_of(tmp_path, a=(make_image(), everywhere()))
    tiled = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu")).embedded("a")
    whole = EmbeddingMatcher(Places(), store, SHAPE, torch.device("cpu")).embedded("a")
    shapes = ((6, 20, 22, 26), (6, 10, 11, 13))
    for first, second, shape in zip((tiled.fine, tiled.coarse), (whole.fine, whole.coarse), shapes, strict=True):
        assert first.shape == second.shape == shape
        torch.testing.assert_close(first, second, atol=5e-3, rtol=0)
        norms = first.float().norm(dim=0)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=0)
    assert tiled.inside.all()


def test_cells_beyond_the_scan_are_no_match(tmp_path):
    """The last cells of a scan of odd size are half outside, and so are their centres if a cell has two voxels."""
    shape = (7, 21, 23)
    store = store_of(tmp_path, a=(make_image(shape), everywhere(shape)))
    case = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu")).embedded("a")
    assert case.fine.shape[1:] == case.inside.shape == (7, 11, 12)
    assert case.inside[:, :10, :11].all()
    assert not case.inside[:, 10].any()
    assert not case.inside[:, :, 11].any()
    coarse = F.normalize(case.interpolate(case.coarse, torch.tensor([[3, 10, 11]])), dim=0)
    cells, _ = best_cells(torch.stack([case.fine[:, 3, 10, 11][None].float(), coarse.T]), case)
    assert np.unravel_index(cells[0], (7, 11, 12))[1:] == (9, 10)


def test_coarse_vectors_are_interpolated_and_brought_back_to_unit_norm(tmp_path, monkeypatch):
    """Compared with torch's interpolation of the whole map; slabs give the same result as the whole."""
    store = store_of(tmp_path, a=(make_image(), everywhere()), b=(make_image(shift=(1, 5, 3)), everywhere()))
    matcher = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu"))
    case = matcher.embedded("b")
    wide = F.interpolate(case.coarse[None].float(), case.fine.shape[1:], mode="trilinear", align_corners=False)[0]
    wide = F.normalize(wide, dim=0)
    points = body_points(count=90)
    vectors = matcher.vectors("a", points)
    similarity = (vectors[0] @ case.fine.flatten(1).float() + vectors[1] @ wide.flatten(1)) / 2
    cells, scores = best_cells(vectors, case)
    assert torch.equal(torch.from_numpy(cells), similarity.argmax(dim=1))
    torch.testing.assert_close(torch.from_numpy(scores), similarity.amax(dim=1), atol=1e-5, rtol=0)
    monkeypatch.setattr(embedded, "CELLS_AT_ONCE", 3 * 22 * 26 + 1)
    again, scores_again = best_cells(vectors, case)
    assert np.array_equal(again, cells)
    np.testing.assert_allclose(scores_again, scores, atol=1e-6)
    own = F.interpolate(matcher.embedded("a").coarse[None].float(), case.fine.shape[1:], mode="trilinear")[0]
    z, y, x = np.floor((points / np.array(SPACING) + 0.5) / [1, 2, 2]).astype(int).T
    torch.testing.assert_close(vectors[1], F.normalize(own[:, z, y, x], dim=0).T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fine_vox", "coarse_vox"), [((1.0, 2.0, 2.0), (1.0, 8.0, 4.0)), ((2.0, 2.0, 1.0), (8.0, 2.0, 4.0))]
)
def test_values_spread_over_all_cells_are_those_of_each_cell(fine_vox, coarse_vox):
    shape = (4, 8, 12)
    coarse = [int(n * f / c) for n, f, c in zip(shape, fine_vox, coarse_vox, strict=True)]
    case = EmbeddedCase(torch.zeros(1, *shape), torch.zeros(1, *coarse), fine_vox, coarse_vox, torch.ones(shape).bool())
    values = torch.rand(3, *coarse, generator=torch.Generator().manual_seed(0))
    for part in (slice(0, 4), slice(1, 3), slice(3, 4)):
        cells = torch.cartesian_prod(torch.arange(part.start, part.stop), torch.arange(8), torch.arange(12))
        torch.testing.assert_close(case.spread(values, part), case.interpolate(values, cells), atol=1e-6, rtol=0)


def test_a_point_is_in_the_cell_that_its_voxel_lies_in(tmp_path):
    """A voxel extends half its length around its centre; points also lie between centres and beyond borders."""
    store = store_of(tmp_path, a=(make_image(), everywhere()))
    matcher = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu"))
    places_vox = np.random.default_rng(3).uniform(-2, np.array(SHAPE) + 1, size=(300, 3))
    fine = matcher.embedded("a").fine.float()
    found = matcher.vectors("a", places_vox * np.array(SPACING))[0]
    for row, place in zip(found, places_vox, strict=True):
        z, y, x = (min(max(int((p + 0.5) // size), 0), n - 1)
                   for p, size, n in zip(place, (1, 2, 2), fine.shape[1:], strict=True))  # fmt: skip
        assert torch.equal(row, fine[:, z, y, x])


@pytest.mark.parametrize(("room", "kept"), [(0, 3), (3.5, 3), (4, 4)])
def test_embeddings_of_the_cases_used_last_are_kept(tmp_path, monkeypatch, room, kept):
    """Three cases are kept, or as many as fit into memory."""
    image = make_image((8, 16, 16))
    store = store_of(tmp_path, **{name: (image, everywhere((8, 16, 16))) for name in "abcd"})
    matcher = EmbeddingMatcher(Places(), store, TILE, torch.device("cpu"))
    made = []
    embed = matcher._embed
    monkeypatch.setattr(matcher, "_embed", lambda name: made.append(name) or embed(name))
    monkeypatch.setattr(embedded, "BYTES_KEPT", int(room * matcher.embedded("a").bytes))
    for name in "abcad":  # a is used again, so b has been unused for longest when d comes
        matcher.embedded(name)
    assert made == ["a", "b", "c", "d"]
    for name in "acdb":
        matcher.embedded(name)
    assert made == ["a", "b", "c", "d"] + ["b"] * (kept == 3)


def test_the_way_back_is_measured_in_mm_from_the_point_itself():
    class Fixed:
        def match_points(self, query, points_mm, key):
            assert (query, key) == ("b", "a")
            return Matches(points_mm - [10.0, 16.0, 12.0], np.zeros(len(points_mm)))

    points = np.array([[0.0, 0.0, 0.0], [5.0, 6.0, 7.0]])
    there = Matches(points + [10.0, 20.0, 15.0], np.zeros(2))
    np.testing.assert_allclose(cycle_error_mm(Fixed(), "a", points, "b", there), [5.0, 5.0])  # 0, 4 and 3 mm off


class Surroundings(Places):
    """Embedding with a context of two voxels, which sees zeros beyond the border of a tile."""

    def forward(self, volumes: torch.Tensor) -> Embeddings:
        return super().forward(F.avg_pool3d(volumes, 5, stride=1, padding=2))


def test_overlapping_tiles_look_like_the_whole(tmp_path):
    """The middle of a tile weighs more than its border, where the network lacks context."""
    rough = make_image() + 0.8 * np.random.default_rng(0).standard_normal((6, *SHAPE)).astype(np.float32)
    store = store_of(tmp_path, a=(rough, everywhere()))
    cpu = torch.device("cpu")
    tiled = EmbeddingMatcher(Surroundings(), store, TILE, cpu).embedded("a").fine.float()
    whole = EmbeddingMatcher(Surroundings(), store, SHAPE, cpu).embedded("a").fine.float()
    inner = (slice(None), slice(3, -3), slice(3, -3), slice(3, -3))
    cosine = F.cosine_similarity(tiled[inner], whole[inner], dim=0)
    assert cosine.min() > 0.996  # 0.992 if all of a tile counts alike, 0.966 if tiles do not overlap


@pytest.mark.parametrize("shape", [(5, 9, 9), (8, 16, 16), (9, 17, 40), (31, 50, 23)])
def test_tiles_cover_a_scan_and_begin_with_cells(shape):
    seen = np.zeros(shape, dtype=bool)
    for corner in corners_on_cells(shape, TILE, (2, 4, 4)):
        assert all(first % unit == 0 for first, unit in zip(corner, (2, 4, 4), strict=True))
        seen[tuple(slice(first, first + size) for first, size in zip(corner, TILE, strict=True))] = True
        beyond = [first + size - max(n, size) for first, size, n in zip(corner, TILE, shape, strict=True)]
        assert all(rest < unit for rest, unit in zip(beyond, (2, 4, 4), strict=True))
    assert seen.all()


def test_the_body_s_box(tmp_path):
    """Boxes differ in size and place: corners map to corners and the middle to the middle, apart from outliers."""
    first, second = everywhere((10, 20, 30)), everywhere((15, 20, 15)) + [3, 10, 20]
    outlier = np.repeat([[19, 43, 51]], 5, axis=0)
    empty = np.zeros((0, 3), dtype=int)
    image = make_image()
    store = store_of(tmp_path, a=(image, first), b=(image, np.concatenate([second, outlier])), c=(image, empty))
    matcher = BodyBoxMatcher(store)
    low, high = (np.percentile(first, q, axis=0) * SPACING for q in (1, 99))
    found = matcher.match_points("a", np.stack([low, high, (low + high) / 2]), "b").points_mm
    key_low, key_high = (np.percentile(second, q, axis=0) * SPACING for q in (1, 99))
    np.testing.assert_allclose(found, np.stack([key_low, key_high, (key_low + key_high) / 2]), atol=1.5)
    points = body_points()
    matches = matcher.match_points("a", points, "b")
    np.testing.assert_allclose(cycle_error_mm(matcher, "a", points, "b", matches), 0, atol=1e-9)
    assert np.isnan(matches.score).all()
    whole = matcher.match_points("c", np.array([[0.0, 0.0, 0.0]]), "c").points_mm
    np.testing.assert_allclose(whole, 0, atol=1e-9)
