"""``nnssl_plan_and_preprocess``: fingerprint, plan with reasons, preprocessed cases."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    PLANS_NAME,
    CommandParser,
    add_dataset_argument,
    add_plans_argument,
    add_processes_argument,
    add_restart_argument,
    add_verbose_argument,
    positive_int,
    print_next,
    run_command,
)

NAME = "nnssl_plan_and_preprocess"
PRESET_NAMES = ("cpu", "8gb", "24gb", "40gb", "80gb")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Look at unlabelled images, plan their pretraining, and preprocess them. Finished work is skipped.",
    )
    add_dataset_argument(parser, "data set, number or name, below nnUNet_raw", required=True)
    parser.add_argument(
        "-c",
        "--configurations",
        nargs="+",
        metavar="CONFIG",
        help="configurations to preprocess (default: all)",
    )
    add_plans_argument(parser)
    parser.add_argument("--preset", choices=PRESET_NAMES, help="memory target (default: the GPU found, else 8gb)")
    parser.add_argument(
        "--like", metavar="ID", help="plan around this data set's existing nnU-Net plan, so that weights drop into it"
    )
    parser.add_argument(
        "--like-plans", default="nnUNetPlans", metavar="PLANS", help="which plan of --like (default: nnUNetPlans)"
    )
    parser.add_argument(
        "--spacing",
        nargs=3,
        type=float,
        metavar="MM",
        help="resample to this spacing, z y x (default: from the data); 2d takes the last two",
    )
    parser.add_argument(
        "--dense-width",
        type=positive_int,
        metavar="N",
        help="channels of the network at full resolution, which dense methods read (default: by --preset)",
    )
    parser.add_argument(
        "--channel-names",
        nargs="+",
        metavar="NAME",
        help="what the channels are (CT, MRI, T1, ...), where no dataset.json says so",
    )
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="leave out the cases in this file, one name per line: a test set"
    )
    add_processes_argument(parser, "reading and preprocessing")
    parser.add_argument("--dask", metavar="ADDRESS", help="preprocess on the Dask cluster with this scheduler address")
    parser.add_argument("--no-preprocessing", action="store_true", help="plan only")
    add_restart_argument(parser, "preprocess again what is there already")
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from planners.plan_and_preprocess import plan_and_preprocess
    from planners.settings import PlanSettings

    prepared = plan_and_preprocess(
        args.dataset,
        PlanSettings(
            configurations=args.configurations,
            plans_name=args.plans,
            preset=args.preset,
            like=args.like,
            like_plans=args.like_plans,
            spacing_mm=args.spacing,
            dense_width=args.dense_width,
            channel_names=args.channel_names,
            exclude=args.exclude,
            processes=args.processes,
            dask_address=args.dask,
            preprocess=not args.no_preprocessing,
            restart=args.restart,
        ),
    )
    if prepared.report is None:
        print_next("the same command without --no-preprocessing")
        return
    method, configuration = prepared.first_pretraining()
    plans = "" if args.plans == PLANS_NAME else f" -p {args.plans}"
    chosen = "" if configuration is None else f" -c {configuration}"
    print_next(
        f"nnssl_pretrain -m {method} -d {prepared.plan.dataset_name}{plans}{chosen} (or another method: nnssl_info)"
    )


if __name__ == "__main__":
    sys.exit(main())
