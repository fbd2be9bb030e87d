"""Writes the report of a study: one HTML page that opens offline, and its table as CSV and Markdown."""

import base64
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from nnssl.evaluation.metrics import COLUMNS
from nnssl.files import write_atomically, write_csv
from nnssl.plan import Decision
from nnssl.study import words as study_words
from nnssl.study.figures import (
    Key,
    Panel,
    Style,
    arm_styles,
    dice_limits,
    label_curves,
    label_styles,
    legend,
    length_curves,
    pretraining_panels,
)
from nnssl.study.table import FEWEST_CASES, SCRATCH, Cell, RateChoice, Rise, Row, StudyTable
from nnssl.study.words import count, interval_points, mode_name, summarise
from nnssl.tables import points, signed_points

TEMPLATE = "report_template.html"
WIDE_PIXELS = 800
"""Width above which a picture is shown larger on a phone, where the reader scrolls, because it has many panels."""
CSV_CELL = ("arm", "mode", "labels", "seed", "steps")


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    png: bytes
    alt: str
    """Text alternative for readers who cannot see the picture."""
    caption: str


@dataclass(frozen=True)
class PretrainingCurve:
    """The metrics that one pretraining stage logged."""

    arm: str
    stage: str
    metrics: dict[str, list[float]]
    """One value per epoch by the name in ``metrics.csv``; NaN where nothing was measured."""


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    title: str
    dataset_name: str
    """Data set of fine-tuning and evaluation."""
    source_name: str
    """Data set of pretraining."""
    table: StudyTable
    rates: tuple[RateChoice, ...]
    """Learning rates that each arm was trained with, and the one that was chosen; empty if there was one rate."""
    pictures: tuple[Picture, ...]
    """Segmentations of scratch and the arms beside the reference, on the same slices."""
    method_pictures: dict[str, tuple[Picture, ...]]
    """Pictures of what the method learned (similarity, reconstruction, matches), by arm."""
    curves: tuple[PretrainingCurve, ...]
    decisions: tuple[Decision, ...]
    """Decisions of the plan."""
    facts: dict[str, dict[str, str]]
    """Names and values by section (versions, hardware, time)."""
    commands: tuple[str, ...]
    """Commands that reproduce the study."""
    notes: tuple[str, ...]
    """Notes that a reader must know, such as the held-out patients, the check for leaks and missing cells."""


@dataclass(frozen=True)
class RowGroup:
    """Rows that are compared with one another."""

    labels: int
    steps: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ModeSection:
    """The section of one mode of fine-tuning."""

    name: str
    curves: tuple[Panel, ...]
    """One panel for each length, the longest first."""
    lengths: Panel | None
    """Dice of scratch against steps; None if scratch has one length only."""
    rises: tuple[Rise, ...]
    longest: tuple[RowGroup, ...]
    shorter: tuple[RowGroup, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class CurveSection:
    """The pretraining curves of one stage."""

    stage: str
    panels: tuple[Panel, ...]


def render_report(report: Report) -> str:
    """Render a report as self-contained HTML.

    Args:
        report: Content; every part may be empty, and rows may be missing.
    """
    rows = report.table.rows
    styles = arm_styles([row.arm for row in rows])
    shown = {arm: style for arm, style in styles.items() if any(row.arm == arm for row in rows)}
    steps = label_styles(sorted({row.labels for row in rows if row.arm == SCRATCH}))
    text = resources.files("nnssl.study").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return (
        _environment()
        .from_string(text)
        .render(
            report=report,
            summary=summarise(report.table, report.dataset_name, report.source_name),
            seeds=len({seed for row in rows for seed in row.seeds}),
            fewest_cases=FEWEST_CASES,
            arms=legend(shown, "arm"),
            lengths=_length_legend(steps),
            modes=[
                _mode_section(report.table, mode, shown, steps, f"mode{index}")
                for index, mode in enumerate(dict.fromkeys(row.mode for row in rows))
            ],
            pretraining=_curve_sections(report.curves),
            plan=_group_decisions(report.decisions),
        )
    )


def write_report(path: Path, report: Report) -> None:
    """Write a report as HTML, atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    content = render_report(report).encode()
    write_atomically(path, lambda file: file.write(content))


def results_csv(path: Path, cells: Sequence[Cell]) -> None:
    """Write the metrics of every held-out case and class to a CSV file, atomically.

    Dice and normalised surface distance are fractions from 0 to 1, unlike in the report, which shows points. An empty field
    stands for a metric that is not defined.

    Args:
        path: Path of the CSV file.
        cells: Cells of the study.
    """
    lines = [[*(getattr(cell, name) for name in CSV_CELL), *astuple(case)] for cell in cells for case in cell.metrics]
    write_csv(path, [*CSV_CELL, *COLUMNS], lines)


def write_rates(path: Path, choices: Sequence[RateChoice]) -> None:
    """Write the validation Dice (0 to 1) of every learning rate to a CSV file, atomically.

    Args:
        path: Path of the CSV file.
        choices: Choices of the study.
    """
    lines = [
        [each.arm, each.mode, each.labels, each.steps, f"{rate:g}", dice, int(rate == each.chosen)]
        for each in choices
        for rate, dice in each.dice.items()
    ]
    write_csv(path, ["arm", "mode", "labels", "steps", "learning_rate", "validation_dice", "chosen"], lines)


def markdown_table(table: StudyTable) -> str:
    """Format a study as a Markdown table.

    The table has one line for each arm, mode and length, and one column for each number of labels. A cell holds the Dice
    in points with its interval, the gain in points and the verdict.
    """
    labels = sorted({row.labels for row in table.rows})
    found = {(row.mode, row.arm, row.steps, row.labels): row for row in table.rows}
    # within a mode the lengths of an arm stand together
    places = {mode: index for index, mode in enumerate(dict.fromkeys(row.mode for row in table.rows))}
    arms = {arm: index for index, arm in enumerate(dict.fromkeys(row.arm for row in table.rows))}
    keys = sorted({key[:3] for key in found}, key=lambda key: (places[key[0]], arms[key[1]], key[2]))
    several = len(places) > 1
    header = ["arm", "steps", *(f"Dice (points), {count(each, 'label')}" for each in labels)]
    lines = [header, ["---"] * len(header)]
    for mode, arm, steps in keys:
        name = arm if arm == SCRATCH else f"`{arm}`"
        shown = [found.get((mode, arm, steps, each)) for each in labels]
        first = f"{name}, {mode_name(mode)}" if several else name
        lines.append([first, str(steps), *("" if row is None else _markdown_cell(row) for row in shown)])
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"|{'|'.join(line)}|\n" if line[0] == "---" else f"| {' | '.join(line)} |\n" for line in escaped)


def _markdown_cell(row: Row) -> str:
    text = f"{points(row.dice.mean)} {interval_points(row.dice)}"
    if row.gain is not None:
        text += f"; {signed_points(row.gain.difference.mean)}"
    return f"{text}; {row.verdict}" if row.verdict else text


def _environment() -> Environment:
    """Return a Jinja environment that escapes all text and rejects missing names."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "points": lambda value: "–" if value is None else points(value),
        "signed": lambda value: _typeset(signed_points(value)),
        "interval": lambda value: interval_points(value),
        "signed_interval": lambda value: _typeset(interval_points(value, signed=True)),
        "p_value": study_words.p_value,
        "typeset": _typeset,
        "breakable": _breakable,
        "mode": mode_name,
        "count": count,
        "image": _image,
        "safe_svg": Markup,  # inline_svg has escaped it
    }
    environment.tests["wide"] = _is_wide
    return environment


