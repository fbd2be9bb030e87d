"""nnssl_finetune: fine-tune pretrained weights on labelled cases and evaluate them, beside a start from scratch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import add_device_argument, choose_device, positive_int, run_command, say

NAME = "nnssl_finetune"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = make_parser().parse_args(argv)
    return run_command(NAME, run, args, args.verbose)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Fine-tune pretrained weights on a labelled data set with nnU-Net, predict the held-out labelled "
        "cases and report their Dice. A second call goes on where the first one stopped.",
    )
    parser.add_argument("-d", "--dataset", required=True, help="labelled data set: number or name, below nnUNet_raw")
    parser.add_argument(
        "-w",
        "--weights",
        default="latest",
        help="checkpoint_final.pth of nnssl_pretrain, or 'latest' for the newest one below nnUNet_results (default)",
    )
    parser.add_argument(
        "-c", "--configuration", help="configuration of the weights' plan (default: the pretrained one)"
    )
    parser.add_argument("--scratch", action="store_true", help="also train the same from random weights, to compare")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--labels", type=int, metavar="N", help="train on N cases, hold out the others (default: nnU-Net's fold 0)"
    )
    chosen.add_argument("--cases", type=Path, metavar="FILE", help="train on the cases in this file, one name per line")
    parser.add_argument("--test-cases", type=Path, metavar="FILE", help="hold out the cases in this file")
    parser.add_argument(
        "--seed", type=int, default=0, help="for the label subset, random weights, batches (default: 0)"
    )
    parser.add_argument("--epochs", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--iterations-per-epoch", type=int, default=250, help="(default: 250)")
    parser.add_argument("--warmup-epochs", type=int, help="of the epochs (default: one in twenty)")
    parser.add_argument(
        "--learning-rate", type=float, help="the highest one (default: 0.01 in each mode; 3e-4 with adamw)"
    )
    parser.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw"),
        help="(default: sgd, and adamw for Primus, as nnU-Net; adam, and no other, for --mode linear)",
    )
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="patches per step (default: the plan's)")
    parser.add_argument(
        "--mode",
        choices=("finetune", "linear", "mean_teacher"),
        default="finetune",
        help="train all weights, the last segmentation layer alone, or all with a consistency term on unlabelled cases "
        "(default: finetune)",
    )
    parser.add_argument(
        "--unlabelled",
        metavar="FILE|ID",
        help="images for --mode mean_teacher: a data set without labels, or a list of labelled cases whose labels are not "
        "used, one name per line (default: all labelled cases that are neither trained on nor held out)",
    )
    parser.add_argument("--plans-name", help="name for the plan in the data set's folder (default: the plan's own)")
    add_device_argument(parser)
    parser.add_argument(
        "--processes", type=positive_int, help="for preprocessing and evaluation (default: cores, 8 at most)"
    )
    parser.add_argument("--restart", action="store_true", help="delete these runs and do them again")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for."""
    from trainers.finetune_run import finetune

    finetune(
        args.dataset,
        args.weights,
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
        device=choose_device(args.device, say),
        processes=args.processes,
        plans_name=args.plans_name,
        mode=args.mode,
        unlabelled=args.unlabelled,
        restart=args.restart,
        say=say,
    )
