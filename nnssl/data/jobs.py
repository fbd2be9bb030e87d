"""Jobs on many cases: in this process, in several processes of this machine, or on a Dask cluster.

Only a few jobs are submitted at a time and results are yielded as they finish, so memory use does not grow with the
number of jobs.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from nnssl.data.cluster import run_on_cluster
from nnssl.data.worker_pool import end_with_parent, run_in_workers
from nnssl.log import logger, prints

J = TypeVar("J")
R = TypeVar("R")

MOST_PROCESSES = 8
"""Default upper limit of processes. With more, memory usually runs out before cores do, so users must ask for them."""

SECONDS_TO_START = 10.0
"""Approximate time in which worker processes import torch and nnU-Net."""

SECONDS_PER_LINE = 30.0
"""Interval between progress messages if there is no terminal."""


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """Return the default number of processes: one per core, at most ``MOST_PROCESSES``."""
    return min(MOST_PROCESSES, usable_cores())


def run_jobs(
    work: Callable[[J], R],
    jobs: Iterable[J],
    processes: int,
    dask_address: str | None,
    lost: Callable[[J, str], R] | None = None,
) -> Iterator[R]:
    """Yield the results of jobs in the order in which they finish.

    Args:
        work: Importable function that is called with each job and returns a small result.
        jobs: Jobs, consumed as they are needed.
        processes: Number of processes on this machine; up to 1 runs the jobs in this process.
        dask_address: Address of a Dask scheduler, such as ``tcp://host:8786``, to use instead of ``processes``; None for
            local processes. The workers of the cluster must have nnssl installed, see the same folders, and run one
            thread each.
        lost: Returns the result of a job that ended the process that worked on it, from the job and that reason; None if such a
            job ends all.

    Raises:
        UserError: If a job ended its process and ``lost`` is None, if no cluster answers, or if Dask is not installed.
        Exception: If ``work`` raises an exception; jobs that have not started are then dropped.
    """
    if dask_address is not None:
        yield from run_on_cluster(work, jobs, dask_address, lost)
    elif processes <= 1:
        yield from map(work, jobs)
    else:
        yield from run_in_workers(work, jobs, processes, _start_process, lost)


def run_list(work: Callable[[J], R], jobs: Sequence[J], processes: int) -> Iterator[R]:
    """Yield the results of known jobs as ``run_jobs`` does, but start processes only if they save time.

    The first job is done in this process. If the others would take no longer here than processes need to start, they are done
    here as well.

    Args:
        work: Importable function that is called with each job and returns a small result.
        jobs: All jobs.
        processes: Largest number of processes.

    Raises:
        UserError: If a process was killed.
    """
    if not jobs:
        return
    started = time.monotonic()
    yield work(jobs[0])
    left = (time.monotonic() - started) * (len(jobs) - 1)
    few = processes <= 1 or left <= SECONDS_TO_START
    yield from run_jobs(work, jobs[1:], 1 if few else min(processes, len(jobs) - 1), None)


def follow_jobs(results: Iterable[R], doing: str, done: str, total: int, things: str = "cases") -> Iterator[R]:
    """Yield results and show progress: a bar on a terminal, otherwise a message from time to time.

    Args:
        results: Results in the order in which they finish.
        doing: Verb for the bar: "preprocessing".
        done: Participle for the messages: "preprocessed".
        total: Number of jobs.
        things: What the jobs are, in words.
    """
    with CaseProgress(doing, done, total, things) as progress:
        for result in results:
            progress.step()
            yield result


class CaseProgress:
    """Progress of work on cases: a bar on a terminal, otherwise a message from time to time and at the end.

    Args:
        doing: Verb for the bar: "preprocessing".
        done: Participle for the messages: "preprocessed".
        total: Number of cases.
        things: What is counted instead of cases, in words.
    """

    def __init__(self, doing: str, done: str, total: int, things: str = "cases") -> None:
        self.doing, self.done, self.total, self.things = doing, done, total, things
        self._number, self._last = 0, time.monotonic()
        self._begun = False
        self._bar: Any = None

    def __enter__(self) -> "CaseProgress":
        if sys.stderr.isatty() and prints():
            from tqdm import tqdm

            self._bar = tqdm(desc=self.doing, total=self.total, unit=f" {self.things}")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self) -> None:
        """Note that the next case begins, and count the one before it as done."""
        if self._begun:
            self.step()
        self._begun = True

    def end(self) -> None:
        """Count the last case that began as done."""
        if self._begun:
            self.step()
        self._begun = False

    def step(self) -> None:
        """Count one more case as done."""
        self._number += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._last >= SECONDS_PER_LINE or self._number == self.total:
            logger.info(f"{self.done} {self._number} of {self.total} {self.things}")
            self._last = time.monotonic()


def _start_process() -> None:
    """Set up a worker process: use one thread, leave Ctrl-C to the parent, and end when the parent ends."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
