"""Messages for the user: one logger, named ``nnssl``, for the library, the planners and the trainers.

Its lines are printed by default, in commands and notebooks alike. ``logging.getLogger("nnssl").setLevel("WARNING")`` silences
them; a handler that is added to that logger receives them too.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

logger = logging.getLogger("nnssl")


class LineHandler(logging.Handler):
    """Passes every message to a function, which can be replaced for a while (``lines_to``)."""

    def __init__(self) -> None:
        super().__init__()
        self.receive: Callable[[str], None] = print_line

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on one message."""
        self.receive(self.format(record))


def prints() -> bool:
    """Return whether this process prints: the only one, or the first one that torchrun started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def print_line(line: str) -> None:
    """Print one line and flush, so that pipes and log files receive it immediately; in the first process of torchrun only."""
    if not prints():
        return
    try:
        print(line, file=sys.stdout, flush=True)  # noqa: T201
    except UnicodeEncodeError:  # a path that is not UTF-8, or any other than ASCII on an old terminal
        encoding = sys.stdout.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout, flush=True)  # noqa: T201


_handler = LineHandler()
logger.addHandler(_handler)
logger.setLevel(logging.INFO)
logger.propagate = False


@contextmanager
def lines_to(receive: Callable[[str], None]) -> Iterator[None]:
    """Pass messages to a function instead of printing them inside a ``with`` block."""
    before = _handler.receive
    _handler.receive = receive
    try:
        yield
    finally:
        _handler.receive = before


@contextmanager
def lines_above(hide: Callable[[], None], draw: Callable[[], None]) -> Iterator[None]:
    """Print messages above a progress bar inside a ``with`` block.

    Args:
        hide: Function that clears the bar before a message.
        draw: Function that draws the bar again after it.
    """
    receive = _handler.receive

    def receive_above(line: str) -> None:
        hide()
        receive(line)
        draw()

    with lines_to(receive_above):
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Drop messages inside a ``with`` block."""
    with lines_to(lambda line: None):
        yield


@contextmanager
def printed_output_to(path: Path) -> Iterator[None]:
    """Append what other libraries print inside a ``with`` block to a log file.

    Messages of the logger are still printed where they were before.

    Args:
        path: File to append to.
    """
    stdout, receive = sys.stdout, _handler.receive

    def receive_outside(line: str) -> None:
        with redirect_stdout(stdout):
            receive(line)

    with open(path, "a", buffering=1) as file, redirect_stdout(file), lines_to(receive_outside):
        yield
