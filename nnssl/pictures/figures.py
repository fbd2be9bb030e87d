"""Figures of dense features, reconstructions and matches.

The colours suit colour-blind readers, except for the three components shown as red, green and blue.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from nnssl.data.case_store import StoredCase
from nnssl.errors import UserError
from nnssl.files import write_atomically
from nnssl.palette import BLUISH_GREEN, ORANGE, SKY_BLUE
from nnssl.pictures.components import CaseComponents, Embedding
from nnssl.pictures.matches import PlaceMatch
from nnssl.pictures.orientation import PlaneView, view_plane
from nnssl.pictures.places import Voxel
from nnssl.pictures.reconstructions import Reconstruction
from nnssl.pictures.similarity import Comparison
from nnssl.pictures.teacher_uncertainty import Uncertainty

COLOUR_MAP = "inferno"
"""Colour map of even brightness steps, which is also readable without colour."""
QUERY_COLOUR, NEAREST_COLOUR, BOX_COLOUR = SKY_BLUE, BLUISH_GREEN, ORANGE
"""Colours of the markers, whose shapes differ too."""
OVERLAY = 0.65
"""Opacity of values drawn over the image."""
PANEL_INCHES = 2.6
"""Height of the tallest plane."""
LEAST_INCHES = 6.5
"""Smallest width of a figure, which the title needs."""
FONT_SIZE = 8
DPI = 120
AXES = "zyx"
MODEL_NAMES = {"o": "encoder", "m": "moving average", "h": "hybrid", "s": "student"}


def similarity_figure(comparison: Comparison, title: str) -> Figure:
    """Draw the query and, for each case, the image beside its similarity to the query.

    Each case has one row with its image, alone and overlaid with the similarity, in the planes through the query or, in the
    other cases, through the nearest voxel. Cosines below 0 have the colour of 0.

    Args:
        comparison: Query and similarities.
        title: Title of the figure.
    """
    figure, panels = _make_panels([each.case for each in comparison.similarities], comparison.two_dimensional, title)
    scale = Normalize(0, 1)
    for row, similarity in zip(panels, comparison.similarities, strict=True):
        own = similarity is comparison.similarities[0]
        centre = comparison.query_vox if own else similarity.nearest_vox
        planes = _planes(comparison.two_dimensional)
        _draw_case(row, similarity.case, centre, planes)
        for place, axis in enumerate(planes):
            overlay = row[place + len(planes)]
            if own:
                for axes in (row[place], overlay):
                    _mark(
                        axes,
                        view_plane(similarity.case.orientation, axis),
                        axis,
                        comparison.query_vox,
                        "+",
                        QUERY_COLOUR,
                    )
            _draw_values(overlay, similarity.cosine, axis, centre, similarity.case, scale)
            if similarity.nearest_vox[axis] == centre[axis]:
                for axes in (row[place], overlay) if not own else (overlay,):
                    view = view_plane(similarity.case.orientation, axis)
                    _mark(axes, view, axis, similarity.nearest_vox, "o", NEAREST_COLOUR)
        _head(row[0], f"{similarity.case.name}{': query ' + _name(centre) if own else ''}")
        _head(row[len(planes)], f"nearest {_name(similarity.nearest_vox)}, cosine {similarity.nearest_cosine:.3f}")
    bar = figure.colorbar(
        ScalarMappable(scale, COLOUR_MAP), ax=panels.ravel().tolist(), extend="min", alpha=OVERLAY, aspect=40
    )
    bar.set_label("cosine similarity to the query", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    return figure


def embedding_figure(embedding: Embedding, title: str) -> Figure:
    """Draw cases side by side, with the first three principal components of their features as red, green and blue.

    In 2D, the colours are below the image of each case. In 3D, there is one row for each plane, and the colours are to
    the right of the image.

    Args:
        embedding: Components of the cases.
        title: Title of the figure.
    """
    shares = ", ".join(f"{100 * share:.0f} %" for share in embedding.share)
    legend = f"components 1, 2, 3 of all cases as red, green, blue: {shares} of the variance"
    figure, panels = _make_columns([each.case for each in embedding.cases], embedding.two_dimensional, title, legend)
    planes = _planes(embedding.two_dimensional)
    for number, shown in enumerate(embedding.cases):
        images, colours = (panels[:1, number], panels[1:, number])
        if not embedding.two_dimensional:
            images, colours = panels[:, 2 * number], panels[:, 2 * number + 1]
        _draw_case(images, shown.case, shown.centre_vox, planes)
        for axes, axis in zip(colours, planes, strict=True):
            _draw_components(axes, shown, axis)
        _head(images[0], shown.case.name)
    return figure


def uncertainty_figure(uncertainty: Uncertainty, title: str) -> Figure:
    """Draw the image, alone and overlaid with the uncertainty of the teacher.

    Args:
        uncertainty: Uncertainty of the teacher in a case.
        title: Title of the figure.
    """
    case, centre = uncertainty.case, uncertainty.centre_vox
    figure, panels = _make_panels([case], uncertainty.two_dimensional, title)
    planes = _planes(uncertainty.two_dimensional)
    _draw_case(panels[0], case, centre, planes)
    shown = np.concatenate([uncertainty.values.take(centre[axis], axis).ravel() for axis in planes])
    scale = Normalize(*np.nanpercentile(shown, (1, 99)))
    for axes, axis in zip(panels[0, len(planes) :], planes, strict=True):
        _draw_values(axes, uncertainty.values, axis, centre, case, scale)
    _head(panels[0, 0], case.name)
    _head(panels[0, len(planes)], f"mean uncertainty {np.nanmean(shown):.3f}")
    bar = figure.colorbar(
        ScalarMappable(scale, COLOUR_MAP), ax=panels.ravel().tolist(), extend="both", alpha=OVERLAY, aspect=40
    )
    bar.set_label("uncertainty: 0 for one-hot, 1 for uniform", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    return figure


def reconstruction_figure(
    reconstructions: Sequence[Reconstruction], spacing_mm: Sequence[float], title: str, orientation: str = ""
) -> Figure:
    """Draw input, target and output of each model, one row per model.

    Args:
        reconstructions: Reconstructions of one patch.
        spacing_mm: Spacing of the patch in mm.
        title: Title of the figure.
        orientation: Directions in which z, y and x of the patch increase; empty if unknown.
    """
    view = view_plane(orientation, 0)
    shape, sides_mm = view.pair(*reconstructions[0].seen.shape), view.pair(*spacing_mm[-2:])
    figure, panels = _rows_of_three(len(reconstructions), shape, sides_mm, title)
    low, high = np.percentile(np.stack([each.target for each in reconstructions]), (1, 99))
    for row, each in zip(panels, reconstructions, strict=True):
        for axes, image in zip(row, (each.seen, each.target, each.output), strict=True):
            _show(
                axes, image, view, sides_mm[0] / sides_mm[1], cmap="gray", vmin=low, vmax=high, interpolation="nearest"
            )
        _head(row[0], f"{MODEL_NAMES[each.model]}: input")
        _head(row[1], "target")
        _head(row[2], f"output: error {each.error:.2f}, baseline {each.error_untold:.2f}")
    return figure


def matches_figure(
    matches: Sequence[PlaceMatch], spacing_mm: Sequence[float], title: str, orientations: tuple[str, str] = ("", "")
) -> Figure:
    """Draw each place in its case and its matches in the other case, by embeddings and by the body's box.

    Args:
        matches: Matches, one row each.
        spacing_mm: Spacing of the crops in mm.
        title: Title of the figure.
        orientations: Directions in which z, y and x of the case and of the other case increase; empty if unknown.
    """
    rows, columns = matches[0].query.shape
    own, other = (view_plane(each, 0) for each in orientations)
    sides = [(view.pair(rows, columns), view.pair(*spacing_mm[-2:])) for view in (own, other)]
    figure, panels = _rows_of_three(len(matches), *max(sides, key=lambda each: each[0][0] * each[1][0]), title)
    shown = np.stack([image for each in matches for image in (each.query, each.found, each.box)])
    low, high = np.percentile(shown, (1, 99))
    for row, each in zip(panels, matches, strict=True):
        crops = ((each.query, "+", QUERY_COLOUR), (each.found, "o", NEAREST_COLOUR), (each.box, "s", BOX_COLOUR))
        for axes, view, (image, marker, colour) in zip(row, (own, other, other), crops, strict=True):
            down_mm, across_mm = view.pair(*spacing_mm[-2:])
            _show(axes, image, view, down_mm / across_mm, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            _mark(axes, view, 0, (0, rows // 2, columns // 2), marker, colour)
        _head(row[0], f"place {_name(each.query_vox)}")
        _head(row[1], f"by embeddings, similarity {each.score:.2f},\ncycle error {each.cycle_mm:.0f} mm")
        _head(row[2], "by the place\nin the body's box")
    return figure


def check_picture_path(path: Path) -> Path:
    """Check that a picture can be written to a path, and return the path.

    Raises:
        UserError: If the path does not end in ``.png``, its folder does not exist, or it is a folder.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: is not a PNG file; give a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {path.absolute().parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file name")
    return path


def write_picture(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    write_atomically(path, lambda file: save_png(figure, file))


def save_png(figure: Figure, file: BinaryIO) -> None:
    """Save a figure as PNG, independently of matplotlib's backend."""
    # The layout is computed before planes have their proportions, so the figure is drawn once in advance.
    FigureCanvasAgg(figure).draw()
    figure.savefig(file, format="png", dpi=DPI)


def _planes(two_dimensional: bool) -> tuple[int, ...]:
    """Return the axes perpendicular to the planes shown."""
    return (0,) if two_dimensional else (0, 1, 2)


def _make_panels(cases: Sequence[Any], two_dimensional: bool, title: str) -> tuple[Figure, Any]:
    """Return a figure and its axes (case; planes of the image, then of the overlay), with widths proportional to mm."""
    sides_mm = [_sides_mm(cases, axis) for axis in _planes(two_dimensional)]
    widths = [wide for _, wide in sides_mm] * 2
    tall_mm = max(tall for tall, _ in sides_mm)
    inches = PANEL_INCHES / tall_mm
    width = max(sum(widths) * inches * 1.1 + 1.2, LEAST_INCHES)
    figure = Figure(figsize=(width, (PANEL_INCHES + 0.55) * len(cases) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 1)
    panels = figure.subplots(len(cases), len(widths), squeeze=False, width_ratios=widths)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, panels


def _sides_mm(cases: Sequence[Any], axis: int) -> tuple[float, float]:
    """Return the largest height and width in mm at which the planes of cases perpendicular to an axis are shown."""
    sides = []
    for case in cases:
        extents_mm = np.multiply(case.shape, case.spacing_mm)
        sides.append(view_plane(case.orientation, axis).pair(*np.delete(extents_mm, axis)))
    tall, wide = np.max(sides, axis=0)
    return float(tall), float(wide)


def _make_columns(cases: Sequence[Any], two_dimensional: bool, title: str, legend: str) -> tuple[Figure, Any]:
    """Return a figure and its axes for cases side by side, (image and colours, case) or (plane, image and colours)."""
    sides_mm = [_sides_mm(cases, axis) for axis in _planes(two_dimensional)]
    heights = [tall for tall, _ in sides_mm]
    wide_mm = max(wide for _, wide in sides_mm)
    rows, columns = (heights * 2, len(cases)) if two_dimensional else (heights, 2 * len(cases))
    inches = PANEL_INCHES / max(*heights, wide_mm)
    width = max(columns * (wide_mm * inches + 0.15) + 0.2, LEAST_INCHES)
    figure = Figure(figsize=(width, sum(rows) * inches + 0.35 * len(rows) + 0.9), layout="constrained")
    figure.suptitle(f"{title}\n{legend}", fontsize=FONT_SIZE + 1)
    panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, panels


def _rows_of_three(count: int, shape: Sequence[float], spacing_mm: Sequence[float], title: str) -> tuple[Figure, Any]:
    """Return a figure and its axes (row, 3) without ticks for crops of one shape, with proportions as in mm."""
    down, across = spacing_mm[-2:]
    width = PANEL_INCHES * shape[1] * across / (shape[0] * down)
    size = (max(3 * width + 0.4, LEAST_INCHES), (PANEL_INCHES + 0.4) * count + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 1)
    panels = figure.subplots(count, 3, squeeze=False)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, panels


def _window(volume: Float32[np.ndarray, "z y x"], centre: Voxel, planes: Sequence[int]) -> tuple[float, float]:
    """Return the intensities shown as black and white: the 1st and 99th percentile of the planes."""
    shown = np.concatenate([volume.take(centre[axis], axis).ravel() for axis in planes])
    low, high = np.percentile(shown, (1, 99))
    return float(low), float(high)


def _draw_case(panels: Sequence[Any], case: StoredCase, centre: Voxel, planes: Sequence[int]) -> None:
    """Draw the planes of a case through a voxel once or, for twice as many panels, twice."""
    volume = case.read_box((0, 0, 0), case.shape)[0]
    bounds = _window(volume, centre, planes)
    for place, axes in enumerate(panels):
        axis = planes[place % len(planes)]
        plane = volume.take(centre[axis], axis)
        _show_plane(axes, plane, case, axis, cmap="gray", vmin=bounds[0], vmax=bounds[1], interpolation="nearest")
        axes.set_xlabel(f"{AXES[axis]} = {centre[axis]}", fontsize=FONT_SIZE)


def _draw_components(axes: Any, shown: CaseComponents, axis: int) -> None:
    """Draw the components in a plane of a case as red, green and blue."""
    place = shown.centre_vox[axis]
    colour = np.moveaxis(shown.components.take(place, axis + 1), 0, -1)
    _show_plane(axes, colour, shown.case, axis, interpolation="nearest")
    axes.set_xlabel(f"{AXES[axis]} = {place}", fontsize=FONT_SIZE)


def _draw_values(
    axes: Any,
    values: Float32[np.ndarray, "z y x"],
    axis: int,
    centre: Voxel,
    case: StoredCase,
    scale: Normalize,
) -> None:
    """Draw values over a plane of a case."""
    _show_plane(axes, values.take(centre[axis], axis), case, axis, norm=scale, cmap=COLOUR_MAP, alpha=OVERLAY)


def _show_plane(axes: Any, plane: np.ndarray, case: StoredCase, axis: int, **options: Any) -> None:
    """Show a plane of a case in its proportions."""
    view = view_plane(case.orientation, axis)
    down_mm, across_mm = view.pair(*(length for other, length in enumerate(case.spacing_mm) if other != axis))
    _show(axes, plane, view, down_mm / across_mm, **options)


def _show(axes: Any, plane: np.ndarray, view: PlaneView, aspect: float, **options: Any) -> None:
    """Show a plane, whose pixels have this ratio of height to width, in a view."""
    axes.imshow(view.image(plane), aspect=aspect, origin="lower", **options)
    if axes.yaxis_inverted() != view.first_on_top:
        axes.invert_yaxis()
    if axes.xaxis_inverted() == view.first_on_left:
        axes.invert_xaxis()


def _mark(axes: Any, view: PlaneView, axis: int, point: Voxel, marker: str, colour: str) -> None:
    """Mark a point in a plane; the black rim keeps it visible on white."""
    down, across = view.pair(*(place for other, place in enumerate(point) if other != axis))
    rim = [patheffects.Stroke(linewidth=3, foreground="black"), patheffects.Normal()]
    axes.plot(
        across, down, marker, markersize=10, markeredgewidth=1.6, fillstyle="none", color=colour, path_effects=rim
    )


def _head(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=FONT_SIZE)


def _name(point: Voxel) -> str:
    return "({}, {}, {})".format(*point)
