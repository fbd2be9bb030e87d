"""What all commands share: the parser, common arguments, the lines that they print, and error handling.

This module imports nothing heavy, so that ``--help`` answers at once. Names of other packages that help texts need are therefore
repeated here; a test compares them with the originals.
"""

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nnssl.errors import ArgumentError, UserError
from nnssl.interrupts import INTERRUPTED, ends_on_sigterm
from nnssl.log import print_line, prints

USER_ERROR = 2
DEVICES = ("cpu", "cuda", "mps")
PLANS_NAME = "nnsslPlans"
MODES = ("finetune", "linear", "mean_teacher")
OPTIMIZERS = ("sgd", "adam", "adamw")
RECIPES = ("nnunet", "warmup", "sawtooth")
TRAINED = ("everything", "new", "decoder", "head")
LENGTHS = {"short": 50, "medium": 150, "full": 1000}
TRACKERS = ("tensorboard", "wandb")


def print_next(command: str, *others: str, to_stderr: bool = False) -> None:
    """Print the command to run next, which every command does at its end, and alternatives to it.

    Args:
        command: The command, with placeholders in capitals.
        others: Alternatives to it.
        to_stderr: Whether to print to standard error, because a shell evaluates the standard output.
    """
    for line in (f"next: {command}", *(f"  or: {other}" for other in others)):
        if to_stderr:
            print(line, file=sys.stderr, flush=True)
        else:
            print_line(line)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are a single line."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, add_help=False, **kwargs)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with the code of a user error."""
        self.exit(USER_ERROR, f"{self.prog}: error: {message}; {self.prog} --help lists the arguments\n")


def run_command(
    parser: argparse.ArgumentParser, function: Callable[[argparse.Namespace], Any], argv: Sequence[str] | None
) -> int:
    """Parse the arguments of a command, call its function, and print a ``UserError`` as one line.

    Args:
        parser: Parser of the command, with ``add_verbose_argument``.
        function: Function that does the work with the parsed arguments; its result is ignored.
        argv: Arguments; None for those of this process.

    Returns:
        The exit code: 0, 2 after a ``UserError``, 130 after Ctrl-C. Every other exception is a bug and is raised.

    Raises:
        SystemExit: After SIGTERM, with exit code 143.
    """
    args = parser.parse_args(argv)
    _warn_of_other_package()
    try:
        with ends_on_sigterm(parser.prog):
            function(args)
    except UserError as error:
        if args.verbose:
            traceback.print_exc()
        message = error.with_flags(flags_of(parser)) if isinstance(error, ArgumentError) else str(error)
        _print_error(f"{parser.prog}: error: {message}")
        return USER_ERROR
    except KeyboardInterrupt:
        _print_once(f"{parser.prog}: interrupted; run the same command again to resume")
        return INTERRUPTED
    return 0


def _warn_of_other_package() -> None:
    """Print a warning if MIC-DKFZ's package is in the same environment. Only folders are looked for, which takes no time."""
    from nnssl.environment import other_folders

    for folder in other_folders():
        _print_once(
            f"Warning: MIC-DKFZ's package, also called nnssl, is in this environment ({folder}); one hides the other, so install "
            "them in two environments"
        )


def _print_error(line: str) -> None:
    """Print an error, in the first process of each machine, because data may be missing on one machine only."""
    if prints() or os.environ.get("LOCAL_RANK") == "0":
        print(line, file=sys.stderr, flush=True)


def _print_once(line: str) -> None:
    """Print a line to standard error, in the first process of torchrun only."""
    if prints():
        print(line, file=sys.stderr, flush=True)


