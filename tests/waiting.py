"""Waiting for events in tests.

A test must not fail because the machine is slow. Tests therefore wait for what the code does, and the only limit is one
that ends a run that hangs.
"""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HUNG_S = 30 * 60
"""Time after which a wait is given up; no working test takes a fraction of it, even on a busy machine."""


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + HUNG_S
    while not holds():
        assert time.monotonic() < end, f"nothing has happened for {HUNG_S} s"
        time.sleep(0.01)


def receive(connection: Connection, process: BaseProcess) -> Any:
    """Return what a process sends, or fail as soon as the process ends without sending anything."""
    ready = wait([connection, process.sentinel], HUNG_S)
    assert connection in ready, f"the process has sent nothing; its exit code is {process.exitcode}"
    return connection.recv()


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, also if nobody has asked for its exit code yet. Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
