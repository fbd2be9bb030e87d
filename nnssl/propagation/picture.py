"""Pictures of annotated cases and of drafts: the slice with the most foreground, alone and overlaid."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnssl.palette import ON_IMAGES as COLOURS
from nnssl.study.segmentation_pictures import FONT_SIZE, PANEL_INCHES, SegmentedCase, draw_slice, shown_slice

COLUMNS = 3


def drafts_figure(cases: Sequence[SegmentedCase], labels: Mapping[str, int], title: str) -> Figure:
    """Draw the image and the overlaid segmentation of every case, three cases in a row.

    Args:
        cases: Cases; ``reference`` is the segmentation to draw, and the note ``""`` is written above it.
        labels: Value of each label.
        title: Title of the figure.
    """
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(2 * PANEL_INCHES * columns + 0.4, (PANEL_INCHES + 0.4) * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 2)
    panels = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    colours = {value: COLOURS[place % len(COLOURS)] for place, value in enumerate(labels.values())}
    for row in panels[len(cases) :]:
        for axes in row:
            axes.axis("off")
    for (plain, overlaid), case in zip(panels, cases, strict=False):
        axis, place = shown_slice(case.reference, case.spacing_mm)
        draw_slice(plain, case, axis, place, None, colours)
        draw_slice(overlaid, case, axis, place, case.reference, colours)
        plain.set_title(case.name, fontsize=FONT_SIZE)
        plain.set_xlabel(f"slice {place} across {'zyx'[axis]}", fontsize=FONT_SIZE)
        overlaid.set_title(case.notes[""], fontsize=FONT_SIZE)
    handles = [Patch(color=colours[value], alpha=0.8, label=name) for name, value in labels.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=FONT_SIZE, frameon=False
    )
    return figure
