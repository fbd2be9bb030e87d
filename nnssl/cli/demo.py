"""``nnssl_demo``: the whole workflow on generated phantoms, from images to the Dice with and without pretraining."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
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
        description="Generate phantoms, plan, preprocess, pretrain, fine-tune for a short time on a few labelled phantoms with "
        "and without the pretrained weights, and write a report with the segmentations of both side by side. The demo takes "
        "minutes on two CPU cores. Its images are generated; it says nothing about the gain on other images.",
    )
    parser.add_argument(
        "-m",
        "--method",
        default="pix2rep_v2",
        metavar="METHOD",
        help="Pretext method, see nnssl_info (default: pix2rep_v2). Methods for volumes or with two stages take longer.",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("nnssl_demo"),
        metavar="FOLDER",
        help="Folder for all output (default: ./nnssl_demo).",
    )
    _add_sizes(parser)
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="Learning rate of pretrained weights in fine-tuning; see nnssl_finetune --help (default: that of the network).",
    )
    add_seed_argument(parser, "Random seed for phantoms and pretraining")
    add_device_argument(parser)
    add_verbose_argument(parser)
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    for flag, what, default in (
        ("--unlabelled", "Number of phantoms without labels", 24),
        ("--labels", "Number of labelled phantoms to train on", 6),
        ("--draws", "Number of draws of labelled phantoms; both arms are trained on each", 5),
        ("--held-out", "Number of labelled phantoms to test on", 10),
        ("--pretrain-epochs", "Epochs of every stage of pretraining", 10),
        ("--pretrain-iterations", "Optimizer steps per epoch of pretraining", 150),
        ("--iterations-per-epoch", "Optimizer steps per epoch of fine-tuning", 30),
    ):
        parser.add_argument(flag, type=positive_int, default=default, metavar="N", help=f"{what} (default: {default}).")
    parser.add_argument(
        "--epochs",
        type=positive_int,
        nargs="+",
        default=(3,),
        metavar="N",
        help="Lengths of fine-tuning in epochs (default: 3).",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command(make_parser(), partial(_run, shlex.join([NAME, *arguments])), arguments)


def _run(command: str, args: argparse.Namespace) -> None:
    from nnssl.devices import find_device
    from trainers.demo import DemoSettings, run_demo

    given = {field.name: getattr(args, field.name) for field in fields(DemoSettings)}
    settings = DemoSettings(**{**given, "epochs": tuple(args.epochs)})
    weights = run_demo(args.folder, settings, find_device(args.device), command)
    print_next(
        f"nnssl_info {weights}",
        "nnssl_plan_and_preprocess -d ID (for your own images; register them with nnssl_import first)",
    )


if __name__ == "__main__":
    sys.exit(main())
