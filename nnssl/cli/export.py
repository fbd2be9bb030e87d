"""``nnssl_export``: pretrained weights for other plans, other channels or a model hub, or as an encoder alone."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_configuration_argument,
    add_seed_argument,
    add_verbose_argument,
    number,
    path_or_address,
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
        description="Fit pretrained weights to a network and write them for nnU-Net, for a model hub or as an encoder alone. "
        "Files for nnU-Net are tested with nnU-Net's own loader first.",
    )
    parser.add_argument(
        "checkpoint",
        type=path_or_address,
        help="Checkpoint of nnssl or nnUNetv2_train, or one from elsewhere with an adaptation plan: a path, https://... or "
        "hf://OWNER/REPO/FILE.",
    )
    _add_target_arguments(parser)
    parser.add_argument(
        "--format", dest="form", choices=FORMATS, default="nnunet", help="What to write (default: nnunet)."
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="File or folder to write (default: one in the working folder).",
    )
    parser.add_argument(
        "--least-share",
        type=number,
        default=0.5,
        metavar="SHARE",
        help="Share of the target encoder's parameters that must come from the checkpoint, 0 to 1 (default: 0.5).",
    )
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="SPDX",
        help="Licence of the weights, for --format hub and encoder (default: unknown).",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="finetune.json files whose results go into the model card of --format hub.",
    )
    add_seed_argument(parser, "Random seed for parameters that stay random")
    add_verbose_argument(parser)
    return parser


def _add_target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--for-plans",
        metavar="PLANS",
        help="Plans whose network the weights are fitted to: a plans file (.json), or the number or name of a planned data set "
        "(default: the plan that the weights were pretrained with).",
    )
    parser.add_argument("-p", "--plans", metavar="PLANS", help="Name of that data set's plans (default: nnUNetPlans).")
    add_configuration_argument(parser, "Configuration of the plans (default: the pretrained one).")
    parser.add_argument(
        "--trainer",
        metavar="NAME",
        help="Trainer of nnU-Net that builds its own network, such as nnUNet_Primus_S_Trainer.",
    )
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="Names of the target's input channels, or their number (default: those in its dataset.json).",
    )
    parser.add_argument(
        "--input-policy",
        choices=POLICIES,
        help="How to fit the input layer to other channels: the mean of all channels, each channel in turn, or the channels of "
        "the same name (default: named if both sides share names, else mean).",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from nnssl.weights.export import export
    from nnssl.weights.export_settings import ExportSettings

    if args.results and args.form != "hub":
        raise UserError(f"--results needs --format hub, which writes a model card, got --format {args.form}")
    exported = export(
        args.checkpoint,
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
            results=[result_row(path) for path in args.results],
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


def result_row(path: Path) -> dict[str, object]:
    """Return one row of the model card: the result of an arm of a fine-tuning."""
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