def _typeset(text: str) -> str:
    """Replace the hyphen before a number by a minus sign."""
    return "".join(
        "\N{MINUS SIGN}" if sign == "-" and (not before or before in " [(") and after.isdigit() else sign
        for before, sign, after in zip(["", *text], text, [*text[1:], ""], strict=False)
    )


def _breakable(name: str) -> Markup:
    """Return the name of an arm with the positions at which a narrow column may break it."""
    return Markup("<wbr>").join(re.split(r"(?<=.)(?=[:/=]|(?<!_)__|\.\D)", name))


def _size(picture: Picture) -> tuple[int, int]:
    """Return width and height in pixels.

    Raises:
        ValueError: If the picture is not a PNG.
    """
    try:
        with Image.open(BytesIO(picture.png), formats=("PNG",)) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise ValueError(f"the picture {picture.caption!r} is not a PNG") from error


def _is_wide(picture: Picture) -> bool:
    return _size(picture)[0] > WIDE_PIXELS


def _image(picture: Picture) -> Markup:
    """Return a picture as an ``img`` element that contains the data."""
    return Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">').format(
        base64.b64encode(picture.png).decode(), picture.alt, *_size(picture)
    )


def _mode_section(
    table: StudyTable, mode: str, styles: dict[str, Style], steps: dict[int, Style], prefix: str
) -> ModeSection:
    rows = [row for row in table.rows if row.mode == mode]
    limits = dice_limits(rows)
    lengths = sorted({row.steps for row in rows}, reverse=True)
    panels = []
    for length in lengths:
        own = [row for row in rows if row.steps == length]
        note = " (the longest)" if len(lengths) > 1 and length == lengths[0] else ""
        caption = f"{mode_name(mode).capitalize()}, {count(length, 'step')}{note}"
        panels.append(label_curves(own, styles, limits, f"{prefix}-{length}", caption))
    scratch = [row for row in rows if row.arm == SCRATCH]
    several = len({row.steps for row in scratch}) > 1
    groups = _group_rows(rows)
    return ModeSection(
        name=mode_name(mode),
        curves=tuple(panels),
        lengths=length_curves(table, mode, steps, dice_limits(scratch), f"{prefix}-steps") if several else None,
        rises=tuple(rise for rise in table.rises if rise.mode == mode),
        longest=tuple(group for group in groups if group.steps == lengths[0]),
        shorter=tuple(group for group in groups if group.steps != lengths[0]),
        classes=tuple(dict.fromkeys(name for row in rows for name in row.class_dice)),
    )


def _group_rows(rows: Sequence[Row]) -> list[RowGroup]:
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.steps, row.labels), []).append(row)
    return [RowGroup(labels, steps, tuple(groups[steps, labels])) for steps, labels in sorted(groups)]


def _length_legend(styles: dict[int, Style]) -> list[Key]:
    return legend({count(labels, "label"): style for labels, style in styles.items()}, "length")


def _curve_sections(curves: Sequence[PretrainingCurve]) -> dict[str, list[CurveSection]]:
    """Return the sections of all stages by arm."""
    sections: dict[str, list[CurveSection]] = {}
    for index, curve in enumerate(curves):
        panels = pretraining_panels(curve.metrics, f"curve{index}", f"{curve.arm}, stage {curve.stage}")
        sections.setdefault(curve.arm, []).append(CurveSection(curve.stage, tuple(panels)))
    return sections


def _group_decisions(decisions: Sequence[Decision]) -> dict[str, list[Decision]]:
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(decision.configuration, []).append(decision)
    return groups
