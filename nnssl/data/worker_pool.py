"""Worker processes for jobs on many cases. The death of a worker costs the job it worked on, and no other.

``concurrent.futures`` drops all jobs if one worker dies, and does not say which job it was.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from nnssl.data.case_error import ended_process
from nnssl.data.memory_record import MemoryRecord
from nnssl.errors import UserError
from nnssl.interrupts import interrupts_blocked
from nnssl.log import logger

J = TypeVar("J")
R = TypeVar("R")

READY, BEGUN, RESULT, ERROR = "ready", "begun", "result", "error"
SECONDS_TO_END = 5.0
_STARTING = threading.Lock()


@dataclass(frozen=True)
class Death:
    """How a worker ended that did not return a result.

    Attributes:
        exit_code: As ``multiprocessing`` gives it: the negative number of a signal, or the value that was given to ``exit``.
        lack_of_memory: What shows that memory ran out; empty if nothing does.
    """

    exit_code: int
    lack_of_memory: str = ""

    @property
    def killed(self) -> bool:
        """Whether the worker was killed from outside, as it is where memory runs out."""
        return self.exit_code == -signal.SIGKILL

    def __str__(self) -> str:
        how = f"exit code {self.exit_code}"
        if self.exit_code < 0:
            name = next((each.name for each in signal.Signals if each == -self.exit_code), "unknown")
            how = f"signal {-self.exit_code} ({name})"
        return f"{how}, because {self.lack_of_memory}; use fewer processes" if self.lack_of_memory else how


@dataclass
class _Worker(Generic[J]):
    """A worker process and the job that it works on."""

    process: Any
    connection: Any
    job: J
    is_ready: bool = False
    """Whether the process has started."""
    has_begun: bool = False
    """Whether the process has received its job, so that its end is the job's doing."""


@dataclass
class _Pool(Generic[J, R]):
    """The workers that run, and the jobs that were lost to a kill and are repeated alone."""

    work: Callable[[J], R]
    start: Callable[[], None]
    lost: Callable[[J, str], R] | None
    record: MemoryRecord
    with_children: bool = False
    workers: list[_Worker[J]] = field(default_factory=list)
    again: list[J] = field(default_factory=list)
    was_ready: bool = False
    """Whether any worker has started, so that starting is possible."""

    def begin(self, job: J) -> None:
        """Start a worker with its first job."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.work, self.start, theirs), daemon=not self.with_children)
        with interrupts_blocked(), _may_start_processes():
            process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours, job))
        with contextlib.suppress(OSError):  # a worker that is dead already is found when it is waited for
            ours.send(job)

    def end(self, worker: _Worker[J]) -> None:
        """End a worker that has no further job."""
        self.workers.remove(worker)
        worker.connection.close()
        worker.process.join(SECONDS_TO_END)

    def receive(self, alone: bool) -> Iterator[tuple[_Worker[J] | None, R]]:
        """Wait for workers and yield their results, each with the worker that can take another job; None if it is dead."""
        by_connection = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                yield from self._bury(worker, alone)
                continue
            if kind == READY:
                worker.is_ready = self.was_ready = True
            elif kind == BEGUN:
                worker.has_begun = True
            elif kind == ERROR:
                raise value
            else:
                yield worker, value

    def _bury(self, worker: _Worker[J], alone: bool) -> Iterator[tuple[None, R]]:
        """Take a dead worker out, and yield what is returned for its job unless that is repeated alone."""
        self.workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        code = worker.process.exitcode
        # only a kill from outside is what the system does where memory runs out
        evidence = self.record.lack_of_memory(len(self.workers) + 1) if code == -signal.SIGKILL else ""
        death = Death(code, evidence)
        name = name_of(worker.job)
        if not worker.is_ready and not (death.killed and self.was_ready and not alone):
            raise UserError(
                f"a worker process could not start (it ended by {death}); a script that starts processes needs "
                'if __name__ == "__main__"'
            )
        if not worker.has_begun and not alone:
            logger.info(f"a process ended by {death} before it began {name}, which is done at the end")
            self.again.append(worker.job)
        elif death.killed and not alone:
            logger.info(f"{name}: the process that worked on it ended by {death}; it is repeated alone at the end")
            self.again.append(worker.job)
        elif self.lost is None:
            raise UserError(f"{name}: the process that worked on it ended by {death}; run the command again")
        else:
            yield None, self.lost(worker.job, ended_process(str(death)))

    def close(self) -> None:
        """End all workers at once."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()


