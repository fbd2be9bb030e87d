"""Figures of the report as SVG inside an HTML page.

The colours are Okabe and Ito's, which colour-blind readers can distinguish, and each arm has its own marker. Axes and labels
take the page's text colour, so that they suit light and dark pages. Every figure has a text alternative with its numbers.
Text remains text in the page's font.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from nnssl.palette import ON_WHITE as COLOURS
from nnssl.study.table import SCRATCH, Interval, Row, StudyTable
from nnssl.study.words import count, interval_points, mode_name
from nnssl.tables import points

INK = "#010203"
"""Placeholder, which ``inline_svg`` replaces by the page's text colour."""
MARKERS = ("s", "^", "D", "v", "P", "X", "h")
LINES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (1, 1)))
"""Line styles; the next one is used each time the colours repeat."""
PANEL_INCHES = (4.5, 3.2)
SMALL_PANEL_INCHES = (3.4, 2.2)
FONT_SIZE = 9
DODGE = 4.5
"""Typographic points between arms at the same number of labels, so that intervals do not overlap."""
LEFT_OUT = frozenset({"learning_rate", "epoch_seconds", "data_wait_share", "patches_per_second", "gradient_norm"})
"""Metrics that describe the run rather than what was learned; they remain in ``metrics.csv``."""
RETRIEVAL = "retrieval_"
"""Start of the metrics that measure the retrieval of views."""
RETRIEVAL_SHOWN = tuple(f"{RETRIEVAL}{kind}{what}" for kind in ("pooled", "points") for what in ("", "_random"))
"""Metrics of retrieval in the figures: the mean over the stages, and that of random weights."""
PROBE = "probe_dice"
"""Metric of the linear probe: a Dice from 0 to 1, which figures show in points."""
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of an arm in all figures."""

    colour: str
    marker: str
    line: Any


@dataclass(frozen=True)
class Panel:
    """A figure of the page."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    svg: str
    name: str


def arm_styles(arms: Sequence[str]) -> dict[str, Style]:
    """Return a style for each arm; scratch has the page's text colour and a dashed line."""
    others = [arm for arm in dict.fromkeys(arms) if arm != SCRATCH]
    styles = {SCRATCH: Style(INK, "o", "--")}
    for index, arm in enumerate(others):
        line = LINES[index // len(COLOURS) % len(LINES)]
        styles[arm] = Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], line)
    return styles


def label_styles(labels: Sequence[int]) -> dict[int, Style]:
    """Return a style for each number of labels, all in the page's text colour."""
    markers = ("o", *MARKERS)
    return {
        each: Style(INK, markers[index % len(markers)], LINES[index % len(LINES)]) for index, each in enumerate(labels)
    }


