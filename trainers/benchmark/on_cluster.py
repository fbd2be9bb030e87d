"""A study on a Dask cluster: pretrainings and cells are jobs, and this process only submits them and writes the report.

A job runs in a process of its own on the machine of a worker, because training handles signals and starts loaders. It recognises
finished work and resumes what was begun, as on one machine, so the job of a worker that died is repeated by another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class ArmJob:
    """The pretraining of an arm."""

    study: Study
    name: str


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
    def name(self) -> str:
        """What a message calls the cell."""
        own = self.cell
        return f"{own.arm}, {own.mode}, {own.labels} labelled, seed {own.seed}, {self.study.steps(own)} steps"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: The job.
        seconds: Time that it took.
        error: The error of the user that ended it; empty if it was done.
    """

    job: Any
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
        logger.info(f"Pretrained {outcome.job.name}, {outcome.seconds:.0f} s")


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
        logger.info(describe_cell(cells, outcome.job.cell, outcome.seconds, cells.study.cells))


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
            logger.info(f"{outcome.job.name}: {outcome.error}")
            errors.append(outcome)
        else:
            yield outcome
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(
            f"{errors[0].job.name}: {errors[0].error}{more}; the other jobs are done, run the command again"
        )


def _lost(job: Any, reason: str) -> Outcome:
    return Outcome(job, 0.0, reason)


def _apart(work: Callable[[J], None], job: J) -> Outcome:
    started = perf_counter()
    try:
        list(run_in_workers(work, [job], 1, end_with_parent, with_children=True))
    except UserError as error:
        return Outcome(job, perf_counter() - started, str(error))
    return Outcome(job, perf_counter() - started)


def _pretrain(job: ArmJob) -> None:
    source = job.study.source
    assert source is not None
    with use_folders(job.study.folders):
        make_weights(job.study.pretrainings[job.name], source)


def _fill(job: CellJob) -> None:
    with use_folders(job.study.folders):
        cells = StudyCells(job.study)
        if not cells.is_finished(job.cell):
            run_cell(cells, job.cell, job.log)
