"""What a pretraining run leaves for its user to look at: a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from nnssl.files import write_atomically, write_csv


def write_metrics(path: Path, metrics: Mapping[str, Sequence[float]]) -> None:
    """Write one line per epoch to a CSV file that a spreadsheet opens."""
    rows = list(zip(*metrics.values(), strict=True))
    write_csv(path, ["epoch", *metrics], [[epoch, *row] for epoch, row in enumerate(rows)])


def plot_progress(
    path: Path, title: str, metrics: Mapping[str, Sequence[float]], panels: Mapping[str, Sequence[str]]
) -> None:
    """Draw the metrics over the epochs, one panel for each group.

    Args:
        path: of the PNG.
        title: of the figure.
        metrics: one value per epoch for each name.
        panels: names of metrics by title of their panel; names without values are left out.
    """
    from matplotlib.figure import Figure

    shown = {name: [key for key in keys if key in metrics] for name, keys in panels.items()}
    shown = {name: keys for name, keys in shown.items() if keys}
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(9, 2.6 * len(shown) + 0.6), layout="constrained")
        figure.suptitle(title)
        for axes, (name, keys) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True):
            for key, style in zip(keys, ("-", "--", ":", "-."), strict=False):
                axes.plot(
                    range(len(metrics[key])), metrics[key], style, label=key.replace("_", " "), marker=".", markersize=3
                )
            axes.set_title(name, loc="left", fontsize=11)
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=9, frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
