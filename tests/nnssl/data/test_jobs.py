import os
import signal
import sys

import pytest

from nnssl.data.jobs import run_jobs
from nnssl.errors import UserError
from tests.waiting import HUNG_S


def double(job):
    return job * 2


def fail_at_three(job):
    if job == 3:
        raise UserError("three: is not wanted")
    return job


def die_at_three(job):
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_job_is_done_once(processes):
    assert sorted(run_jobs(double, range(20), processes, None)) == list(range(0, 40, 2))


def test_jobs_are_taken_as_they_are_needed():
    taken = []

    def jobs():
        for job in range(30):
            taken.append(job)
            yield job

    most = max(len(taken) - done for done, _ in enumerate(run_jobs(double, jobs(), 2, None)))
    assert len(taken) == 30
    assert most <= 4


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_job_comes_through(processes):
    with pytest.raises(UserError, match="three: is not wanted"):
        list(run_jobs(fail_at_three, range(1000), processes, None))


def test_a_killed_process_gives_one_error_that_names_job_and_signal():
    with pytest.raises(
        UserError, match=r"^3: the process that worked on it ended by signal 9 \(SIGKILL\); run the command"
    ):
        list(run_jobs(die_at_three, range(10), 2, None))


@pytest.fixture
def distributed(monkeypatch):
    """Dask with timeouts that a busy machine does not reach."""
    module = pytest.importorskip("distributed")
    import dask

    monkeypatch.setattr("nnssl.data.jobs.DASK_TIMEOUT_S", HUNG_S)
    timeouts = {f"distributed.comm.timeouts.{name}": f"{HUNG_S}s" for name in ("connect", "tcp")}
    with dask.config.set(timeouts):
        yield module


def test_a_dask_cluster_does_the_same(distributed):
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        assert sorted(run_jobs(double, range(20), 1, cluster.scheduler_address)) == list(range(0, 40, 2))
        with pytest.raises(UserError, match="three: is not wanted"):
            list(run_jobs(fail_at_three, range(20), 1, cluster.scheduler_address))


def test_a_cluster_without_workers_is_said(distributed):
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        pytest.raises(UserError, match="the Dask cluster has no workers"),
    ):
        list(run_jobs(double, range(3), 1, cluster.scheduler_address))


def test_a_wrong_address_is_said(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("nnssl.data.jobs.DASK_TIMEOUT_S", 1)
    with pytest.raises(UserError, match="tcp://127.0.0.1:9: no Dask scheduler answers"):
        list(run_jobs(double, range(3), 1, "tcp://127.0.0.1:9"))


def test_a_missing_dask_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'nnssl\[dask\]'"):
        list(run_jobs(double, range(3), 1, "tcp://127.0.0.1:9"))
