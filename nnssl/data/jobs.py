"""Jobs on many cases at once: in this process, in processes of this machine, or on a Dask cluster.

Only a few jobs are under way at a time and results come as they are ready, so memory does not grow with their number.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from nnssl.errors import UserError
from nnssl.log import logger

J = TypeVar("J")
R = TypeVar("R")

JOBS_PER_PROCESS = 2
"""Jobs under way for each process: one that runs and one that waits."""

MOST_PROCESSES = 8
"""More than these are used only if the user says so: memory ends before cores do."""

DASK_TIMEOUT_S = 30

SECONDS_PER_LINE = 30.0
"""How often progress is said where there is no terminal."""


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """Return how many processes to use where the user does not say: one for each core, up to ``MOST_PROCESSES``."""
    return min(MOST_PROCESSES, usable_cores())


def run_jobs(work: Callable[[J], R], jobs: Iterable[J], processes: int, dask_address: str | None) -> Iterator[R]:
    """Yield the result of each job, in the order in which they are ready.

    Args:
        work: what to do with a job; an importable function that returns something small.
        jobs: the jobs, taken as they are needed.
        processes: processes of this machine; up to 1 runs in this process.
        dask_address: of a Dask scheduler, such as ``tcp://host:8786``, instead of ``processes``; its workers must have
            nnssl installed, see the same folders, and run one thread each.

    Raises:
        UserError: a process was killed; no such cluster; or Dask is not installed.
        Exception: whatever ``work`` raises; jobs that have not begun are dropped.
    """
    if dask_address is not None:
        with _open_cluster(dask_address) as (executor, limit):
            yield from _run_some_at_a_time(executor, limit, work, jobs)
    elif processes <= 1:
        yield from map(work, jobs)
    else:
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_process)
        try:
            yield from _run_some_at_a_time(executor, JOBS_PER_PROCESS * processes, work, jobs)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {processes} processes was killed, most likely for want of memory; use fewer processes"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


def follow_jobs(results: Iterable[R], doing: str, done: str, total: int) -> Iterator[R]:
    """Pass results on and show how far the jobs are: a bar on a terminal, else a line now and then.

    Args:
        results: as they are ready.
        doing: what the jobs do, for the bar: "preprocessing".
        done: what has become of the finished ones, for the lines: "preprocessed".
        total: number of jobs; each is a case.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(results, doing, total, unit="case")
        return
    last = time.monotonic()
    for number, result in enumerate(results, start=1):
        if time.monotonic() - last >= SECONDS_PER_LINE or number == total:
            logger.info(f"{done} {number} of {total} cases")
            last = time.monotonic()
        yield result


def _run_some_at_a_time(executor: Executor, limit: int, work: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
    """Keep at most ``limit`` jobs with an executor and yield results as they are ready."""
    waiting: set[Future[R]] = set()
    for job in jobs:
        waiting.add(executor.submit(work, job))
        if len(waiting) >= limit:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    while waiting:
        ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in ready)


def _start_process() -> None:
    """Prepare a worker process: one thread, Ctrl-C left to the parent, and no life after the parent's."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # a worker whose parent was killed would wait for jobs for ever, and finish one that a new run does again
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _open_cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """Connect to a Dask cluster and give an executor and how many jobs to keep with it."""
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise UserError("Dask is not installed: pip install 'nnssl[dask]', or leave the cluster out") from error
    try:
        client = Client(address, timeout=DASK_TIMEOUT_S)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{address}: no Dask scheduler answers ({reason}); start one or mend the address") from error
    with client:
        threads = sum(client.nthreads().values())
        if threads == 0:
            raise UserError(f"{address}: the Dask cluster has no workers; start some (dask worker {address})")
        executor = client.get_executor(pure=False)
        try:
            yield executor, JOBS_PER_PROCESS * threads
        except KilledWorker as error:
            raise UserError(
                f"{address}: workers of the Dask cluster were killed, most likely for want of memory; "
                "run fewer on each machine"
            ) from error
        finally:
            executor.shutdown(wait=False)
