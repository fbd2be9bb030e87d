"""A lock that another process holds, for tests of what this process does meanwhile."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl.log import logger

HOLD = """
import sys
from pathlib import Path
from nnssl.locks import only_process
with only_process(Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen]:
    """Hold the lock of a folder in another process, until a line is written to its input or the ``with`` block ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            release(process)


def release(process: subprocess.Popen) -> None:
    """Let the other process release its lock and end."""
    if process.poll() is None:
        process.communicate("\n")


def waits_for(folder: Path, work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Do work while another process holds a lock, which it releases once this process says that it waits.

    Returns:
        The result of the work and the messages.
    """
    said: list[str] = []
    with held_elsewhere(folder) as process:

        class Receiver(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                said.append(record.getMessage())
                if said[-1].startswith(f"Waiting for process {process.pid} on "):
                    release(process)

        receiver = Receiver()
        logger.addHandler(receiver)
        try:
            result = work()
        finally:
            logger.removeHandler(receiver)
        assert any(line.startswith(f"Waiting for process {process.pid} on ") for line in said), said
    return result, said
