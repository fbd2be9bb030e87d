"""Draw the stages from raw images to the report, for the README.

Run ``python -m tools.picture_of_stages`` to write ``documentation/stages.png``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PAGE = Path(__file__).parent.parent / "documentation" / "stages.png"
COMMANDS = (
    (
        "nnssl_plan_and_preprocess",
        "#0072B2",
        (
            ("raw images", "as nnU-Net\nfinds them"),
            ("fingerprint", "what the images\nare like"),
            ("plan", "what follows,\nwith reasons"),
            ("preprocess", "cases of one\nspacing"),
        ),
    ),
    (
        "nnssl_pretrain",
        "#B34A00",
        (
            ("views", "crops, turns,\ncontrast, masks"),
            ("method", "what is learned\nfrom the views"),
            ("pretrain", "no labels;\na checkpoint"),
        ),
    ),
    (
        "nnssl_export, nnssl_finetune, nnssl_evaluate, nnssl_benchmark",
        "#00735A",
        (
            ("export", "weights for\nyour plan"),
            ("finetune", "nnU-Net on\nfew labels"),
            ("evaluate", "Dice, surface\ndistances"),
            ("report", "against a start\nfrom scratch"),
        ),
    ),
)
"""Rows of the picture: commands, colour, and stages with a short description."""
WIDTH, HEIGHT, GAP, ROW = 1.9, 0.95, 0.42, 1.7
"""Width and height of a box, distance between boxes, and distance between rows, in units of the drawing."""
LINES = "#767676"
"""Grey that is visible on white and on black."""


def draw_box(axes: Axes, x: float, y: float, colour: str, name: str, text: str) -> None:
    """Draw one stage with its lower left corner at (x, y)."""
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=shape, facecolor=colour, edgecolor="none"))
    axes.text(x + WIDTH / 2, y + HEIGHT - 0.23, name, color="white", size=11.5, weight="bold", ha="center", va="center")
    axes.text(x + WIDTH / 2, y + 0.33, text, color="white", size=9, ha="center", va="center", linespacing=1.1)


def draw_arrow(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Draw a line through points with an arrowhead at its end."""
    axes.plot([x for x, _ in points[:-1]], [y for _, y in points[:-1]], color=LINES, linewidth=1.6)
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={"arrowstyle": "-|>", "color": LINES, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0},
    )


def draw() -> Figure:
    """Return the picture: one row per command and arrows between stages, on a transparent background."""
    across, down = max(len(stages) for *_, stages in COMMANDS), len(COMMANDS)
    size = (across * (WIDTH + GAP) + 0.1, down * ROW - ROW + HEIGHT + 0.45)
    figure = Figure(figsize=size, facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.05 - GAP / 2, size[0] - 0.05 - GAP / 2), ylim=(0.05 - size[1], 0.05))
    axes.axis("off")
    for row, (commands, colour, stages) in enumerate(COMMANDS):
        y = -row * ROW - HEIGHT
        middle = y + HEIGHT / 2
        for column, (name, text) in enumerate(stages):
            x = column * (WIDTH + GAP)
            draw_box(axes, x, y, colour, name, text)
            if column + 1 < len(stages):
                draw_arrow(axes, [(x + WIDTH, middle), (x + WIDTH + GAP, middle)])
        axes.text(0, y - 0.2, commands, color=LINES, size=10, family="monospace", weight="bold", va="center")
        if row + 1 < down:
            last, first, below = (len(stages) - 1) * (WIDTH + GAP) + WIDTH / 2, WIDTH / 2, y - 0.47
            draw_arrow(axes, [(last, y), (last, below), (first, below), (first, y - ROW + HEIGHT)])
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    draw().savefig(PAGE, dpi=110, transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    main()
