"""``nnssl_import``: register existing images as a raw data set of nnU-Net, without copying them."""

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
        description="Register existing images as an nnU-Net data set without copying them. Rejected files are listed.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="Folder of NIfTI, NRRD, MHA or GIPL files, BIDS tree, folder of DICOM series, list of files (.txt), or "
        "pretrain_data.json.",
    )
    parser.add_argument(
        "-d",
        "--dataset",
        dest="number",
        required=True,
        type=positive_int,
        metavar="ID",
        help="Number of the new data set, 1 to 999.",
    )
    parser.add_argument(
        "-n", "--name", required=True, metavar="NAME", help="Name of the new data set, such as MyScans."
    )
    parser.add_argument("--kind", choices=KIND_NAMES, help="Kind of SOURCE (default: detected and printed).")
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="Folder or list: names of the channels, such as CT. With file-name suffixes, such as T1=_t1 T2=_t2, files that "
        "differ only in the suffix become the channels of one case.",
    )
    parser.add_argument(
        "--modality",
        nargs="+",
        metavar="NAME",
        help="BIDS suffixes (T1w), or modalities of a collection or of DICOM (CT). Several become the channels of one case.",
    )
    parser.add_argument("--mixed", action="store_true", help="Make every image its own case, whatever its modality.")
    parser.add_argument(
        "--pattern",
        metavar="GLOB",
        help="Import only files (DICOM: series descriptions) that match, such as '*_ct.nii.gz'.",
    )
    parser.add_argument(
        "--min-slices", type=positive_int, metavar="N", help="Least number of slices of a DICOM series (default: 5)."
    )
    add_restart_argument(parser, "Replace the data set that an earlier import made under this number.")
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
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
    record = import_dataset(
        args.source, args.number, args.name, kind=args.kind, choices=choices, restart=args.restart, folders=folders
    )
    for line in format_import(record):
        print_line(line)
    print_line(f"record: {folders.raw / record.dataset_name / RECORD_FILE}")
    print_next(f"nnssl_plan_and_preprocess -d {args.number}")


if __name__ == "__main__":
    sys.exit(main())
