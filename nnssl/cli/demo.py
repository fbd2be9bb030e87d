"""``nnssl_demo``: the whole pipeline on generated phantoms, from images to the Dice with and without pretraining."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    RECIPES,
    CommandParser,
    add_device_argument,
    add_seed_argument,
    add_verbose_argument,
    positive_int,
    print_next,
    run_command,
)

NAME = "nnssl_demo"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Generate phantoms, plan, preprocess, pretrain with RepRec, fine-tune with and without the pretrained "
        "weights, and write a report. The demo takes minutes on two CPU cores. It shows that the installation works; "
        "it is too short to show a gain.",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("nnssl_demo"),
        metavar="FOLDER",
        help="Folder for all output (default: ./nnssl_demo).",
    )
    parser.add_argument(
        "--unlabelled",
        type=positive_int,
        default=16,
        metavar="N",
        help="Number of phantoms without labels (default: 16).",
    )
    parser.add_argument(
        "--labels",
        type=positive_int,
        default=3,
        metavar="N",
        help="Number of labelled phantoms to train on (default: 3).",
    )
    parser.add_argument(
        "--held-out",
        type=positive_int,
        default=6,
        metavar="N",
        help="Number of labelled phantoms to test on (default: 6).",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        nargs=3,
        default=(4, 8, 5),
        metavar="N",
        help="Epochs of the contrastive stage, the generative stage and fine-tuning (default: 4 8 5).",
    )
    parser.add_argument(
        "--iterations-per-epoch",
        type=positive_int,
        default=15,
        metavar="N",
        help="Optimizer steps per epoch (default: 15).",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="Learning rate of pretrained weights in fine-tuning; see nnssl_finetune --help (default: that of the network).",
    )
    add_seed_argument(parser, "Random seed for phantoms, weights and views")
    add_device_argument(parser)
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from nnssl.devices import find_device
    from trainers.demo import DemoSize, run_demo

    size = DemoSize(args.unlabelled, args.labels, args.held_out, tuple(args.epochs), args.iterations_per_epoch)
    weights = run_demo(args.folder, size, args.seed, find_device(args.device), args.recipe)
    print_next(
        f"nnssl_info {weights}",
        "nnssl_plan_and_preprocess -d ID (for your own images; register them with nnssl_import first)",
    )


if __name__ == "__main__":
    sys.exit(main())
