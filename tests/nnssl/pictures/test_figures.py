"""Content of the panels of the pictures, and writing of the files."""

import numpy as np
import pytest

from nnssl.errors import UserError
from nnssl.pictures.components import CaseComponents, Embedding
from nnssl.pictures.figures import check_picture_path, embedding_figure, similarity_figure, write_picture
from nnssl.pictures.similarity import Comparison, Similarity
from tests.nnssl.pictures.pointwise import SPACING_MM, random_volume, write_cases

SHAPE = (6, 10, 14)


@pytest.fixture
def store(tmp_path):
    volumes = {name: random_volume(seed, SHAPE) for seed, name in enumerate("ab")}
    return write_cases(tmp_path / "cases", volumes, np.zeros((0, 3), int))


def make_comparison(store, two_dimensional: bool) -> Comparison:
    maps = np.random.default_rng(0).random((2, *SHAPE)).astype(np.float32)
    similarities = (Similarity(store.case("a"), maps[0], (4, 2, 11)), Similarity(store.case("b"), maps[1], (1, 7, 3)))
    return Comparison((4, 2, 10), similarities, two_dimensional)


def panels_of(figure) -> list:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def marks_of(axes) -> list:
    return [(line.get_marker(), line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]


def test_similarity_in_2d(store):
    comparison = make_comparison(store, two_dimensional=True)
    figure = similarity_figure(comparison, "stage")
    panels = panels_of(figure)
    assert len(figure.axes) == len(panels) + 1  # one colour bar
    assert figure.get_suptitle() == "stage"
    assert [axes.get_title(loc="left") for axes in panels] == [
        "a: query (4, 2, 10)",
        f"nearest (4, 2, 11), cosine {comparison.similarities[0].cosine[4, 2, 11]:.3f}",
        "b",
        f"nearest (1, 7, 3), cosine {comparison.similarities[1].cosine[1, 7, 3]:.3f}",
    ]
    assert [axes.get_xlabel() for axes in panels] == ["z = 4", "z = 4", "z = 1", "z = 1"]
    assert [marks_of(axes) for axes in panels] == [
        [("+", 10, 2)],
        [("+", 10, 2), ("o", 11, 2)],
        [("o", 3, 7)],
        [("o", 3, 7)],
    ]
    for row, z in enumerate((4, 1)):
        image, overlay = panels[2 * row], panels[2 * row + 1]
        assert len(image.images) == 1
        volume = comparison.similarities[row].case.read_box((0, 0, 0), SHAPE)[0]
        assert np.array_equal(overlay.images[0].get_array(), volume[z])
        assert np.array_equal(overlay.images[1].get_array(), comparison.similarities[row].cosine[z])
        assert overlay.images[1].get_clim() == (0, 1)
        assert image.get_aspect() == overlay.get_aspect() == pytest.approx(SPACING_MM[1] / SPACING_MM[2])
        assert image.yaxis_inverted()
        assert overlay.yaxis_inverted()


def test_similarity_in_3d_shows_three_planes_in_their_proportions(store):
    comparison = make_comparison(store, two_dimensional=False)
    panels = panels_of(similarity_figure(comparison, "stage"))
    assert [axes.get_xlabel() for axes in panels] == [
        *(["z = 4", "y = 2", "x = 10"] * 2),
        *(["z = 1", "y = 7", "x = 3"] * 2),
    ]
    z, y, x = SPACING_MM
    assert [axes.get_aspect() for axes in panels] == pytest.approx([y / x, z / x, z / y] * 4)
    shown = [axes.images[-1].get_array() for axes in panels[9:]]
    cosine = comparison.similarities[1].cosine
    for found, expected in zip(shown, (cosine[1], cosine[:, 7], cosine[:, :, 3]), strict=True):
        assert np.array_equal(found, expected)
    # The nearest voxel of the query's own case is not in the plane x = 10 and therefore not marked there.
    assert [marks_of(axes)[1:] for axes in panels[3:6]] == [[("o", 11, 2)], [("o", 11, 4)], []]
    assert [marks_of(axes) for axes in panels[9:]] == [[("o", 3, 7)], [("o", 3, 1)], [("o", 7, 1)]]


@pytest.mark.parametrize("two_dimensional", [True, False])
def test_embedding(store, two_dimensional):
    components = np.random.default_rng(1).random((2, 3, *SHAPE)).astype(np.float32)
    places = {"b": (2, 3, 5), "a": (4, 1, 0)}
    shown = [CaseComponents(store.case(name), places[name], each) for name, each in zip("ba", components, strict=True)]
    figure = embedding_figure(Embedding(tuple(shown), (0.5, 0.25, 0.125), two_dimensional), "stage")
    panels = panels_of(figure)
    assert figure.get_suptitle().startswith("stage\n")
    assert figure.get_suptitle().endswith("red, green, blue: 50 %, 25 %, 12 % of the variance")
    if two_dimensional:  # image above colours, one column for each case
        images, colours = [panels[:1], panels[1:2]], [panels[2:3], panels[3:]]
    else:  # image beside colours, one row for each plane
        images, colours = [panels[0::4], panels[2::4]], [panels[1::4], panels[3::4]]
    for number, (each, own, found) in enumerate(zip(shown, images, colours, strict=True)):
        assert own[0].get_title(loc="left") == each.case.name
        volume = each.case.read_box((0, 0, 0), SHAPE)[0]
        assert len(own) == len(found) == (1 if two_dimensional else 3)
        for axis, (image, colour) in enumerate(zip(own, found, strict=True)):
            place = each.centre_vox[axis]
            assert np.array_equal(image.images[0].get_array(), volume.take(place, axis))
            expected = components[number].take(place, axis + 1).transpose(1, 2, 0)
            assert np.array_equal(colour.images[0].get_array(), expected)
            assert image.get_xlabel() == colour.get_xlabel() == f"{'zyx'[axis]} = {place}"
            assert image.get_aspect() == colour.get_aspect()


@pytest.mark.parametrize("shape", [(12, 54, 24), (20, 30, 20), (7, 60, 60)])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("two_dimensional", [True, False])
def test_no_label_is_cut_off_whatever_plane_is_the_tallest(tmp_path, shape, count, two_dimensional):
    case = write_cases(tmp_path / "cases", {"a": random_volume(0, shape)}, np.zeros((0, 3), int)).case("a")
    components = np.random.default_rng(0).random((3, *shape)).astype(np.float32)
    shown = (CaseComponents(case, (2, 3, 5), components),) * count
    figure = embedding_figure(Embedding(shown, (0.5, 0.3, 0.1), two_dimensional), "two\nlines")
    write_picture(tmp_path / "picture.png", figure)
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.size
    heads = [axes._left_title for axes in figure.axes if axes.get_title(loc="left")]
    labels = [axes.xaxis.label for axes in figure.axes]
    boxes = [text.get_window_extent(renderer) for text in (*heads, *labels, figure._suptitle)]
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= width
    assert min(box.y0 for box in boxes) >= 0
    assert max(box.y1 for box in boxes) <= height
    assert max(head.get_window_extent(renderer).y1 for head in heads) <= figure._suptitle.get_window_extent(renderer).y0


def test_picture_is_written_atomically(store, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    figure = similarity_figure(make_comparison(store, two_dimensional=True), "stage")
    write_picture(path, figure)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def broken(file, **arguments):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(UserError, match=r"picture\.png: cannot be written \(No space left on device\)"):
        write_picture(path, figure)
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["picture.png"]


def test_paths_that_cannot_be_pictures(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("a.jpg", "ends in .png"),
        ("none/a.png", "does not exist; create it first"),
        ("folder.png", "is a folder"),
    ):
        with pytest.raises(UserError, match=reason):
            check_picture_path(tmp_path / name)
    assert check_picture_path(tmp_path / "a.PNG") == tmp_path / "a.PNG"
