"""Ctrl-C and SIGTERM: how processes end when the user or a batch scheduler stops them."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool
from types import FrameType
from typing import Any

from nnssl.log import prints

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after SIGTERM, as shells report them."""


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Start processes inside a ``with`` block that Ctrl-C does not reach, not even while they import packages.

    A terminal sends Ctrl-C to all processes of a command; this one receives it after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def pools_without_interrupts() -> Iterator[None]:
    """Let pools that other libraries start inside a ``with`` block have workers that Ctrl-C does not reach.

    Their processes then end with the pool, without a traceback of each.
    """
    start = Pool.__init__

    def start_blocked(self: Any, *args: Any, **options: Any) -> None:
        with interrupts_blocked():
            start(self, *args, **options)

    Pool.__init__ = start_blocked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Pool.__init__ = start  # type: ignore[method-assign]


def receive_interrupts() -> None:
    """Let Ctrl-C reach this process, which was started inside ``interrupts_blocked``."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def ends_on_sigterm(name: str) -> Iterator[None]:
    """End this process on SIGTERM with one line, exit code 143 and what ``finally`` blocks do, inside a ``with`` block.

    Processes that it forks have the system's default instead and end at once: a pool that terminates its workers would otherwise
    wait forever for one whose signal came just before it blocked. A handler that was set before remains.

    Args:
        name: Name of the command, for the line.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        if prints():
            print(f"{name}: terminated; run the same command again to resume", file=sys.stderr, flush=True)  # noqa: T201
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    _of_this_process.append(end)
    try:
        yield
    finally:
        _of_this_process.remove(end)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_of_this_process: list[object] = []
"""Handlers of SIGTERM that forked processes must not keep."""


def _forget_handlers() -> None:
    if signal.getsignal(signal.SIGTERM) in _of_this_process:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_handlers)
