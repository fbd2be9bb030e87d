"""A study on a Dask cluster: pretrainings and cells are jobs of the workers.

This process prepares the cases, submits the jobs, and writes the report. A job runs in a process of its own on the machine of a
worker, because training handles signals and starts loaders. It recognises finished work and resumes what was begun, as on one
machine, so the job of a worker that died is repeated by another one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from nnssl.data.case_error import describe
from nnssl.data.cluster import run_on_cluster
from nnssl.data.worker_pool import end_with_parent, run_in_workers
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.paths import use_folders
from trainers.benchmark.arms import make_weights
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.run import describe_cell, run_cell
from trainers.benchmark.study import CellKey, Study

J = TypeVar("J")

SECONDS_TO_SEE = 120
"""Longest time in which a file that another machine wrote should appear."""


@dataclass(frozen=True)
class ArmJob:
    """The pretraining of an arm.

    Attributes:
        study: The study.
        name: Name of the arm.
    """

    study: Study
    name: str

    @property
    def key(self) -> str:
        """What the job is for."""
        return self.name


@dataclass(frozen=True)
class CellJob:
    """The fine-tuning of a cell.

    Attributes:
        study: The study.
        cell: Cell to fill.
        log: File that the messages of fine-tuning are appended to.
    """

    study: Study
    cell: CellKey
    log: Path

    @property
    def key(self) -> CellKey:
        """What the job is for."""
        return self.cell

    @property
    def name(self) -> str:
        """What a message calls the cell."""
        own = self.cell
        return f"{own.arm}, {own.mode}, {own.labels} labelled, seed {own.seed}, {self.study.steps(own)} steps"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: Name of an arm, or a cell.
        name: What a message calls it.
        seconds: Time that it took.
        error: What ended it; empty if it was done.
    """

    job: Any
    name: str
    seconds: float
    error: str = ""


def pretrain_on_cluster(study: Study, address: str) -> None:
    """Pretrain all arms of a study that have no weights yet.

    Args:
        study: The study.
        address: Address of a Dask scheduler.

    Raises:
        UserError: If an arm could not be pretrained, or the cluster cannot be used.
    """
    jobs = [ArmJob(study, arm) for arm, each in study.pretrainings.items() if not each.finished]
    for outcome in _run(pretrain_arm, jobs, study, address):
        logger.info(f"Pretrained {outcome.name}, {outcome.seconds:.0f} s")


def fill_on_cluster(cells: StudyCells, log: Path, address: str) -> None:
    """Fill all unfinished cells of a study.

    Args:
        cells: Cells of the study.
        log: File that the messages of fine-tuning are appended to.
        address: Address of a Dask scheduler.

    Raises:
        UserError: If a cell could not be filled, once the others are, or if the cluster cannot be used.
    """
    study = replace(cells.study, processes=1)
    jobs = [CellJob(study, cell, log) for cell in cells.study.cells if not cells.is_finished(cell)]
    for outcome in _run(fill_cell, jobs, study, address):
        _wait_until_seen(cells, outcome.job)
        logger.info(describe_cell(cells, outcome.job, outcome.seconds, cells.study.cells, with_rest=False))


def pretrain_arm(job: ArmJob) -> Outcome:
    """Pretrain an arm, in a process of its own."""
    return _apart(_pretrain, job)


def fill_cell(job: CellJob) -> Outcome:
    """Fill a cell, in a process of its own."""
    return _apart(_fill, job)


def _run(work: Callable[[J], Outcome], jobs: Sequence[J], study: Study, address: str) -> Any:
    """Yield the outcomes of the jobs that were done; raise the errors of the others at the end."""
    errors = []
    gpus = int(study.device.type == "cuda")
    outcomes = run_on_cluster(work, jobs, address, _lost, jobs_per_thread=1, gpus=gpus) if jobs else ()
    for outcome in outcomes:
        if outcome.error:
            logger.info(f"{outcome.name}: {outcome.error}")
            errors.append(outcome)
        else:
            yield outcome
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0].name}: {errors[0].error}{more}; the other jobs are done, run the command again")


def _lost(job: Any, reason: str) -> Outcome:
    return Outcome(job.key, job.name, 0.0, reason)


def _apart(work: Callable[[Any], Outcome], job: Any) -> Outcome:
    """Do a job in another process of this machine; an error of any kind is told and does not end the other jobs."""
    try:
        (outcome,) = run_in_workers(work, [job], 1, end_with_parent, _lost, with_children=True)
    except UserError as error:
        return _lost(job, str(error))
    except Exception as error:
        logger.exception(f"{job.name}: failed")  # in the output of the worker
        return _lost(job, describe(error))
    return outcome


def _wait_until_seen(cells: StudyCells, cell: CellKey) -> None:
    """Wait until this machine sees the files of another one; network file systems remember for a while that they were missing."""
    for _ in range(SECONDS_TO_SEE):
        if cells.is_finished(cell):
            return
        time.sleep(1)


def _pretrain(job: ArmJob) -> Outcome:
    source, started = job.study.source, perf_counter()
    assert source is not None
    with use_folders(job.study.folders):
        make_weights(job.study.pretrainings[job.name], source)
    return Outcome(job.key, job.name, perf_counter() - started)


def _fill(job: CellJob) -> Outcome:
    started = perf_counter()
    with use_folders(job.study.folders):
        cells = StudyCells(job.study)
        if not cells.is_finished(job.cell):
            run_cell(cells, job.cell, job.log)
    return Outcome(job.key, job.name, perf_counter() - started)
