"""``nnssl_propagate``: the labels of a few annotated cases carried to all others."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_dataset_argument,
    add_device_argument,
    add_restart_argument,
    add_seed_argument,
    add_verbose_argument,
    add_weights_argument,
    natural_number,
    positive_int,
    print_loading,
    print_next,
    run_command,
)

NAME = "nnssl_propagate"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Carry the labels of a few annotated cases to all others by the features of pretrained weights, without "
        "training. Writes drafts in nnU-Net's label format, with a confidence for each case. Run the same command again to "
        "resume.",
    )
    add_dataset_argument(
        parser, "Preprocessed data set, number or name (default: the one that the weights were pretrained on)."
    )
    parser.add_argument(
        "--from", dest="cases_from", nargs="+", required=True, metavar="CASE", help="Names of the annotated cases."
    )
    add_weights_argument(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="Folder for the drafts.")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FOLDER",
        help="Folder with the label maps of the annotated cases (default: labelsTr of the data set).",
    )
    parser.add_argument(
        "--cases",
        type=Path,
        metavar="FILE",
        help="Label only the cases listed in this file, one name per line (default: all that are not annotated).",
    )
    parser.add_argument(
        "--features",
        choices=("single", "pyramid"),
        help="Maps of the decoder whose features are compared: the last one (single) or all (pyramid) (default: those that were "
        "pretrained).",
    )
    parser.add_argument(
        "--prototypes",
        type=positive_int,
        default=16,
        metavar="N",
        help="Number of prototypes of each label; the background has four times as many (default: 16).",
    )
    parser.add_argument(
        "--position-weight",
        type=natural_number,
        default=0.1,
        metavar="WEIGHT",
        help="Weight of the relative position in the body's box; 0 compares features alone (default: 0.1).",
    )
    parser.add_argument(
        "--smoothing-mm",
        type=natural_number,
        metavar="MM",
        help="Standard deviation of the Gaussian that smooths the probabilities; 0 for none (default: the finest spacing of the "
        "plan).",
    )
    add_seed_argument(parser, "Random seed for the drawn voxels and the prototypes")
    add_device_argument(parser)
    add_restart_argument(parser, "Delete earlier drafts in the folder first.")
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    print_loading()
    from nnssl.paths import resolve_folders
    from nnssl.propagation.propagate import PropagateSettings, propagate
    from trainers.finetuning.pretrained_weights import find_weights

    folders = resolve_folders()
    weights = find_weights(args.weights, folders)
    settings = PropagateSettings(
        labels=args.labels,
        cases=args.cases,
        features=args.features,
        prototypes=args.prototypes,
        position_weight=args.position_weight,
        smoothing_mm=args.smoothing_mm,
        seed=args.seed,
        device=args.device,
        restart=args.restart,
    )
    propagate(args.dataset, args.cases_from, weights, args.output, settings, folders)
    print_next(
        f"nnssl_finetune -d LABELLED_ID -w {weights} (once the drafts in {args.output} are corrected, the least certain "
        "first, and are its labelsTr)"
    )


if __name__ == "__main__":
    sys.exit(main())
