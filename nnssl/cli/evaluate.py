"""``nnssl_evaluate``: Dice, surface distance, 95th percentile distance and volume of any two folders of segmentations."""

import argparse
import math
import sys
from pathlib import Path

from nnssl.cli.command import positive_int, run_command, say

NAME = "nnssl_evaluate"


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
    from nnssl.evaluation.labels import find_labels
    from nnssl.evaluation.metrics import evaluate_folders, write_metrics_csv
    from nnssl.evaluation.summary import format_summary, summarise
    from nnssl.files import write_json
    from nnssl.paths import make_writable

    if not 0 < args.tolerance_mm < math.inf:
        raise UserError(f"--tolerance-mm {args.tolerance_mm:g}: give a number of mm above 0")
    labels, ignore = find_labels(args.labels, args.predictions, args.references, say)
    output = make_writable(args.output or args.predictions)
    processes = args.processes or default_processes()
    metrics = evaluate_folders(args.predictions, args.references, labels, args.tolerance_mm, ignore, processes, say=say)
    summary = summarise(metrics, list(labels), args.tolerance_mm)
    write_metrics_csv(output / "metrics.csv", metrics)
    write_json(output / "summary_nnssl.json", summary)
    for line in format_summary(summary):
        say(line)
    say(f"per case and class: {output / 'metrics.csv'}; means: {output / 'summary_nnssl.json'}")


if __name__ == "__main__":
    sys.exit(main())