PYTHON_NAMES = {
    "plans": "plans_name",
    "budget": "budget_minutes",
    "input_policy": "policy",
    "modality": "modalities",
    "license": "licence",
    "output": "out",
    "spacing": "spacing_mm",
    "dask": "dask_address",
    "mode": "modes",
    "labels": "labels_file",
    "npz": "save_probabilities",
}
"""Python name of an argument by the name of its flag, where the two differ."""


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the flag of every argument, or the name of a positional one, by the name of the argument in Python."""
    flags: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                flags |= flags_of(below)
        elif not action.option_strings:
            flags[action.dest] = str(action.metavar or action.dest)
        else:
            flag = action.option_strings[-1]
            name = flag.lstrip("-").replace("-", "_")
            flags |= {each: flag for each in (action.dest, name, PYTHON_NAMES.get(name, name))}
    return flags


# arguments of several commands


def add_dataset_argument(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    """Add ``-d ID`` with its help text."""
    parser.add_argument("-d", "--dataset", required=required, metavar="ID", help=text)


def add_plans_argument(parser: argparse.ArgumentParser, text: str = "Name of the plan") -> None:
    """Add ``-p PLANS`` with its help text, to which the default is added."""
    parser.add_argument("-p", "--plans", default=PLANS_NAME, metavar="PLANS", help=f"{text} (default: {PLANS_NAME}).")


def add_configuration_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``-c CONFIG`` with its help text."""
    parser.add_argument("-c", "--configuration", metavar="CONFIG", help=text)


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``-w CHECKPOINT``; the default is the newest checkpoint."""
    parser.add_argument(
        "-w",
        "--weights",
        default="latest",
        metavar="CHECKPOINT",
        help="Checkpoint: a path, https://... or hf://OWNER/REPO/FILE; or 'latest' for the newest checkpoint_final.pth of "
        "nnssl_pretrain below nnUNet_results (default: latest).",
    )


def add_finetuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the optimization that every fine-tuning has."""
    parser.add_argument(
        "--iterations-per-epoch",
        type=positive_int,
        default=250,
        metavar="N",
        help="Optimizer steps per epoch of fine-tuning (default: 250).",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="Patches per step of fine-tuning (default: the plan's)."
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="Optimizer of fine-tuning (default: sgd; adam for hybrid networks, adamw for Primus). --mode linear uses adam "
        "only.",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="Learning rate of pretrained weights. nnunet: decay from the first step. warmup: a linear rise first. sawtooth: new "
        "layers alone first, then everything, each with a rise and a decay (default: sawtooth for U-Nets, else warmup).",
    )
    parser.add_argument(
        "--scratch-recipe",
        choices=RECIPES,
        default="nnunet",
        help="Learning rate of random weights (default: nnunet).",
    )
    parser.add_argument(
        "--warmup",
        type=share_or_steps,
        metavar="SHARE|STEPS",
        help="Length of the warm-up: a share of the run below 1, or a number of steps (default: 0.1, at most 12500 steps).",
    )
    parser.add_argument(
        "--head-learning-rate",
        type=positive_number,
        metavar="RATE",
        help="Highest learning rate of layers that were not pretrained (default: that of the other layers).",
    )
    parser.add_argument(
        "--train",
        dest="trained",
        choices=TRAINED,
        default="everything",
        help="What is trained of pretrained weights: everything, what is new, the decoder, or the segmentation layers as the "
        "head (default: everything).",
    )


def add_mirroring_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--mirroring on|off``."""
    parser.add_argument(
        "--mirroring",
        choices=("on", "off"),
        default="on",
        help="Predict held-out cases as the mean over all mirrored images, as nnU-Net does, which takes four times as long for "
        "slices and eight times for volumes (default: on).",
    )


def add_seed_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--seed N`` with its help text, to which the default is added."""
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help=f"{text} (default: 0).")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device cpu|cuda|mps``; without it, ``nnssl.devices.find_device`` decides."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=None,
        help="Device to compute on (default: cuda if a GPU is available, else cpu).",
    )


def add_processes_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--processes N`` with its help text; without it, ``nnssl.data.jobs.default_processes`` decides."""
    parser.add_argument(
        "--processes", type=positive_int, metavar="N", help=f"{text} (default: one per core, at most 8)."
    )


def add_restart_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--restart`` with its help text."""
    parser.add_argument("--restart", action="store_true", help=text)


def add_track_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--track NAME ...``, which may be repeated."""
    parser.add_argument(
        "--track",
        nargs="+",
        action="extend",
        choices=TRACKERS,
        default=[],
        metavar="NAME",
        help="Write curves and pictures to the run's folder for tensorboard, for wandb (Weights & Biases, offline), or for both "
        "(default: neither). Install them with pip install 'nnssl[tensorboard,wandb]'.",
    )


def print_loading() -> None:
    """Print that the packages are imported, which takes seconds that would otherwise be silent."""
    print_line("Loading PyTorch and nnU-Net ...")


def add_verbose_argument(parser: argparse.ArgumentParser, text: str = "Print the traceback of errors.") -> None:
    """Add ``--verbose``, which ``run_command`` reads; ``text`` is its help."""
    parser.add_argument("--verbose", action="store_true", help=text)


def path_or_address(text: str) -> Path | str:
    """Read the path of a file with weights, or its address, which a path would change; for ``argparse``."""
    return text if "://" in text else Path(text).expanduser()


def positive_int(text: str) -> int:
    """Read a whole number of at least 1, for ``argparse``."""
    return _whole_number(text, 1)


def natural_int(text: str) -> int:
    """Read a whole number of at least 0, for ``argparse``."""
    return _whole_number(text, 0)


def number(text: str) -> float:
    """Read a number, for ``argparse``."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None


def positive_number(text: str) -> float:
    """Read a finite number above 0, for ``argparse``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def natural_number(text: str) -> float:
    """Read a finite number of at least 0, for ``argparse``."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def share_or_steps(text: str) -> float:
    """Read a share from 0 to 1, or a whole number of steps, for ``argparse``."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf or (value >= 1 and value != round(value)):
        raise argparse.ArgumentTypeError(f"must be a share below 1 or a whole number of steps, got {text}")
    return value


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return value
