"""Jobs on a Dask cluster. What the death of a worker costs is the job that ended it, and no other.

Dask repeats the jobs of a dead worker on others. It blames all jobs that a dead worker held, those that only waited there too,
and gives up a job after four workers. Such a job is therefore repeated alone here before it is blamed.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
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
"""Interval between messages that say that a cluster has no workers."""


def check_cluster(address: str) -> None:
    """Check that a cluster answers and has workers, before work begins that only prepares its jobs.

    Args:
        address: Address of a Dask scheduler, such as ``tcp://host:8786``.

    Raises:
        UserError: If no scheduler answers, if it has no workers, or if Dask is not installed.
    """
    with _connect(address):
        pass


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
    with _connect(address) as (client, threads):
        again: list[J] = []
        needs = {GPU: gpus} if gpus and _declare_gpus(client) else None
        for job, result, error in _run(client, address, jobs_per_thread * threads, work, jobs, needs):
            if error is None:
                yield result
            else:
                logger.info(
                    f"{name_of(job)}: {error.allowed_failures + 1} Dask workers died; it is repeated alone at the end"
                )
                again.append(job)
        for job, result, error in _run(client, address, 1, work, again, needs):
            if error is None:
                yield result
                continue
            reason = f"ended {error.allowed_failures + 1} Dask workers, one after another (the last: {error.last_worker.address})"
            if lost is None:
                raise UserError(f"{name_of(job)}: {reason}; see their logs")
            yield lost(job, reason)


@contextmanager
def _connect(address: str) -> Iterator[tuple[Any, int]]:
    """Connect to a cluster and yield a client and the number of threads of all workers."""
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError("Dask is not installed; run pip install 'nnssl[dask]' or use local processes") from error
    try:
        client = Client(address, timeout=TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{address}: no Dask scheduler answers ({reason}); start one or check the address") from error
    with client:
        threads = sum(client.nthreads().values())
        if threads == 0:
            raise UserError(f"{address}: the Dask cluster has no workers; start some (dask worker {address})")
        yield client, threads


def _declare_gpus(client: Any) -> bool:
    """Return whether a worker of the cluster says how many GPUs it has."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(GPU in (worker.get("resources") or {}) for worker in workers)


def _run(
    client: Any,
    address: str,
    limit: int,
    work: Callable[[J], R],
    jobs: Iterable[J],
    needs: dict[str, int] | None = None,
) -> Iterator[tuple[J, Any, Any]]:
    """Keep at most ``limit`` jobs submitted; yield each with its result, or with the error that says that workers died."""
    from distributed import KilledWorker

    waiting: dict[Any, J] = {}
    left = iter(jobs)
    none = object()
    try:
        while True:
            while len(waiting) < limit and (job := next(left, none)) is not none:
                waiting[client.submit(work, job, pure=False, resources=needs)] = job  # type: ignore[assignment]
            if not waiting:
                return
            for future in _wait_for_some(client, address, waiting):
                job_done = waiting.pop(future)
                try:
                    result = future.result()
                except KilledWorker as error:  # also if the worker that held the result died
                    yield job_done, None, error
                else:
                    yield job_done, result, None
    except CancelledError as error:
        raise UserError(f"{address}: the Dask scheduler ended or lost its jobs; run the command again") from error
    finally:
        for future in waiting:
            future.cancel()


def _wait_for_some(client: Any, address: str, futures: Iterable[Any]) -> list[Any]:
    """Wait until some of the futures are done and return them; say meanwhile if the cluster has lost its workers."""
    from distributed import wait

    while True:
        try:
            with client.as_current():
                return list(wait(list(futures), timeout=SECONDS_PER_LINE, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if not client.nthreads():
                logger.info(f"{address}: the Dask cluster has no workers left; start some (dask worker {address})")