def run_in_workers(
    work: Callable[[J], R],
    jobs: Iterable[J],
    processes: int,
    start: Callable[[], None],
    lost: Callable[[J, str], R] | None = None,
    with_children: bool = False,
) -> Iterator[R]:
    """Yield the results of jobs in the order in which worker processes finish them.

    A worker that dies is replaced. A job whose worker was killed from outside is repeated at the end, when no other worker
    needs memory.

    Args:
        work: Importable function that is called with each job and returns a small result.
        jobs: Jobs, consumed as they are needed.
        processes: Number of workers, at least 1.
        start: Importable function that sets up a worker.
        lost: Returns the result of a job that ended its worker, from the job and that reason; None if such a job ends all.
        with_children: Whether workers start processes themselves; ``start`` should then call ``end_with_parent``.

    Raises:
        UserError: If no worker can start, or if a job ended its worker and ``lost`` is None.
        Exception: If ``work`` raises an exception; jobs that have not started are then dropped.
    """
    pool: _Pool[J, R] = _Pool(work, start, lost, MemoryRecord(), with_children)
    try:
        yield from _run(pool, iter(jobs), processes, alone=processes == 1)
        again, pool.again = pool.again, []
        yield from _run(pool, iter(again), 1, alone=True)
    finally:
        pool.close()


def end_with_parent() -> None:
    """Have this worker process end when its parent ends, even if that is killed."""
    parent: Any = multiprocessing.parent_process()

    def wait_for_parent() -> None:
        # otherwise a worker whose parent was killed would wait for jobs forever, after finishing one that a new run repeats
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


@contextlib.contextmanager
def _may_start_processes() -> Iterator[None]:
    """Let a daemonic process, as workers of Dask are, start processes inside a ``with`` block; Python refuses this to them."""
    settings: Any = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    with _STARTING:
        before = settings.pop("daemon", None)
        try:
            yield
        finally:
            if before is not None:
                settings["daemon"] = before


def _run(pool: _Pool[J, R], jobs: Iterator[J], processes: int, alone: bool) -> Iterator[R]:
    """Keep a number of workers busy until there are no more jobs, and yield the results."""
    none = object()
    more = True
    while more or pool.workers:
        while more and len(pool.workers) < processes:
            job: Any = next(jobs, none)
            more = job is not none
            if more:
                pool.begin(job)
        for worker, result in pool.receive(alone) if pool.workers else ():
            job = next(jobs, none) if worker is not None and more else none
            if worker is not None and job is none:
                more = False
                pool.end(worker)
            elif worker is not None:
                worker.job, worker.has_begun = job, False
                with contextlib.suppress(OSError):
                    worker.connection.send(job)
            yield result


def _serve(work: Callable[[J], R], start: Callable[[], None], connection: Any) -> None:
    """Do jobs until the other side closes the connection."""
    start()
    connection.send((READY, None))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send((BEGUN, None))
        try:
            answer: tuple[str, Any] = (RESULT, work(job))
        except Exception as error:
            answer = (ERROR, _portable(error))
        connection.send(answer)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process, with the traceback of this one."""
    if hasattr(error, "add_note"):  # since Python 3.11
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  made here
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def name_of(job: Any) -> str:
    """Return the name of what a job works on: the ``name`` or ``case`` of it or of its part, or the first of several values."""
    for name in ("name", "case", "file"):
        if hasattr(job, name):
            return name_of(getattr(job, name))
    if isinstance(job, tuple) and job:
        return name_of(job[0])
    return str(job) if isinstance(job, (str, int, Path)) else f"a {type(job).__name__}"
