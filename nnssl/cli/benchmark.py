"""``nnssl_benchmark``: a label-efficiency study that measures whether pretraining helps on a data set, with a report."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nnssl.cli.command import (
    LENGTHS,
    MODES,
    CommandParser,
    add_configuration_argument,
    add_dataset_argument,
    add_device_argument,
    add_finetuning_arguments,
    add_mirroring_argument,
    add_plans_argument,
    add_processes_argument,
    add_verbose_argument,
    positive_int,
    positive_number,
    print_loading,
    print_next,
    run_command,
)

NAME = "nnssl_benchmark"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Fine-tune pretrained and random weights on the same few labels, evaluate both on cases that no stage has "
        "seen, and write a report. Missing pretrainings are run first. Run the same command again to resume.",
    )
    add_dataset_argument(parser, "Labelled data set below nnUNet_raw, number or name.", required=True)
    parser.add_argument(
        "--from", dest="source", metavar="ID", help="Data set to pretrain on (default: the one planned last)."
    )
    add_plans_argument(parser, "Name of the plan to pretrain with")
    _add_matrix_arguments(parser)
    add_finetuning_arguments(parser)
    add_mirroring_argument(parser)
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        dest="learning_rates",
        type=positive_number,
        default=[],
        metavar="RATE",
        help="Highest learning rates of the modes that train the whole network. Of several, every arm is reported with the one "
        "that is best on validation patients (default: by optimizer, network and start).",
    )
    add_configuration_argument(parser, "Configuration to fine-tune (default: one that fits all arms).")
    _add_case_arguments(parser)
    _add_pretraining_arguments(parser)
    _add_study_arguments(parser)
    add_device_argument(parser)
    add_processes_argument(parser, "Worker processes for preprocessing and evaluation")
    add_verbose_argument(parser)
    return parser


def number_of_epochs(text: str) -> int:
    """Read a named length or a number of epochs, for ``argparse``."""
    return LENGTHS[text] if text in LENGTHS else positive_int(text)


def _add_matrix_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        dest="arms",
        nargs="+",
        required=True,
        metavar="ARM",
        help="Arms to compare with training from scratch: a method, a method with settings (pix2rep:temperature=0.2), a single "
        "stage (reprec.generative), a checkpoint (FILE.pth or NAME=FILE.pth, the file as a path or an address), or auto, which "
        "chooses a method by short runs without labels (auto:budget=10 for ten minutes in total).",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        type=positive_int,
        default=[1, 5, 20],
        metavar="N",
        help="Numbers of labelled patients to train on (default: 1 5 20).",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=3,
        metavar="N",
        help="Number of random seeds for label subsets and batches (default: 3).",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        default=["finetune"],
        help="Modes of fine-tuning; see nnssl_finetune --help (default: finetune).",
    )
    parser.add_argument(
        "--length",
        "--epochs",
        nargs="+",
        dest="epochs",
        type=number_of_epochs,
        default=[50, 150],
        metavar="N",
        help="Lengths of fine-tuning: short (50), medium (150), full (1000), or numbers of epochs. A gain is claimed only where "
        "scratch does not improve from the second longest to the longest (default: short medium).",
    )


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test-cases",
        type=Path,
        metavar="FILE",
        help="File that lists the cases to hold out, one name per line (default: all cases of randomly drawn patients).",
    )
    parser.add_argument(
        "--test-patients",
        type=positive_int,
        metavar="N",
        help="Number of patients to draw for the test set (default: a quarter).",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--validation-patients",
        type=positive_int,
        metavar="N",
        help="Number of patients to draw that are neither labelled, held out nor pretrained on, to choose between several "
        "--learning-rate.",
    )
    chosen.add_argument(
        "--validation-cases",
        type=Path,
        metavar="FILE",
        help="File that lists the cases of such patients, one name per line.",
    )
    parser.add_argument(
        "--patients",
        type=Path,
        metavar="FILE",
        help="CSV file with the columns 'case' and 'patient' (default: patients are taken from the case names).",
    )
    parser.add_argument(
        "--subsets",
        type=Path,
        metavar="FOLDER",
        help="Folder with seed0.txt, seed1.txt, ..., which list the cases in the order in which labels are added (default: a "
        "random order).",
    )

    parser.add_argument(
        "--choose",
        choices=("random", "select"),
        default="random",
        help="Choose the patients to label at random, or as nnssl_select does, by features of the first arm's weights, which "
        "must exist before the study (default: random).",
    )


def _add_pretraining_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrain-epochs",
        type=positive_int,
        metavar="N",
        help="Epochs of every pretraining stage (default: the plan's).",
    )
    parser.add_argument(
        "--pretrain-iterations",
        type=positive_int,
        metavar="N",
        help="Optimizer steps per epoch of pretraining (default: the plan's).",
    )


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance-mm",
        type=positive_number,
        default=2.0,
        metavar="MM",
        help="Tolerance of the normalised surface distance in mm (default: 2).",
    )
    parser.add_argument("--name", default="study", metavar="NAME", help="Name of the study's folder (default: study).")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="Do only part I of N, to share the work among jobs of a cluster (default: 1/1, everything).",
    )
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="Scheduler address of a Dask cluster whose workers pretrain the arms and fill the cells.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the runs of the study, which of them are finished, and how long the rest takes.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(make_parser(), partial(_run, shlex.join([NAME, *arguments])), arguments)


def _run(command: str, args: argparse.Namespace) -> None:
    print_loading()
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
        recipe=args.recipe,
        scratch_recipe=args.scratch_recipe,
        warmup=args.warmup,
        learning_rates=tuple(args.learning_rates),
        head_learning_rate=args.head_learning_rate,
        trained=args.trained,
        validation_patients=args.validation_patients,
        validation_cases=args.validation_cases,
        configuration=args.configuration,
        test_cases=args.test_cases,
        test_patients=args.test_patients,
        patients=args.patients,
        subsets=args.subsets,
        choose=args.choose,
        pretrain_overrides=tuple(f"{key}={value}" for key, value in common.items() if value is not None),
        mirroring=args.mirroring == "on",
        tolerance_mm=args.tolerance_mm,
    )
    if args.dry_run:
        preview(settings, device=args.device, processes=args.processes)
        print_next("the same command without --dry-run")
        return
    table = benchmark(
        settings,
        name=args.name,
        part=args.part,
        dask_address=args.dask,
        device=args.device,
        processes=args.processes,
        command=command,
    )
    if table is None:
        print_next(command)
    else:
        print_next(f"nnssl_finetune -d {args.dataset} -w CHECKPOINT (of the arm that the report recommends)")


if __name__ == "__main__":
    sys.exit(main())
