"""``nnssl_evaluate``: Dice, surface distance, 95th percentile distance and volume of any two folders of segmentations."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.cli.command import positive_int, run_command, say

if TYPE_CHECKING:
    from nnssl.evaluation.metrics import CaseMetrics

NAME = "nnssl_evaluate"
DATASET_JSON = "dataset.json"
MOST_CLASSES = 255
"""Where no file names the classes."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        NAME, description="Compare the segmentations of a folder with references of the same names, case by case."
    )
    parser.add_argument("predictions", type=Path, help="folder with segmentations")
    parser.add_argument("references", type=Path, help="folder with reference segmentations of the same names")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="dataset.json that names the classes (default: beside the predictions or the references, else numbers)",
    )
    parser.add_argument("--tolerance-mm", type=float, default=2.0, help="of the surface distance (default: 2)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for metrics.csv and summary.json (default: the predictions')",
    )
    parser.add_argument("--processes", type=positive_int, metavar="N", help="(default: cores, 8 at most)")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_command(NAME, _run, args, args.verbose)


def _run(args: argparse.Namespace) -> None:
    from nnssl.data.jobs import default_processes
    from nnssl.errors import UserError
    from nnssl.evaluation.metrics import evaluate_folders, write_metrics_csv
    from nnssl.files import write_json
    from nnssl.paths import make_writable

    if not 0 < args.tolerance_mm < math.inf:
        raise UserError(f"--tolerance-mm {args.tolerance_mm:g}: give a number of mm above 0")
    labels, ignore = find_labels(args.labels, args.predictions, args.references)
    output = make_writable(args.output or args.predictions)
    metrics = evaluate_folders(
        args.predictions, args.references, labels, args.tolerance_mm, ignore, args.processes or default_processes()
    )
    summary = summarise(metrics, list(labels), args.tolerance_mm)
    write_metrics_csv(output / "metrics.csv", metrics)
    write_json(output / "summary_nnssl.json", summary)
    for line in format_summary(summary):
        say(line)
    say(f"per case and class: {output / 'metrics.csv'}; means: {output / 'summary_nnssl.json'}")


def find_labels(file: Path | None, predictions: Path, references: Path) -> tuple[dict[str, Any], int | None]:
    """Return the classes to evaluate and the value to ignore: from a file, from one beside either folder, or as found.

    nnU-Net writes a ``dataset.json`` into the folder of its predictions.

    Raises:
        UserError: there is no such folder, a file cannot be read, or predictions and references have different labels.
    """
    from nnssl.errors import UserError
    from nnssl.evaluation.segmentation_files import find_segmentations
    from nnssl.files import read_json

    for folder in (predictions, references):
        find_segmentations(folder)  # a folder that is not there is no folder without a dataset.json
    beside = [predictions / DATASET_JSON, references / DATASET_JSON, references.absolute().parent / DATASET_JSON]
    paths = [file] if file is not None else [path for path in beside if path.exists()]
    if not paths:
        return _labels_as_found(predictions, references), None
    found = {path: _parse_labels(read_json(path, "dataset.json"), path) for path in paths}
    first = paths[0]
    for path in paths[1:]:
        if found[path] != found[first]:
            raise UserError(
                f"{first} and {path}: have different labels, {_describe(found[first])} and {_describe(found[path])}; "
                "--labels FILE says which are meant"
            )
    say(f"labels: {first}")
    return found[first]


def _parse_labels(content: Any, path: Path) -> tuple[dict[str, Any], int | None]:
    """Return the classes to evaluate and the value to ignore from the content of a ``dataset.json``.

    Raises:
        UserError: it has no labels, or not in the form of nnU-Net v2.
    """
    from nnssl.errors import UserError
    from nnssl.evaluation.metrics import foreground_labels, ignore_label

    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        raise UserError(f"{path}: has no 'labels', so the classes have no names; give another --labels FILE")
    try:
        labels, ignore = foreground_labels(content), ignore_label(content)
    except (TypeError, ValueError) as error:
        raise UserError(
            f'{path}: its labels are not in the form of nnU-Net v2, {{"background": 0, "liver": 1}}; '
            "write them so, or give another --labels FILE"
        ) from error
    if not labels:
        raise UserError(f"{path}: its 'labels' name no class but the background; give another --labels FILE")
    return labels, ignore


def _describe(labels: tuple[dict[str, Any], int | None]) -> str:
    classes, ignore = labels
    names = [f"{name} {value}" for name, value in classes.items()]
    return ", ".join(names if ignore is None else [*names, f"ignore {ignore}"])


def _labels_as_found(predictions: Path, references: Path) -> dict[str, int]:
    """Return every value of the segmentations but 0 as a class of that name."""
    import numpy as np

    from nnssl.errors import UserError
    from nnssl.evaluation.segmentation_files import find_segmentations, read_segmentation

    values: set[int] = set()
    for folder in (predictions, references):
        for path in find_segmentations(folder).values():
            values |= {int(value) for value in np.unique(read_segmentation(path).values)}
            if len(values) > MOST_CLASSES:
                raise UserError(
                    f"{path}: makes it more than {MOST_CLASSES} different values, so these seem to be images; "
                    "give segmentations, or --labels FILE"
                )
    labels = {str(value): value for value in sorted(values - {0})}
    if not labels:
        raise UserError(
            f"{predictions}, {references}: hold background only; --labels FILE says which classes there are"
        )
    say(f"no dataset.json found: the classes are the values {', '.join(labels)}; --labels FILE names them")
    return labels


def summarise(metrics: "list[CaseMetrics]", labels: list[str], tolerance_mm: float) -> dict[str, Any]:
    """Return means over the cases that count, by class, and over the classes."""
    names = ("dice", "nsd", "hd95_mm")
    classes = {}
    for label in labels:
        own = [entry for entry in metrics if entry.label == label]
        counted = [entry for entry in own if entry.dice is not None]
        classes[label] = {
            "cases": len(counted),
            **{name: _mean([getattr(entry, name) for entry in counted]) for name in names},
            "volume_ml": _mean([entry.volume_ml for entry in own]),
            "reference_volume_ml": _mean([entry.reference_volume_ml for entry in own]),
        }
    mean = {name: _mean([entry[name] for entry in classes.values()]) for name in names}
    return {"tolerance_mm": tolerance_mm, "cases": len({e.case for e in metrics}), "classes": classes, "mean": mean}


def format_summary(summary: dict[str, Any]) -> list[str]:
    """Return the lines of a table: one for each class, and the means."""
    head = ["class", "cases", "Dice", f"NSD at {summary['tolerance_mm']:g} mm", "HD95 mm", "volume ml", "reference ml"]
    columns = ("dice", "nsd", "hd95_mm", "volume_ml", "reference_volume_ml")
    digits = (4, 4, 2, 2, 2)
    rows = [head]
    for label, entry in summary["classes"].items():
        values = [_text(entry[name], digit) for name, digit in zip(columns, digits, strict=True)]
        rows.append([label, str(entry["cases"]), *values])
    means = [_text(summary["mean"][name], digit) for name, digit in zip(columns[:3], digits[:3], strict=True)]
    rows.append(["mean", str(summary["cases"]), *means, "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _mean(values: list[float | None]) -> float | None:
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
