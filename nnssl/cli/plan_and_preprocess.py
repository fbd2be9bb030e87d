"""``nnssl_plan_and_preprocess``: fingerprint, plan with reasons, preprocessed cases."""

import argparse
import sys
from pathlib import Path

from nnssl.cli.command import positive_int, run_command, say

NAME = "nnssl_plan_and_preprocess"
PRESET_NAMES = ("cpu", "8gb", "24gb", "40gb", "80gb")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        NAME,
        description="Look at unlabelled images, plan their pretraining, and preprocess them. Finished work is skipped.",
    )
    parser.add_argument(
        "-d", dest="dataset", required=True, metavar="ID", help="data set, number or name, below nnUNet_raw"
    )
    parser.add_argument(
        "-c", dest="configurations", nargs="+", metavar="CONFIG", help="configurations to preprocess (default: all)"
    )
    parser.add_argument(
        "-p", dest="plans", default="nnsslPlans", metavar="PLANS", help="plans identifier (default: nnsslPlans)"
    )
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
    parser.add_argument(
        "--processes", type=positive_int, metavar="N", help="processes (default: one for each core, at most 8)"
    )
    parser.add_argument("--dask", metavar="ADDRESS", help="preprocess on the Dask cluster with this scheduler address")
    parser.add_argument("--no-preprocessing", action="store_true", help="plan only")
    parser.add_argument("--restart", action="store_true", help="preprocess again what is there already")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_command(NAME, _run, args, args.verbose)


def _run(args: argparse.Namespace) -> None:
    from nnssl.data.jobs import default_processes
    from nnssl.data.raw import find_dataset, leave_out, read_dataset
    from nnssl.errors import UserError
    from nnssl.paths import resolve_folders
    from planners.fingerprint import read_or_extract
    from planners.presets import preset_for_gpu
    from planners.pretrain_planner import plan_pretraining
    from planners.reasons import format_decisions, format_set_aside

    folders = resolve_folders(say)
    processes = args.processes or default_processes()
    names = tuple(args.channel_names) if args.channel_names else None
    dataset = read_dataset(args.dataset, folders, say, names)
    if args.exclude is not None:
        dataset = leave_out(dataset, args.exclude, say)
    preset = args.preset
    if preset is None:
        preset, sentence = preset_for_gpu(_gpu_memory_gb())
        say(sentence)
    like = None
    if args.like:
        like = folders.preprocessed / find_dataset(args.like, folders) / f"{args.like_plans}.json"
        if not like.exists():
            raise UserError(
                f"--like {args.like}: {like} is missing; run nnUNetv2_plan_and_preprocess -d {args.like} first"
            )
    fingerprint = read_or_extract(dataset, folders, processes, say)
    plan = plan_pretraining(
        dataset, fingerprint, folders, preset, args.plans, like, say, args.spacing, args.dense_width
    )
    for line in format_decisions(plan):
        say(line)
    report = None
    if not args.no_preprocessing:
        from nnssl.data.preprocess import preprocess_dataset

        report = preprocess_dataset(
            dataset, plan, fingerprint.usable, folders, args.configurations, processes, args.dask, say, args.restart
        )
    for line in format_set_aside(fingerprint, report):
        say(line)
    say(f"next: nnssl_pretrain -m reprec -d {dataset.name} (or another method: nnssl_info)")


def _gpu_memory_gb() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 1024**3


if __name__ == "__main__":
    sys.exit(main())
