"""``nnssl_plan_and_preprocess``: fingerprint a data set, plan its pretraining with reasons, and preprocess it."""

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
    number,
    positive_int,
    print_next,
    run_command,
)

NAME = "nnssl_plan_and_preprocess"
LENGTH_NAMES = ("short", "medium", "full")
PRESET_NAMES = ("cpu", "8gb", "24gb", "40gb", "80gb")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Inspect unlabelled images, plan a pretraining on them, and preprocess them. Finished work is skipped.",
    )
    add_dataset_argument(parser, "Data set below nnUNet_raw, number or name.", required=True)
    parser.add_argument(
        "-c",
        "--configurations",
        nargs="+",
        metavar="CONFIG",
        help="Configurations to preprocess (default: all).",
    )
    parser.add_argument(
        "-m", "--methods", nargs="+", metavar="METHOD", help="Methods whose stages to print (default: all)."
    )
    add_plans_argument(parser)
    _add_planning_arguments(parser)
    _add_data_arguments(parser)
    add_restart_argument(parser, "Repeat preprocessing that is already complete.")
    add_verbose_argument(parser, "Print every decision with its reason, and the traceback of errors.")
    return parser


def _add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that change the plan."""
    parser.add_argument(
        "--length",
        choices=LENGTH_NAMES,
        help="Length of pretraining relative to the papers': a tenth, a third or all (default: short for cpu, else full).",
    )
    parser.add_argument(
        "--preset", choices=PRESET_NAMES, help="Memory target (default: that of the detected GPU, else 8gb)."
    )
    parser.add_argument(
        "--like", metavar="ID", help="Data set with an nnU-Net plan to plan around, so that the weights fit that plan."
    )
    parser.add_argument(
        "--like-plans", default="nnUNetPlans", metavar="PLANS", help="Name of that nnU-Net plan (default: nnUNetPlans)."
    )
    parser.add_argument(
        "--spacing",
        nargs=3,
        type=number,
        metavar="MM",
        help="Spacing to resample to in mm, z y x; 2d uses the last two (default: chosen from the data).",
    )
    parser.add_argument(
        "--dense-width",
        type=positive_int,
        metavar="N",
        help="Network channels at full resolution, whose features dense methods use (default: the preset's).",
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that determine what is read and how it is preprocessed."""
    parser.add_argument(
        "--channel-names",
        nargs="+",
        metavar="NAME",
        help="Names of the channels (CT, MRI, T1, ...), if no dataset.json names them.",
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="File that lists cases to leave out, one name per line, such as a test set.",
    )
    parser.add_argument(
        "--exclude-mask",
        type=Path,
        metavar="FOLDER",
        help="Folder of masks named <case> with the images' file ending; pretraining learns nothing from nonzero voxels.",
    )
    add_processes_argument(parser, "Worker processes for reading and preprocessing")
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="Scheduler address of a Dask cluster to read and preprocess cases on."
    )
    parser.add_argument("--no-preprocessing", action="store_true", help="Plan only; do not preprocess.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
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
            length=args.length,
            methods=args.methods,
            verbose=args.verbose,
            channel_names=args.channel_names,
            exclude=args.exclude,
            exclude_mask=args.exclude_mask,
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
