"""The progress of a pretraining run, written as a table and a figure."""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnssl.errors import UserError
from nnssl.files import write_atomically, write_csv
from trainers.pretraining.retrieval_run import PREFIX

METRICS_CSV = "metrics.csv"


def write_metrics(path: Path, metrics: Mapping[str, Sequence[float]]) -> None:
    """Write a CSV file with one line per epoch; values that were not measured (NaN) are left empty."""
    rows = [["" if math.isnan(value) else value for value in row] for row in zip(*metrics.values(), strict=True)]
    write_csv(path, ["epoch", *metrics], [[epoch, *row] for epoch, row in enumerate(rows)])


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Read a file of ``write_metrics``: one value per epoch for every metric.

    Raises:
        UserError: If the file is not such a table.
    """
    try:
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        columns = dict(zip(header, zip(*rows, strict=True) if rows else [()] * len(header), strict=True))
        del columns["epoch"]
        return {name: [float(text) if text else math.nan for text in column] for name, column in columns.items()}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a table of pretraining metrics ({error}); delete it, and it will be written again"
        ) from error


_NNUNET_KEYS = frozenset(
    {
        "mean_fg_dice",
        "ema_fg_dice",
        "dice_per_class_or_region",
        "train_losses",
        "val_losses",
        "lrs",
        "epoch_start_timestamps",
        "epoch_end_timestamps",
    }
)


def _with_references(kind: str) -> tuple[str, ...]:
    return tuple(f"{PREFIX}{kind}{what}" for what in ("", "_random", "_chance"))


PANELS = {
    "loss": lambda name: name == "loss" or name.startswith(("loss_", "recovery")),
    "exported network: retrieval of patches": lambda name: name in _with_references("pooled"),
    "exported network: retrieval of points": lambda name: name in _with_references("points"),
    "probe: Dice of a linear layer on labelled tiles": lambda name: name == "probe_dice",
    "collapse: spread of the head's embeddings": lambda name: name == "head_std",
    "collapse: effective rank of the head's embeddings": lambda name: name == "head_rank",
    "learning rate": lambda name: name == "learning_rate",
    "share of time waiting for data": lambda name: name == "data_wait_share",
}


def log_epoch(logger: MetaLogger, epoch: int, values: Mapping[str, float], learning_rate: float) -> None:
    """Write the values of an epoch to nnU-Net's logger, after adding the names that it would reject as unknown.

    Args:
        logger: nnU-Net's logger.
        epoch: Number of the epoch, from 0.
        values: Values by name, among them ``loss``; a name that is missing in an epoch is NaN there.
        learning_rate: Learning rate of the last step.
    """
    logged = logger.local_logger.my_fantastic_logging
    logger.log("train_losses", values["loss"], epoch)
    logger.log("lrs", float(learning_rate), epoch)
    missing = {key: math.nan for key in logged if key not in _NNUNET_KEYS and key not in values}
    for key, value in {**values, **missing}.items():
        logged.setdefault(key, [math.nan] * epoch)
        logger.log(key, value, epoch)


def last_values(metrics: Mapping[str, Sequence[float]]) -> str:
    """Return the last epoch's values in one line, starting with the loss, without the retrieval, which has a line of its own."""
    last = {key: values[-1] for key, values in metrics.items() if not key.startswith(PREFIX)}
    shown = ", ".join(f"{key} {last[key]:.4g}" for key in last if key != "loss")
    return f"loss {last['loss']:.4f} ({shown})"


def collect_metrics(logged: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return one value per finished epoch for every metric in nnU-Net's log, except those that need labels."""
    own = {key: list(values) for key, values in logged.items() if key not in _NNUNET_KEYS and values}
    times = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=False)
    return {**own, "learning_rate": list(logged["lrs"]), "epoch_seconds": [end - start for start, end in times]}


def plot_progress(path: Path, title: str, metrics: Mapping[str, Sequence[float]]) -> None:
    """Draw the metrics over the epochs, with one panel for each group that has values.

    Args:
        path: Path of the PNG file.
        title: Title of the figure.
        metrics: One value per epoch for each name.
    """
    # Only the figure class is imported: it needs no window system and changes no global state.
    from matplotlib.figure import Figure

    measured = {
        key: [(epoch, value) for epoch, value in enumerate(values) if not math.isnan(value)]
        for key, values in metrics.items()
    }
    panels = {name: [key for key in metrics if measured[key] and belongs(key)] for name, belongs in PANELS.items()}
    shown = {name: keys for name, keys in panels.items() if keys}
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(9, 2.6 * len(shown) + 0.6), layout="constrained")
        figure.suptitle(title)
        for axes, (name, keys) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True):
            for key, style in zip(keys, itertools.cycle(("-", "--", ":", "-.")), strict=False):
                label = key.replace("_", " ")
                axes.plot(*zip(*measured[key], strict=True), style, label=label, marker=".", markersize=3)
            axes.set_title(name, loc="left", fontsize=11)
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=9, frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
