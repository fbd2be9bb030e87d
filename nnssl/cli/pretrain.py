"""``nnssl_pretrain``: pretrain on a planned data set with a pretext method."""

import argparse
import sys
from collections.abc import Sequence

from nnssl.cli.command import (
    CommandParser,
    add_configuration_argument,
    add_dataset_argument,
    add_device_argument,
    add_plans_argument,
    add_restart_argument,
    add_seed_argument,
    add_track_argument,
    add_verbose_argument,
    natural_int,
    path_or_address,
    positive_int,
    positive_number,
    print_loading,
    print_next,
    run_command,
)
from nnssl.log import print_line
from nnssl.methods import METHODS

NAME = "nnssl_pretrain"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(NAME, description="Pretrain on a planned data set. Run the same command again to resume.")
    methods = "Pretext method. " + "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    chosen = "auto: choose the method by short runs of all methods that the plan allows"
    parser.add_argument("-m", "--method", required=True, metavar="METHOD", help=f"{methods}; {chosen}.")
    add_dataset_argument(parser, "Data set, number or name (default: the one planned last).")
    add_configuration_argument(parser, "Configuration of the plan (default: the first one that the method can use).")
    add_plans_argument(parser)
    _add_run_arguments(parser)
    _add_probe_arguments(parser)
    _add_auto_arguments(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--num-gpus",
        type=positive_int,
        default=1,
        metavar="N",
        help="Number of training processes, one per GPU (default: 1).",
    )
    parser.add_argument(
        "--workers", type=natural_int, metavar="N", help="Processes that read patches (default: chosen automatically)."
    )
    add_restart_argument(
        parser, "Delete earlier results of this method first; with -m auto, also the short runs and the choice."
    )
    add_track_argument(parser)
    add_verbose_argument(parser)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="Epochs of every stage, or one number per stage (default: the plan's).",
    )
    parser.add_argument(
        "--iterations-per-epoch",
        type=positive_int,
        metavar="N",
        help="Optimizer steps per epoch (default: the plan's).",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="Change settings of the method, e.g. temperature=0.2, or of one stage, e.g. generative.mask_ratio=0.6.",
    )
    parser.add_argument(
        "--init",
        type=path_or_address,
        metavar="FILE",
        help="Checkpoint whose weights the first stage starts from: a path, https://... or hf://OWNER/REPO/FILE (default: random "
        "weights).",
    )
    add_seed_argument(parser, "Random seed for weights and views")


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe",
        metavar="ID",
        help="Labelled data set on which a linear probe is scored during pretraining; with -m auto, its Dice chooses the method "
        "(default: no probe).",
    )
    parser.add_argument(
        "--probe-cases",
        type=positive_int,
        default=4,
        metavar="N",
        help="Number of labelled cases that the probe learns from; it is scored on as many others (default: 4).",
    )
    parser.add_argument(
        "--probe-every",
        type=positive_int,
        metavar="N",
        help="Epochs between two probes (default: about 20 probes per stage).",
    )
    parser.add_argument(
        "--retrieval-every",
        type=natural_int,
        metavar="N",
        help="Epochs between two measurements of how well the exported network finds the other view of a patch (default: about "
        "10 measurements per stage; 0: none).",
    )


def _add_auto_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=positive_number,
        default=30.0,
        metavar="MINUTES",
        help="For -m auto: wall time in minutes of all short runs together (default: 30).",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="For -m auto: methods to choose among (default: all that the plan allows).",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    print_loading()
    from trainers.pretraining.pretrain import pretrain
    from trainers.pretraining.settings import PretrainSettings

    final = pretrain(
        args.method,
        args.dataset,
        PretrainSettings(
            configuration=args.configuration,
            plans_name=args.plans,
            epochs=args.epochs,
            iterations_per_epoch=args.iterations_per_epoch,
            overrides=args.overrides,
            init=args.init,
            seed=args.seed,
            workers=args.workers,
            device=args.device,
            num_gpus=args.num_gpus,
            restart=args.restart,
            probe=args.probe,
            probe_cases=args.probe_cases,
            probe_every=args.probe_every,
            retrieval_every=args.retrieval_every,
            budget_minutes=args.budget,
            candidates=args.candidates,
            track=args.track,
        ),
    )
    print_line(f"weights: {final}")
    print_next(f"nnssl_finetune -d LABELLED_ID -w {final}")


if __name__ == "__main__":
    sys.exit(main())
