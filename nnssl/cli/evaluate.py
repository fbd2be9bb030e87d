"""``nnssl_evaluate``: the quality of segmentations compared with references, or of weights for a label of whole cases."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_dataset_argument,
    add_device_argument,
    add_processes_argument,
    add_seed_argument,
    add_verbose_argument,
    add_weights_argument,
    number,
    positive_int,
    print_loading,
    print_next,
    run_command,
)
from nnssl.errors import UserError

NAME = "nnssl_evaluate"
OF_SEGMENTATIONS = ("labels", "tolerance_mm", "processes")
OF_CLASSIFICATION = ("weights", "dataset", "patches", "folds", "seed", "device")
"""Names of the arguments that only one of the two evaluations has."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Compare the segmentations in a folder with reference segmentations, case by case, and write Dice, surface "
        "distances and volumes. With --classify, measure instead how well pretrained weights classify whole cases.",
    )
    parser.add_argument("predictions", type=Path, nargs="?", help="Folder with the segmentations to evaluate.")
    parser.add_argument(
        "references", type=Path, nargs="?", help="Folder with the reference segmentations, under the same file names."
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="dataset.json that names the classes (default: the one beside the predictions or the references; without one, "
        "classes are numbered).",
    )
    parser.add_argument(
        "--tolerance-mm",
        type=number,
        default=2.0,
        metavar="MM",
        help="Tolerance of the normalised surface distance in mm (default: 2).",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="Folder for metrics.csv and summary_nnssl.json (default: the folder of the predictions), or for "
        "classification.json (default: the folder of the labels).",
    )
    add_processes_argument(parser, "Worker processes that read and compare")
    _add_classification_arguments(parser)
    add_verbose_argument(parser)
    return parser


def _add_classification_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classify",
        type=Path,
        metavar="FILE.csv",
        help="Classify whole cases by frozen features of pretrained weights and of random weights, and write the AUC. The CSV "
        "file has the columns 'case' and 'label', and optionally 'patient'. The arguments below belong to this evaluation.",
    )
    add_weights_argument(parser)
    add_dataset_argument(
        parser, "Data set of the cases, number or name (default: the one that the weights were pretrained on)."
    )
    parser.add_argument(
        "--patches",
        type=positive_int,
        default=16,
        metavar="N",
        help="Patches inside the body from which the features of a case are averaged (default: 16).",
    )
    parser.add_argument(
        "--folds", type=positive_int, default=5, metavar="N", help="Folds of the cross-validation (default: 5)."
    )
    add_seed_argument(parser, "Random seed for patches, random weights, folds and bootstrap")
    add_device_argument(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    if args.classify is not None:
        _classify(args)
        return
    _refuse(args, OF_CLASSIFICATION, "needs --classify FILE.csv")
    if args.references is None:
        raise UserError("give the folders PREDICTIONS and REFERENCES, or --classify FILE.csv")
    from nnssl.evaluation.evaluate import evaluate

    evaluate(args.predictions, args.references, args.labels, args.tolerance_mm, args.output, args.processes)
    print_next("nnssl_benchmark -d LABELLED_ID -m METHOD (to measure how much pretraining helps with few labels)")


def _classify(args: argparse.Namespace) -> None:
    if args.predictions is not None:
        raise UserError(f"--classify takes no folders of segmentations, got {args.predictions}; leave them out")
    _refuse(args, OF_SEGMENTATIONS, "belongs to segmentations; leave it out with --classify")
    print_loading()
    from nnssl.evaluation.classify import ClassifySettings, classify
    from nnssl.paths import resolve_folders
    from trainers.finetuning.pretrained_weights import find_weights

    folders = resolve_folders()
    weights = find_weights(args.weights, folders)
    settings = ClassifySettings(args.patches, args.folds, args.seed, args.device, args.output)
    classify(args.classify.expanduser(), weights, args.dataset, settings, folders)
    print_next(f"nnssl_finetune -d LABELLED_ID -w {weights}")


def _refuse(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Check that no argument of the other evaluation was given.

    Raises:
        UserError: If one was.
    """
    parser = make_parser()
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} {reason}")


if __name__ == "__main__":
    sys.exit(main())
