"""``nnssl_select``: which cases to annotate first."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_dataset_argument,
    add_device_argument,
    add_seed_argument,
    add_verbose_argument,
    add_weights_argument,
    positive_int,
    print_loading,
    print_next,
    run_command,
)

NAME = "nnssl_select"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Choose the patients to annotate first: typical ones that differ from one another, by the features of "
        "pretrained weights. Writes the cases in the order of annotation, with reasons and pictures.",
    )
    add_dataset_argument(
        parser, "Preprocessed data set, number or name (default: the one that the weights were pretrained on)."
    )
    parser.add_argument(
        "-n", "--number", type=positive_int, required=True, metavar="N", help="Number of patients to choose."
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--patients",
        type=Path,
        metavar="FILE",
        help="CSV file with the columns 'case' and 'patient' (default: patients are taken from the case names).",
    )
    parser.add_argument(
        "--patches",
        type=positive_int,
        default=16,
        metavar="N",
        help="Number of patches inside the body over which the features of a case are averaged (default: 16).",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="Folder for selection.txt, selection.csv and selection.png (default: the current folder).",
    )
    add_seed_argument(parser, "Random seed for patches and groups")
    add_device_argument(parser)
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    print_loading()
    from nnssl.paths import resolve_folders
    from nnssl.study.select import LIST, SelectSettings, select
    from trainers.finetuning.pretrained_weights import find_weights

    folders = resolve_folders()
    weights = find_weights(args.weights, folders)
    settings = SelectSettings(args.patches, args.patients, args.seed, args.device, args.output)
    select(args.dataset, args.number, weights, settings, folders)
    folder = args.output or Path()
    print_next(f"nnssl_finetune -d LABELLED_ID -w {weights} --cases {folder / LIST} (once these cases are annotated)")


if __name__ == "__main__":
    sys.exit(main())
