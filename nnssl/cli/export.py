"""``nnssl_export``: pretrained weights for other plans, other channels, a model hub, or as a bare encoder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_configuration_argument,
    add_seed_argument,
    add_verbose_argument,
    print_next,
    run_command,
)
from nnssl.errors import UserError

NAME = "nnssl_export"
FORMATS = ("nnunet", "hub", "encoder")
POLICIES = ("mean", "repeat", "named")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Make pretrained weights fit a network and write them for nnU-Net, for a model hub or as a bare encoder. "
        "What nnU-Net is to load is tried with its own loader first.",
    )
    parser.add_argument("checkpoint", type=Path, help="of nnssl, or with an adaptation plan, from elsewhere")
    parser.add_argument(
        "--for-plans",
        metavar="PLANS",
        help="whose network: a plans file (.json), or a planned data set, number or name (default: the weights' own plan)",
    )
    parser.add_argument("-p", "--plans", metavar="PLANS", help="plans of that data set (default: nnUNetPlans)")
    add_configuration_argument(parser, "of the plans (default: the one that was pretrained)")
    parser.add_argument(
        "--trainer", help="nnU-Net trainer that builds a network of its own, e.g. nnUNet_Primus_S_Trainer"
    )
    parser.add_argument(
        "--channels", nargs="+", metavar="NAME", help="of the target, or their number (default: its dataset.json's)"
    )
    parser.add_argument(
        "--input-policy",
        choices=POLICIES,
        help="what a changed input layer is made from: the mean of all channels, each in turn, or those of the same name "
        "(default: named where both sides have names in common, else mean)",
    )
    parser.add_argument("--format", dest="form", choices=FORMATS, default="nnunet", help="(default: nnunet)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="file or folder (default: in the working folder)"
    )
    parser.add_argument(
        "--least-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the target's encoder that must come from the checkpoint (default: 0.5)",
    )
    parser.add_argument("--license", default="unknown", metavar="SPDX", help="of the weights, for hub and encoder")
    parser.add_argument(
        "--results", nargs="+", type=Path, default=[], metavar="FILE", help="finetune.json of arms, for the hub's card"
    )
    add_seed_argument(parser, "what stays random")
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from nnssl.weights.export import export
    from nnssl.weights.export_settings import ExportSettings

    if args.results and args.form != "hub":
        raise UserError(f"--results: are for the card of --format hub, not for {args.form}")
    exported = export(
        args.checkpoint.expanduser(),
        ExportSettings(
            for_plans=args.for_plans,
            plans_name=args.plans,
            configuration=args.configuration,
            channels=args.channels,
            policy=args.input_policy,
            trainer=args.trainer,
            form=args.form,
            out=args.output,
            least_share=args.least_share,
            licence=args.license,
            results=[_result(path) for path in args.results],
            seed=args.seed,
        ),
    )
    if args.form == "nnunet":
        target = exported.target
        trainer = f" -tr {target.trainer}" if target.trainer else ""
        data = target.plans["dataset_name"].removeprefix("Dataset").split("_")[0]
        print_next(
            f"nnUNetv2_train {data} {target.configuration} 0 -p {target.plans['plans_name']}{trainer} "
            f"-pretrained_weights {exported.path}"
        )
    else:
        print_next(f"nnssl_info {exported.path}")


def _result(path: Path) -> dict[str, object]:
    """Return the row of a card that tells of one arm of a fine-tuning."""
    from trainers.finetuning.result import read_result

    arm = read_result(path)
    steps = arm.schedule.epochs * arm.schedule.iterations_per_epoch
    return {
        "dataset": arm.dataset_name,
        "arm": arm.arm,
        "labels": len(arm.train_cases),
        "steps": steps,
        "dice": arm.mean_dice,
    }


if __name__ == "__main__":
    sys.exit(main())
