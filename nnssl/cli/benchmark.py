"""``nnssl_benchmark``: does pretraining help on these data? A label-efficiency study that ends in a report."""

import argparse
import shlex
import sys
from pathlib import Path

from nnssl.cli.command import add_device_argument, choose_device, natural_int, positive_int, run_command, say

NAME = "nnssl_benchmark"
MODES = ("finetune", "linear", "mean_teacher")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        NAME,
        description="Fine-tune pretrained weights and random ones on the same few labels, evaluate them on cases that no "
        "stage has seen, and write a report. Pretrains what is not there yet. Run it again to go on where it stopped.",
    )
    parser.add_argument(
        "-d", dest="dataset", required=True, metavar="ID", help="labelled data set, number or name, below nnUNet_raw"
    )
    parser.add_argument(
        "--from", dest="source", metavar="ID", help="data set to pretrain on (default: the one planned last)"
    )
    parser.add_argument(
        "-p", dest="plans", default="nnsslPlans", metavar="PLANS", help="its plans identifier (default: nnsslPlans)"
    )
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
    parser.add_argument("--iterations-per-epoch", type=positive_int, default=250, metavar="N", help="(default: 250)")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="of fine-tuning (default: the plan's)")
    parser.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw"),
        help="of fine-tuning (default: sgd, and adamw for Primus, as nnU-Net; a linear probe has adam)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="of fine-tuning (default: 0.01, 3e-4 with adamw; a linear probe keeps its own)",
    )
    parser.add_argument(
        "-c", dest="configuration", metavar="CONFIG", help="to fine-tune (default: one that fits all arms)"
    )
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
    parser.add_argument(
        "--pretrain-epochs", type=positive_int, metavar="N", help="of every stage (default: the plan's)"
    )
    parser.add_argument("--pretrain-iterations", type=positive_int, metavar="N", help="per epoch (default: the plan's)")
    parser.add_argument("--tolerance-mm", type=float, default=2.0, help="of the surface distance (default: 2)")
    parser.add_argument("--name", default="study", help="of the study's folder (default: study)")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="do the I-th of N shares, on a cluster (default: all)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the matrix, what there is and how long the rest takes"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--processes",
        type=natural_int,
        metavar="N",
        help="for preprocessing and evaluation (default: cores, 8 at most)",
    )
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(arguments)
    args.command = shlex.join([NAME, *arguments])
    return run_command(NAME, _run, args, args.verbose)


def _run(args: argparse.Namespace) -> None:
    from nnssl.data.jobs import default_processes
    from nnssl.paths import resolve_folders
    from trainers.benchmark.cells import StudyCells
    from trainers.benchmark.estimate import describe_estimate
    from trainers.benchmark.run import describe_matrix, parse_part, run_study, study_folder
    from trainers.benchmark.settings import StudySettings
    from trainers.benchmark.study import prepare_study

    part = parse_part(args.part)
    folders = resolve_folders(say)
    device = choose_device(args.device, say)
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
    study = prepare_study(settings, folders, device, args.processes or default_processes(), say)
    if args.dry_run:
        cells = StudyCells(study, say)
        for line in [*describe_matrix(cells), *describe_estimate(cells)]:
            say(line)
        return
    run_study(study, study_folder(study, args.name), part, args.command, say)


if __name__ == "__main__":
    sys.exit(main())
