"""``nnssl_benchmark``: does pretraining help on these data? A label-efficiency study that ends in a report."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nnssl.cli.command import (
    MODES,
    CommandParser,
    add_configuration_argument,
    add_dataset_argument,
    add_device_argument,
    add_finetuning_arguments,
    add_plans_argument,
    add_processes_argument,
    add_verbose_argument,
    positive_int,
    positive_number,
    print_next,
    run_command,
)

NAME = "nnssl_benchmark"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Fine-tune pretrained weights and random ones on the same few labels, evaluate them on cases that no "
        "stage has seen, and write a report. Pretrains what is not there yet. Run it again to go on where it stopped.",
    )
    add_dataset_argument(parser, "labelled data set, number or name, below nnUNet_raw", required=True)
    parser.add_argument(
        "--from", dest="source", metavar="ID", help="data set to pretrain on (default: the one planned last)"
    )
    add_plans_argument(parser, of="its ")
    _add_matrix_arguments(parser)
    add_finetuning_arguments(parser)
    add_configuration_argument(parser, "to fine-tune (default: one that fits all arms)")
    _add_case_arguments(parser)
    _add_pretraining_arguments(parser)
    _add_study_arguments(parser)
    add_device_argument(parser)
    add_processes_argument(parser, "preprocessing and evaluation")
    add_verbose_argument(parser)
    return parser


def _add_matrix_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        dest="arms",
        nargs="+",
        required=True,
        metavar="ARM",
        help="what to compare with scratch: a method, a method with values (pix2rep:temperature=0.2), a stage alone "
        "(reprec.generative), a checkpoint (FILE.pth or NAME=FILE.pth)",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        type=positive_int,
        default=[1, 5, 20],
        metavar="N",
        help="labelled patients (default: 1 5 20)",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="of subset and batches (default: 3)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["finetune"], help="(default: finetune)")
    parser.add_argument(
        "--epochs",
        nargs="+",
        type=positive_int,
        default=[50, 150],
        metavar="N",
        help="lengths of fine-tuning; a gain is claimed only where scratch no longer improves from the second longest to "
        "the longest (default: 50 150)",
    )


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--test-cases", type=Path, metavar="FILE", help="cases to hold out (default: drawn patients)")
    parser.add_argument("--test-patients", type=positive_int, metavar="N", help="patients to draw (default: a quarter)")
    parser.add_argument(
        "--patients", type=Path, metavar="FILE", help="CSV file with the columns case and patient (default: by names)"
    )
    parser.add_argument(
        "--subsets",
        type=Path,
        metavar="FOLDER",
        help="with seed0.txt, seed1.txt, ...: cases in the order in which labels are added (default: drawn)",
    )


def _add_pretraining_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrain-epochs", type=positive_int, metavar="N", help="of every stage (default: the plan's)"
    )
    parser.add_argument("--pretrain-iterations", type=positive_int, metavar="N", help="per epoch (default: the plan's)")


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance-mm", type=positive_number, default=2.0, metavar="MM", help="of the surface distance (default: 2)"
    )
    parser.add_argument("--name", default="study", help="of the study's folder (default: study)")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="do the I-th of N shares, on a cluster (default: all)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the matrix, what there is and how long the rest takes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(make_parser(), partial(_run, shlex.join([NAME, *arguments])), arguments)


def _run(command: str, args: argparse.Namespace) -> None:
    from trainers.benchmark.benchmark import benchmark, preview
    from trainers.benchmark.settings import StudySettings

    common = {"epochs": args.pretrain_epochs, "iterations_per_epoch": args.pretrain_iterations}
    settings = StudySettings(
        dataset=args.dataset,
        source=args.source,
        plans_name=args.plans,
        arms=tuple(args.arms),
        labels=tuple(args.labels),
        seeds=args.seeds,
        modes=tuple(args.mode),
        epochs=tuple(args.epochs),
        iterations_per_epoch=args.iterations_per_epoch,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        configuration=args.configuration,
        test_cases=args.test_cases,
        test_patients=args.test_patients,
        patients=args.patients,
        subsets=args.subsets,
        pretrain_overrides=tuple(f"{key}={value}" for key, value in common.items() if value is not None),
        tolerance_mm=args.tolerance_mm,
    )
    if args.dry_run:
        preview(settings, device=args.device, processes=args.processes)
        print_next("the same command without --dry-run")
        return
    table = benchmark(
        settings, name=args.name, part=args.part, device=args.device, processes=args.processes, command=command
    )
    if table is None:
        print_next(command)
    else:
        print_next(f"nnssl_finetune -d {args.dataset} -w CHECKPOINT (of the arm that the report recommends)")


if __name__ == "__main__":
    sys.exit(main())
