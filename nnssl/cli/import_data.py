"""``nnssl_import``: images as users have them become a raw data set of nnU-Net by reference."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli.command import (
    CommandParser,
    add_restart_argument,
    add_verbose_argument,
    positive_int,
    print_next,
    run_command,
)
from nnssl.log import print_line

NAME = "nnssl_import"
KIND_NAMES = ("folder", "bids", "list", "dicom", "collection")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME,
        description="Make a data set below nnUNet_raw of images where they are. Nothing is copied; what is refused is said.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of NIfTI, NRRD, MHA or GIPL files, BIDS tree, folder of DICOM series, list (.txt), or pretrain_data.json",
    )
    parser.add_argument(
        "-d", "--dataset", dest="number", required=True, type=positive_int, metavar="ID", help="number, 1 to 999"
    )
    parser.add_argument("-n", "--name", required=True, metavar="NAME", help="name of the data set, such as MyScans")
    parser.add_argument("--kind", choices=KIND_NAMES, help="what SOURCE is (default: found out and said)")
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="folder, list: what the channels are, such as CT; with file-name suffixes, T1=_t1 T2=_t2, files make cases",
    )
    parser.add_argument(
        "--modality",
        nargs="+",
        metavar="NAME",
        help="BIDS suffixes (T1w), modalities of a collection or of DICOM (CT); several are channels of one case",
    )
    parser.add_argument("--mixed", action="store_true", help="every image is a case, whatever its modality")
    parser.add_argument(
        "--pattern", metavar="GLOB", help="only files (DICOM: series descriptions) that match, such as '*_ct.nii.gz'"
    )
    parser.add_argument("--min-slices", type=positive_int, metavar="N", help="smallest DICOM series taken (default: 5)")
    add_restart_argument(parser, "replace what an earlier import of this number made")
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    from nnssl.imports.dataset import import_dataset
    from nnssl.imports.record import RECORD_FILE, format_import
    from nnssl.imports.sources import Choices
    from nnssl.paths import resolve_folders

    folders = resolve_folders()
    choices = Choices(
        channels=tuple(args.channels or ()),
        pattern=args.pattern,
        modalities=tuple(args.modality or ()),
        mixed=args.mixed,
        min_slices=args.min_slices,
    )
    record = import_dataset(args.source, args.number, args.name, folders, args.kind, choices, args.restart)
    for line in format_import(record):
        print_line(line)
    print_line(f"record: {folders.raw / record.dataset_name / RECORD_FILE}")
    print_next(f"nnssl_plan_and_preprocess -d {args.number}")


if __name__ == "__main__":
    sys.exit(main())
