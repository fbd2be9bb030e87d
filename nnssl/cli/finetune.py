"""``nnssl_finetune``: fine-tune pretrained weights on labelled cases and evaluate them, beside a start from scratch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    MODES,
    CommandParser,
    add_configuration_argument,
    add_dataset_argument,
    add_device_argument,
    add_finetuning_arguments,
    add_processes_argument,
    add_restart_argument,
    add_seed_argument,
    add_verbose_argument,
    add_weights_argument,
    natural_int,
    positive_int,
    print_next,
    run_command,
)

NAME = "nnssl_finetune"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Fine-tune pretrained weights on a labelled data set with nnU-Net, predict the held-out labelled "
        "cases and report their Dice. A second call goes on where the first one stopped.",
    )
    add_dataset_argument(parser, "labelled data set: number or name, below nnUNet_raw", required=True)
    add_weights_argument(parser)
    add_configuration_argument(parser, "of the weights' plan (default: the pretrained one)")
    parser.add_argument("--scratch", action="store_true", help="also train the same from random weights, to compare")
    _add_case_arguments(parser)
    add_seed_argument(parser, "the label subset, random weights and batches")
    parser.add_argument("--epochs", type=positive_int, default=1000, metavar="N", help="(default: 1000)")
    add_finetuning_arguments(parser)
    parser.add_argument("--warmup-epochs", type=natural_int, metavar="N", help="of the epochs (default: one in twenty)")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="finetune",
        help="train all weights, the last segmentation layer alone, or all with a consistency term on unlabelled cases "
        "(default: finetune)",
    )
    parser.add_argument(
        "--plans-name", metavar="PLANS", help="name for the plan in the data set's folder (default: the plan's own)"
    )
    add_device_argument(parser)
    add_processes_argument(parser, "preprocessing and evaluation")
    add_restart_argument(parser, "delete these runs and do them again")
    add_verbose_argument(parser)
    return parser


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--labels",
        type=positive_int,
        metavar="N",
        help="train on N cases, hold out the others (default: nnU-Net's fold 0)",
    )
    chosen.add_argument("--cases", type=Path, metavar="FILE", help="train on the cases in this file, one name per line")
    parser.add_argument("--test-cases", type=Path, metavar="FILE", help="hold out the cases in this file")
    parser.add_argument(
        "--unlabelled",
        metavar="FILE|ID",
        help="images for --mode mean_teacher: a data set without labels, or a list of labelled cases whose labels are not "
        "used, one name per line (default: all labelled cases that are neither trained on nor held out)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from trainers.finetuning.finetune import finetune
    from trainers.finetuning.settings import FinetuneSettings

    results = finetune(
        args.dataset,
        args.weights,
        FinetuneSettings(
            configuration=args.configuration,
            scratch=args.scratch,
            labels=args.labels,
            cases=args.cases,
            test_cases=args.test_cases,
            seed=args.seed,
            epochs=args.epochs,
            iterations_per_epoch=args.iterations_per_epoch,
            warmup_epochs=args.warmup_epochs,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            device=args.device,
            processes=args.processes,
            plans_name=args.plans_name,
            mode=args.mode,
            unlabelled=args.unlabelled,
            restart=args.restart,
        ),
    )
    print_next(*(result.predict_command for result in results))


if __name__ == "__main__":
    sys.exit(main())
