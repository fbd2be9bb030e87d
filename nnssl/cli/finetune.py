"""``nnssl_finetune``: fine-tune pretrained weights on labelled cases, evaluate them, and compare with scratch."""

import argparse
import sys
from collections.abc import Sequence
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
    add_processes_argument,
    add_restart_argument,
    add_seed_argument,
    add_track_argument,
    add_verbose_argument,
    add_weights_argument,
    natural_int,
    positive_int,
    positive_number,
    print_loading,
    print_next,
    run_command,
)

NAME = "nnssl_finetune"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Fine-tune pretrained weights on a labelled data set with nnU-Net, predict the held-out labelled cases and "
        "report their Dice. Run the same command again to resume.",
    )
    add_dataset_argument(parser, "Labelled data set below nnUNet_raw, number or name.", required=True)
    add_weights_argument(parser)
    add_configuration_argument(parser, "Configuration of the weights' plan (default: the pretrained one).")
    parser.add_argument("--scratch", action="store_true", help="Also train from random weights for comparison.")
    _add_case_arguments(parser)
    add_seed_argument(parser, "Random seed for the label subset, random weights and batches")
    _add_length_arguments(parser)
    add_finetuning_arguments(parser)
    add_mirroring_argument(parser)
    parser.add_argument(
        "--learning-rate",
        type=positive_number,
        metavar="RATE",
        help="Highest learning rate, of pretrained and random weights (default: by optimizer, network and start; see the "
        "documentation).",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="finetune",
        help="finetune: train all weights. linear: train only the segmentation layer. mean_teacher: train all weights with "
        "a consistency term on unlabelled cases (default: finetune).",
    )
    parser.add_argument(
        "--plans-name",
        metavar="PLANS",
        help="Name for the plan in the data set's folder (default: the plan's own name).",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--num-gpus",
        type=positive_int,
        default=1,
        metavar="N",
        help="Training processes on this machine, one per GPU, which share the batch; CPU processes with --device cpu "
        "(default: 1).",
    )
    parser.add_argument(
        "--npz",
        action="store_true",
        help="Keep the probabilities of the held-out cases, which nnUNetv2_find_best_configuration needs for ensembles of "
        "several configurations.",
    )
    add_processes_argument(parser, "Worker processes for preprocessing and evaluation")
    add_restart_argument(parser, "Delete these runs and train again.")
    add_track_argument(parser)
    add_verbose_argument(parser)
    return parser


def _add_length_arguments(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--length",
        choices=tuple(LENGTHS),
        help="Length of the training: "
        + ", ".join(f"{name} is {epochs}" for name, epochs in LENGTHS.items())
        + " epochs "
        "(default: full).",
    )
    length.add_argument("--epochs", type=positive_int, metavar="N", help="Length in epochs, including warm-up.")


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--labels",
        type=positive_int,
        metavar="N",
        help="Train on N cases and hold out the others (default: nnU-Net's fold 0).",
    )
    chosen.add_argument(
        "--cases", type=Path, metavar="FILE", help="Train on the cases listed in this file, one name per line."
    )
    chosen.add_argument(
        "--fold",
        nargs="+",
        dest="folds",
        type=number_of_fold,
        default=[],
        metavar="N",
        help="Folds of nnU-Net's cross-validation to train: 0 to 4, several, or all for all cases at once (default: 0, if no "
        "cases are chosen otherwise).",
    )
    parser.add_argument(
        "--test-cases", type=Path, metavar="FILE", help="Hold out the cases listed in this file, one name per line."
    )
    parser.add_argument(
        "--unlabelled",
        metavar="FILE|ID",
        help="Images for --mode mean_teacher: a data set without labels, or a file that lists labelled cases whose labels are "
        "ignored, one name per line (default: all labelled cases that are neither trained on nor held out). The images of the "
        "training cases are used in addition; held-out images are excluded.",
    )


def number_of_fold(text: str) -> int | str:
    """Read the number of a fold, or ``all``, for ``argparse``."""
    return text if text == "all" else natural_int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    print_loading()
    from trainers.finetuning.finetune import finetune
    from trainers.finetuning.settings import FinetuneSettings

    results = finetune(
        args.dataset,
        args.weights,
        FinetuneSettings(
            configuration=args.configuration,
            scratch=args.scratch,
            labels=args.labels,
            cases=args.cases,
            test_cases=args.test_cases,
            folds=tuple(args.folds),
            num_gpus=args.num_gpus,
            save_probabilities=args.npz,
            seed=args.seed,
            epochs=args.epochs or LENGTHS[args.length or "full"],
            iterations_per_epoch=args.iterations_per_epoch,
            recipe=args.recipe,
            scratch_recipe=args.scratch_recipe,
            warmup=args.warmup,
            learning_rate=args.learning_rate,
            head_learning_rate=args.head_learning_rate,
            trained=args.trained,
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            device=args.device,
            processes=args.processes,
            plans_name=args.plans_name,
            mode=args.mode,
            unlabelled=args.unlabelled,
            track=args.track,
            mirroring=args.mirroring == "on",
            restart=args.restart,
        ),
    )
    print_next(*(result.predict_command for result in results))


if __name__ == "__main__":
    sys.exit(main())
