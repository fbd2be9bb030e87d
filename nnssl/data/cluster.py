"""Jobs on a Dask cluster. If a job kills its worker, only that job is lost.

Dask repeats the jobs of a dead worker on others. It blames all jobs that a dead worker held, those that only waited there too,
and gives up a job after four workers. Such a job is therefore repeated alone here before it is blamed.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nnssl.data.worker_pool import name_of
from nnssl.errors import UserError
from nnssl.log import logger

J = TypeVar("J")
R = TypeVar("R")

JOBS_PER_THREAD = 2
"""Jobs submitted for each thread of a cluster: one that runs and one that waits."""

GPU = "GPU"
"""Name of the resource that workers declare."""

TIMEOUT_S = 30
"""Time in which a scheduler must answer."""

SECONDS_PER_LINE = 60.0
"""Interval at which workers are counted again, and a message says if there are none."""


TIMEOUTS = (TimeoutError, asyncio.TimeoutError)
"""Errors by which Dask says that time has run out; the two are one since Python 3.11."""


def check_cluster(address: str) -> bool:
    """Check that a cluster answers and has workers, before work begins that only prepares its jobs.

    Args:
        address: Address of a Dask scheduler, such as ``tcp://host:8786``.

    Returns:
        Whether a worker declares GPUs (``dask worker --resources GPU=1``).

    Raises:
        UserError: If no scheduler answers, if it has no workers, or if Dask is not installed.
    """
    with _connect(address) as client:
        return _threads(client, {GPU: 1}) > 0


def run_on_cluster(
    work: Callable[[J], R],
    jobs: Iterable[J],
    address: str,
    lost: Callable[[J, str], R] | None = None,
    jobs_per_thread: int = JOBS_PER_THREAD,
    gpus: int = 0,
) -> Iterator[R]:
    """Yield the results of jobs in the order in which the workers of a Dask cluster finish them.

    Args:
        work: Importable function that is called with each job and returns a small result.
        jobs: Jobs, consumed as they are needed.
        address: Address of a Dask scheduler, such as ``tcp://host:8786``. Its workers must have nnssl installed, see the same
            folders, and run one thread each.
        lost: Returns the result of a job that ended several workers, from the job and that reason; None if such a job ends all.
        jobs_per_thread: Jobs submitted for each thread: 1 for few and long jobs.
        gpus: Number of GPUs that a job needs. Where workers declare theirs (``dask worker --resources GPU=1``), jobs wait for
            them; otherwise each thread of a worker is taken to have what a job needs.

    Raises:
        UserError: If no cluster answers, if the scheduler ends, if a job ended several workers and ``lost`` is None, or if Dask
            is not installed.
        Exception: If ``work`` raises an exception; jobs that have not started are then dropped.
    """
    with _connect(address) as client:
        needs = {GPU: gpus} if gpus and _threads(client, {GPU: gpus}) else None
        queue = _Queue(client, address, needs, _threads(client, needs))
        again: list[J] = []
        for job, result, error in queue.run(work, jobs, jobs_per_thread):
            if error is None:
                yield result
            else:
                logger.info(f"{name_of(job)}: {_workers(error)} died; it is repeated alone at the end")
                again.append(job)
        for job, result, error in queue.run(work, again, None):
            if error is None:
                yield result
                continue
            reason = f"ended {_workers(error)}, one after another (the last: {error.last_worker.address})"
            if error.allowed_failures == 0:
                reason = f"ended {_workers(error)} ({error.last_worker.address})"
            if lost is None:
                raise UserError(f"{name_of(job)}: {reason}; see their logs")
            yield lost(job, reason)


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Connect to a cluster with workers and yield a client."""
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError("Dask is not installed; run pip install 'nnssl[dask]' or use local processes") from error
    try:
        client = Client(address, timeout=TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, *TIMEOUTS) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{address}: no Dask scheduler answers ({reason}); start one or check the address") from error
    with client:
        if not _threads(client, None):
            raise UserError(f"{address}: the Dask cluster has no workers; start some (dask worker {address})")
        yield client


def _workers(error: Any) -> str:
    """Return how many workers died, in words."""
    count = error.allowed_failures + 1
    return f"{count} Dask worker{'s' if count > 1 else ''}"


def _threads(client: Any, needs: dict[str, int] | None) -> int:
    """Return the number of threads of the workers that have what a job needs."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    fitting = [
        worker
        for worker in workers
        if all((worker.get("resources") or {}).get(name, 0) >= n for name, n in (needs or {}).items())
    ]
    return sum(worker["nthreads"] for worker in fitting)


@dataclass
class _Queue:
    """Submits jobs to a cluster, a few at a time.

    Attributes:
        client: Client of the cluster.
        address: Address of its scheduler.
        needs: Resources that a job needs; None for none.
        threads: Number of threads of the workers that have them, as last counted.
        counted: When they were counted.
    """

    client: Any
    address: str
    needs: dict[str, int] | None
    threads: int
    counted: float = field(default_factory=time.monotonic)

    def run(
        self, work: Callable[[J], R], jobs: Iterable[J], jobs_per_thread: int | None
    ) -> Iterator[tuple[J, Any, Any]]:
        """Yield each job with its result, or with the error that says that workers died.

        Args:
            work: Function that is called with each job.
            jobs: Jobs, consumed as they are needed.
            jobs_per_thread: Number of jobs to keep submitted for each thread of the workers that there are at the time; None for
                one job at a time.
        """
        from distributed import KilledWorker

        waiting: dict[Any, J] = {}
        left = iter(jobs)
        none: Any = object()
        try:
            while True:
                if time.monotonic() - self.counted >= SECONDS_PER_LINE:
                    self.count()
                limit = 1 if jobs_per_thread is None else max(1, jobs_per_thread * self.threads)
                while len(waiting) < limit and (job := next(left, none)) is not none:
                    waiting[self.client.submit(work, job, pure=False, resources=self.needs)] = job
                if not waiting:
                    return
                for future in self.wait_for_some(waiting):
                    job_done = waiting.pop(future)
                    try:
                        result = future.result()
                    except KilledWorker as error:  # also if the worker that held the result died
                        yield job_done, None, error
                    else:
                        yield job_done, result, None
        except CancelledError as error:
            raise UserError(
                f"{self.address}: the Dask scheduler ended or lost its jobs; run the command again"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def wait_for_some(self, futures: Iterable[Any]) -> list[Any]:
        """Wait until some of the futures are done and return them; return none after a while, as workers may have come.

        If no worker is left, a message says so.
        """
        from distributed import wait

        try:
            with self.client.as_current():
                return list(wait(list(futures), timeout=SECONDS_PER_LINE, return_when="FIRST_COMPLETED").done)
        except TIMEOUTS:
            self.count()
            if not self.threads:
                what = "with a GPU " if self.needs else ""
                logger.info(
                    f"{self.address}: the Dask cluster has no workers {what}left; start some (dask worker {self.address})"
                )
            return []

    def count(self) -> None:
        """Count the threads again, since workers come and go."""
        self.threads, self.counted = _threads(self.client, self.needs), time.monotonic()
