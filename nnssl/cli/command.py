"""What every command shares: printing, the device, and how errors end. Imports nothing heavy."""

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnssl.errors import UserError

if TYPE_CHECKING:
    import torch

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for Ctrl-C
DEVICES = ("cpu", "cuda", "mps")


def say(line: str) -> None:
    """Print one line at once, also into a pipe or a log file."""
    print(line, flush=True)


def run_command(
    name: str, function: Callable[[argparse.Namespace], Any], args: argparse.Namespace, verbose: bool
) -> int:
    """Run a command's function and turn an error of the user's making into one line.

    Args:
        name: the command, for the error line.
        function: does the work; its result is ignored.
        args: the parsed arguments, passed to ``function``.
        verbose: print the traceback before the error line.

    Returns:
        The exit code: 0, 2 after a ``UserError``, 130 after Ctrl-C. Every other exception is a defect and is raised.
    """
    try:
        function(args)
    except UserError as error:
        if verbose:
            traceback.print_exc()
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device cpu|cuda|mps``; left out, ``choose_device`` decides."""
    parser.add_argument(
        "--device", choices=DEVICES, default=None, help="where to compute (default: cuda if there is one, else cpu)"
    )


def choose_device(choice: str | None, say: Callable[[str], None]) -> "torch.device":
    """Return the device asked for, or the GPU if there is one and the CPU otherwise, said aloud.

    Args:
        choice: ``cpu``, ``cuda``, ``mps`` or None.
        say: called with one line when the choice was made here.

    Raises:
        UserError: the device asked for is not there.
    """
    import torch

    if choice is None:
        choice = "cuda" if torch.cuda.is_available() else "cpu"
        reason = "found a GPU" if choice == "cuda" else "no CUDA GPU found"
        say(f"Device: {choice} ({reason}; --device to choose another)")
    missing = (choice == "cuda" and not torch.cuda.is_available()) or (
        choice == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UserError(f"--device {choice}: PyTorch finds no such device here; leave --device out or take cpu")
    return torch.device(choice)


def positive_int(text: str) -> int:
    """Read a number of 1 or more, for ``argparse``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def natural_int(text: str) -> int:
    """Read a number of 0 or more, for ``argparse``."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value