def legend(styles: Mapping[str, Style], prefix: str) -> list[Key]:
    """Draw a legend entry with the line and marker of each style."""
    keys = []
    for index, (name, style) in enumerate(styles.items()):
        figure = Figure(figsize=(0.5, 0.2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-1, 1)
        axes.plot([-0.9, 0.9], [0, 0], linestyle=style.line, color=style.colour, linewidth=1.6)
        axes.plot([0], [0], marker=style.marker, color=style.colour, markersize=6)
        keys.append(Key(inline_svg(figure, f"{prefix}-{index}", f"line and marker of {name}"), name))
    return keys


def dice_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the limits of an axis, in points, that shows the Dice of all these rows."""
    values = [value for row in rows for value in (row.dice.low, row.dice.high, *row.seed_dice)]
    low, high = 100 * min(values), 100 * max(values)
    margin = max(0.06 * (high - low), 1.0)
    spread = 0.03 * (high - low)
    return max(low - margin, -spread - 0.5), min(high + margin, 100 + spread + 0.5)


def label_curves(
    rows: Sequence[Row], styles: Mapping[str, Style], limits: tuple[float, float], prefix: str, caption: str
) -> Panel:
    """Draw the Dice against the number of labels for all arms of one mode and length.

    Args:
        rows: Rows of one mode and length.
        styles: Style of each arm.
        limits: Limits of the Dice axis in points.
        prefix: Prefix of the ids inside the figure.
        caption: Caption below the figure.
    """
    labels = sorted({row.labels for row in rows})
    figure, axes = _make_axes(labels, "labels, log scale", limits)
    arms = [arm for arm in styles if any(row.arm == arm for row in rows)]
    words = []
    for place, arm in enumerate(arms):
        own = sorted((row for row in rows if row.arm == arm), key=lambda row: row.labels)
        style, shift = styles[arm], DODGE * (place - (len(arms) - 1) / 2)
        moved = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
        beside = axes.transData + ScaledTranslation((shift + DODGE / 2) / 72, 0, figure.dpi_scale_trans)
        _draw_intervals(axes, [row.labels for row in own], [row.dice for row in own], style, moved)
        for row in own:
            at = [row.labels] * len(row.seed_dice)
            dots = {"markersize": 2.4, "markeredgewidth": 0, "color": style.colour, "transform": beside}
            axes.plot(at, 100 * np.array(row.seed_dice), "o", **dots)
        numbers = [
            f"{points(row.dice.mean)} {interval_points(row.dice)} with {count(row.labels, 'label')}" for row in own
        ]
        words.append(f"{arm}: {', '.join(numbers)}")
    description = f"{caption}. Dice (points) with 95 % intervals. {'; '.join(words)}."
    return Panel(inline_svg(figure, prefix, description), caption)


def length_curves(
    table: StudyTable, mode: str, styles: Mapping[int, Style], limits: tuple[float, float], prefix: str
) -> Panel:
    """Draw the Dice of scratch against the steps of fine-tuning, with one line for each number of labels.

    Args:
        table: Table of the study.
        mode: Mode of fine-tuning to draw.
        styles: Style of each number of labels.
        limits: Limits of the Dice axis in points.
        prefix: Prefix of the ids inside the figure.
    """
    rows = [row for row in table.rows if row.mode == mode and row.arm == SCRATCH]
    figure, axes = _make_axes(sorted({row.steps for row in rows}), "steps of fine-tuning, log scale", limits)
    words = []
    for labels, style in styles.items():
        own = sorted((row for row in rows if row.labels == labels), key=lambda row: row.steps)
        if own:
            _draw_intervals(axes, [row.steps for row in own], [row.dice for row in own], style, axes.transData)
            numbers = [f"{points(row.dice.mean)} after {row.steps:,} steps" for row in own]
            words.append(f"{count(labels, 'label')}: {', '.join(numbers)}")
    caption = f"Scratch, {mode_name(mode)}"
    return Panel(inline_svg(figure, prefix, f"{caption}. Dice (points). {'; '.join(words)}."), caption)


def pretraining_panels(metrics: Mapping[str, Sequence[float]], prefix: str, what: str) -> list[Panel]:
    """Draw the metrics of a pretraining stage over its epochs: all losses in one panel, each other metric in its own.

    Args:
        metrics: One value per epoch by metric; NaN where nothing was measured.
        prefix: Prefix of the ids inside the figures.
        what: Arm and stage for the text alternatives.
    """
    measured = {
        name: np.asarray(values, float)
        for name, values in metrics.items()
        if name not in LEFT_OUT and (name in RETRIEVAL_SHOWN or not name.startswith(RETRIEVAL))
    }
    measured = {name: values for name, values in measured.items() if np.isfinite(values).any()}
    if PROBE in measured:
        measured[PROBE] = 100 * measured[PROBE]
    losses = [name for name in measured if name == "loss" or name.startswith("loss_")]
    if len(losses) == 2:  # a sum of one part equals that part
        losses.remove("loss")
    groups = {"loss": losses} if losses else {}
    retrieval = [name for name in measured if name.startswith(RETRIEVAL)]
    if retrieval:
        groups["retrieval by the exported network"] = retrieval
    # The probe comes first because it tells when to stop.
    others = sorted(
        (name for name in measured if name not in losses and name not in retrieval and name != "loss"),
        key=lambda name: name != PROBE,
    )
    groups |= {_metric_name(name): [name] for name in others}
    panels = []
    for index, (title, names) in enumerate(groups.items()):
        figure = _draw_metrics({name: measured[name] for name in names}, title)
        captions = [_describe_metric(name, measured[name]) for name in names]
        description = f"{what}, {title} over the epochs. {'; '.join(captions)}."
        panels.append(Panel(inline_svg(figure, f"{prefix}-{index}", description), "; ".join(captions)))
    return panels


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """Return a figure as a self-contained ``svg`` element for a page with other figures.

    Ids that the figure does not refer to are removed.

    Args:
        figure: Figure to draw.
        prefix: Prefix of its ids, unique within the page.
        description: Text alternative.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nnssl"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", file.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{SVG}metadata", f"{SVG}style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = {name: _inline(name, text, prefix) for name, text in _attributes(element, used)}
    view = root.attrib["viewBox"]
    root.attrib = {"viewBox": view, "role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(element: ElementTree.Element, used: set[str]) -> list[tuple[str, str]]:
    """Return the attributes of an element without namespaces and unused ids."""
    named = [(name.removeprefix(XLINK), text) for name, text in element.attrib.items()]
    return [(name, text) for name, text in named if name != "id" or text in used]


def _inline(name: str, text: str, prefix: str) -> str:
    """Return the value of an attribute with prefixed ids and the page's text colour and font."""
    if name == "id":
        return f"{prefix}-{text}"
    text = re.sub(r"(^|url\()#(?=[mp]\w{10}\b)", rf"\g<1>#{prefix}-", text)
    text = re.sub(r"font-family: [^;]+; ?", "", text)
    return text.replace(INK, "currentColor")


def _make_axes(ticks: Sequence[int], label: str, limits: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure with Dice in points against measured values, which are the ticks of a logarithmic axis."""
    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    margin = max(1.4, (max(ticks) / min(ticks)) ** 0.15)
    axes.set_xlim(min(ticks) / margin, max(ticks) * margin)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)
    axes.set_ylabel("Dice (points)")
    _calm(axes)
    return figure, axes


def _calm(axes: Any) -> None:
    """Reduce the frame to two thin sides and a faint grid in the page's text colour."""
    axes.tick_params(colors=INK, labelsize=FONT_SIZE, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_edgecolor(INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=FONT_SIZE)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_intervals(axes: Any, at: Sequence[int], dice: Sequence[Interval], style: Style, transform: Any) -> None:
    mean = 100 * np.array([each.mean for each in dice])
    down = np.maximum(mean - 100 * np.array([each.low for each in dice]), 0)
    up = np.maximum(100 * np.array([each.high for each in dice]) - mean, 0)
    axes.errorbar(
        at,
        mean,
        yerr=np.stack([down, up]),
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        markersize=5.5,
        linewidth=1.5,
        elinewidth=1,
        capsize=2.5,
        transform=transform,
    )


def _draw_metrics(metrics: Mapping[str, np.ndarray], title: str) -> Figure:
    figure = Figure(figsize=SMALL_PANEL_INCHES, layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(metrics.items()):
        epochs = np.flatnonzero(np.isfinite(values))
        # Sparse values need markers, since a line alone would hide how few they are.
        marker = MARKERS[index % len(MARKERS)] if len(epochs) <= 60 else ""
        colour, line = COLOURS[index % len(COLOURS)], LINES[index % len(LINES)]
        label = name.removeprefix("loss_").replace("_", " ") if name != "loss" else "sum"
        axes.plot(epochs, values[epochs], marker=marker, linestyle=line, color=colour, markersize=3, label=label)
        if name == PROBE:
            best = int(np.nanargmax(values))
            axes.plot([best], [values[best]], "o", markersize=9, markeredgecolor=INK, fillstyle="none")
    axes.set_title(title, loc="left", fontsize=FONT_SIZE, color=INK)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _calm(axes)
    if len(metrics) > 1:
        axes.legend(fontsize=FONT_SIZE - 1, frameon=False, labelcolor=INK)
    return figure


def _metric_name(name: str) -> str:
    return "probe Dice (points)" if name == PROBE else name.replace("_", " ")


def _describe_metric(name: str, values: np.ndarray) -> str:
    """Return the first and the last value; for the probe also the best one, whose weights are kept."""
    epochs = np.flatnonzero(np.isfinite(values))
    text = f"{_metric_name(name)}: {values[epochs[0]]:.3g} to {values[epochs[-1]]:.3g}"
    if name == PROBE:
        best = int(np.nanargmax(values))
        text += f", best {values[best]:.3g} in epoch {best} (ring)"
    return text
