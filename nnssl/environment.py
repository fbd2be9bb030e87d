"""State of the whole process that holds for a while: environment variables, and where printed lines go.

nnU-Net reads some of its settings from variables only, and prints much that belongs into a log file.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables inside a ``with`` block and put back what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def quiet(log: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[Callable[[str], None]]:
    """Send what is printed to a log file inside a ``with`` block.

    Args:
        log: appended to.
        say: may print.

    Yields:
        ``say``, printing where it did before.
    """
    before = sys.stdout

    def aloud(line: str) -> None:
        with redirect_stdout(before):
            say(line)

    with open(log, "a", buffering=1) as file, redirect_stdout(file):
        yield aloud
