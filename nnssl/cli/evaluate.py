"""``nnssl_evaluate``: Dice, surface distances and volumes of a folder of segmentations, compared with references."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_processes_argument,
    add_verbose_argument,
    number,
    print_next,
    run_command,
)

NAME = "nnssl_evaluate"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Compare the segmentations in a folder with reference segmentations, case by case, and write Dice, surface "
        "distances and volumes.",
    )
    parser.add_argument("predictions", type=Path, help="Folder with the segmentations to evaluate.")
    parser.add_argument(
        "references", type=Path, help="Folder with the reference segmentations, under the same file names."
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="dataset.json that names the classes (default: the one beside the predictions or the references; without one, "
        "classes are numbered).",
    )
    parser.add_argument(
        "--tolerance-mm",
        type=number,
        default=2.0,
        metavar="MM",
        help="Tolerance of the normalised surface distance in mm (default: 2).",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="Folder for metrics.csv and summary_nnssl.json (default: the folder of the predictions).",
    )
    add_processes_argument(parser, "Worker processes that read and compare")
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from nnssl.evaluation.evaluate import evaluate

    evaluate(args.predictions, args.references, args.labels, args.tolerance_mm, args.output, args.processes)
    print_next("nnssl_benchmark -d LABELLED_ID -m METHOD (to measure how much pretraining helps with few labels)")


if __name__ == "__main__":
    sys.exit(main())
