"""What every command shares: its parser, the arguments that several have, printing, and how errors end.

Imports nothing heavy, so that ``--help`` answers at once; what a help text names of the rooms behind is written down here
once, and a test compares it with them.
"""

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from nnssl.errors import ArgumentError, UserError
from nnssl.log import print_line

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for Ctrl-C
DEVICES = ("cpu", "cuda", "mps")
PLANS_NAME = "nnsslPlans"
MODES = ("finetune", "linear", "mean_teacher")
OPTIMIZERS = ("sgd", "adam", "adamw")


def print_next(command: str, *others: str) -> None:
    """Print what to call next, as every command does at its end, and what else one may call."""
    print_line(f"next: {command}")
    for other in others:
        print_line(f"  or: {other}")


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of all commands are."""

    def error(self, message: str) -> NoReturn:
        """Print the error line and exit with the code of a user's error."""
        self.exit(USER_ERROR, f"{self.prog}: error: {message}; {self.prog} --help lists the arguments\n")


def run_command(
    parser: argparse.ArgumentParser, function: Callable[[argparse.Namespace], Any], argv: Sequence[str] | None
) -> int:
    """Parse a command's arguments, call its function, and turn an error of the user's making into one line.

    Args:
        parser: of the command, with ``add_verbose_argument``.
        function: does the work with the parsed arguments; its result is ignored.
        argv: the arguments; None for those of this process.

    Returns:
        The exit code: 0, 2 after a ``UserError``, 130 after Ctrl-C. Every other exception is a defect and is raised.
    """
    args = parser.parse_args(argv)
    try:
        function(args)
    except UserError as error:
        if args.verbose:
            traceback.print_exc()
        message = error.with_flags(flags_of(parser)) if isinstance(error, ArgumentError) else str(error)
        print(f"{parser.prog}: error: {message}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


PYTHON_NAMES = {
    "plans": "plans_name",
    "input_policy": "policy",
    "modality": "modalities",
    "license": "licence",
    "output": "out",
    "spacing": "spacing_mm",
    "dask": "dask_address",
    "mode": "modes",
}
"""Names of arguments in Python where they differ from the flag's."""


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the flag of every argument, by the name that the argument has in Python."""
    flags: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                flags |= flags_of(below)
        elif action.option_strings:
            flag = action.option_strings[-1]
            name = flag.lstrip("-").replace("-", "_")
            flags |= {each: flag for each in (action.dest, name, PYTHON_NAMES.get(name, name))}
    return flags


# arguments that several commands have


def add_dataset_argument(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """Add ``-d ID``; ``what`` says whose, and what is taken without it."""
    parser.add_argument("-d", "--dataset", required=required, metavar="ID", help=what)


def add_plans_argument(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add ``-p PLANS`` with nnssl's own name as default."""
    parser.add_argument(
        "-p",
        "--plans",
        default=PLANS_NAME,
        metavar="PLANS",
        help=f"{of}plans identifier (default: {PLANS_NAME})",
    )


def add_configuration_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``-c CONFIG``; ``what`` says whose, and what is taken without it."""
    parser.add_argument("-c", "--configuration", metavar="CONFIG", help=what)


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``-w CHECKPOINT``, the newest one as default."""
    parser.add_argument(
        "-w",
        "--weights",
        default="latest",
        metavar="CHECKPOINT",
        help="of nnssl_pretrain, or 'latest' for the newest checkpoint_final.pth below nnUNet_results (default)",
    )


def add_finetuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of a fine-tuning that do not depend on the question asked of it."""
    parser.add_argument("--iterations-per-epoch", type=positive_int, default=250, metavar="N", help="(default: 250)")
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="patches per step of fine-tuning (default: the plan's)"
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="of fine-tuning (default: sgd, and adamw for Primus, as nnU-Net; adam, and no other, for --mode linear)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_number,
        metavar="RATE",
        help="the highest one of fine-tuning (default: 0.01 in each mode; 3e-4 with adamw)",
    )


def add_seed_argument(parser: argparse.ArgumentParser, of: str) -> None:
    """Add ``--seed N``; ``of`` says what it decides."""
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help=f"of {of} (default: 0)")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device cpu|cuda|mps``; left out, ``nnssl.devices.find_device`` decides."""
    parser.add_argument(
        "--device", choices=DEVICES, default=None, help="where to compute (default: cuda if there is one, else cpu)"
    )


def add_processes_argument(parser: argparse.ArgumentParser, of: str) -> None:
    """Add ``--processes N``; left out, ``nnssl.data.jobs.default_processes`` decides."""
    parser.add_argument(
        "--processes", type=positive_int, metavar="N", help=f"for {of} (default: one for each core, at most 8)"
    )


def add_restart_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--restart``; ``what`` says what is done again."""
    parser.add_argument("--restart", action="store_true", help=what)


def add_verbose_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--verbose``, which ``run_command`` reads."""
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")


def positive_int(text: str) -> int:
    """Read a number of 1 or more, for ``argparse``."""
    return _whole_number(text, 1)


def natural_int(text: str) -> int:
    """Read a number of 0 or more, for ``argparse``."""
    return _whole_number(text, 0)


def positive_number(text: str) -> float:
    """Read a finite number above 0, for ``argparse``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of {least} or more")
    return value
