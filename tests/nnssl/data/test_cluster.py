"""Jobs on a Dask cluster: what one process does, also if workers, the scheduler or cases die."""

import asyncio
import os
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl.data import cluster as module
from nnssl.data import preprocess
from nnssl.data.cluster import check_cluster
from nnssl.data.jobs import run_jobs
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from planners.plan_and_preprocess import plan_and_preprocess
from planners.settings import PlanSettings
from tests.nnssl.data.test_jobs import double, fail_at_three
from tests.nnssl.data.test_preprocess import NAME, make_phantom, write_image
from tests.waiting import HUNG_S, wait_until

PATIENT = {f"distributed.comm.timeouts.{name}": f"{HUNG_S}s" for name in ("connect", "tcp")}


@pytest.fixture
def distributed(monkeypatch):
    """Dask with timeouts that a busy machine does not reach."""
    distributed = pytest.importorskip("distributed")
    import dask

    monkeypatch.setattr(module, "TIMEOUT_S", HUNG_S)
    with dask.config.set(PATIENT):
        yield distributed


@pytest.fixture
def threads(distributed):
    """A cluster with one worker in this process."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def started():
    """A cluster with two workers, each a process that is started again when it dies; one death is enough to blame a job."""
    distributed = pytest.importorskip("distributed")
    import dask

    with (
        dask.config.set({**PATIENT, "distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        yield cluster


@pytest.fixture
def processes(distributed, started):
    """That cluster, with both of its workers."""
    wait_until(lambda: len(started.scheduler_info["workers"]) == 2)
    return started


def die(job: tuple[int, Path]) -> int:
    """Kill the process for job 2, and for job 4 the first time."""
    number, mark = job
    if number == 2 or (number == 4 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_cluster_does_the_same(threads):
    assert sorted(run_jobs(double, range(20), 1, threads.scheduler_address)) == list(range(0, 40, 2))
    with pytest.raises(UserError, match="three: is not wanted"):
        list(run_jobs(fail_at_three, range(20), 1, threads.scheduler_address))


def test_jobs_are_taken_as_they_are_needed(threads):
    taken = []

    def jobs():
        for job in range(30):
            taken.append(job)
            yield job

    results = run_jobs(double, jobs(), 1, threads.scheduler_address)
    most = max(len(taken) - done for done, _ in enumerate(results))
    assert len(taken) == 30
    assert most <= module.JOBS_PER_THREAD + 1


def test_only_the_job_that_ends_workers_is_lost(processes, tmp_path):
    said = []
    jobs = [(number, tmp_path / f"mark_{number}") for number in range(8)]
    with lines_to(said.append):
        results = list(run_jobs(die, jobs, 1, processes.scheduler_address, lambda job, reason: (job[0], reason)))
    lost = [result for result in results if isinstance(result, tuple)]
    assert sorted(result for result in results if not isinstance(result, tuple)) == [0, 1, 3, 4, 5, 6, 7]
    assert len(lost) == 1
    assert lost[0][0] == 2
    assert re.match(r"ended 1 Dask worker \(tcp://", lost[0][1])
    assert any(line.startswith("2: 1 Dask worker died; it is repeated alone") for line in said)
    with pytest.raises(UserError, match="^2: ended 1 Dask worker "):
        list(run_jobs(die, jobs[2:3], 1, processes.scheduler_address))


def test_a_scheduler_that_ends_is_said(distributed, tmp_path):
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        results = run_jobs(double, range(20), 1, address)
        assert next(results) in (0, 2)  # of the two jobs that wait first, either may be seen first
    with pytest.raises(UserError, match=f"^{address}: the Dask scheduler ended or lost its jobs; run the command"):
        list(results)


def test_a_cluster_without_workers_is_said(distributed):
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        pytest.raises(UserError, match="the Dask cluster has no workers"),
    ):
        check_cluster(cluster.scheduler_address)


@pytest.mark.parametrize(
    ("needs", "workers", "said_of"),
    [
        (None, {}, "no workers left"),
        ({"GPU": 1}, {"tcp://cpu": {"nthreads": 2, "resources": {}}}, "no workers with a GPU left"),
        (None, {"tcp://cpu": {"nthreads": 2, "resources": {}}}, ""),
        ({"GPU": 1}, {"tcp://gpu": {"nthreads": 1, "resources": {"GPU": 1}}}, ""),
    ],
)
def test_a_cluster_that_has_lost_its_workers_is_said(monkeypatch, needs, workers, said_of):
    """Workers may come back, so the command waits and says what it waits for."""
    distributed = pytest.importorskip("distributed")

    def wait(futures, timeout, return_when):
        raise asyncio.TimeoutError  # as Dask does, also before Python 3.11, where it is not the built-in one

    monkeypatch.setattr(distributed, "wait", wait)
    client = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": workers}, as_current=nullcontext)
    said = []
    with lines_to(said.append):
        assert module._Queue(client, "tcp://host:1", needs, 3).wait_for_some(["future"]) == []
    assert [said_of in line for line in said] == ([True] if said_of else [])


def test_a_wrong_address_is_said(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "TIMEOUT_S", 1)
    with pytest.raises(UserError, match="tcp://127.0.0.1:9: no Dask scheduler answers"):
        list(run_jobs(double, range(3), 1, "tcp://127.0.0.1:9"))


def test_a_missing_dask_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'nnssl\[dask\]'"):
        list(run_jobs(double, range(3), 1, "tcp://127.0.0.1:9"))


def make_raw(cases: int) -> Path:
    """Write a raw data set of phantoms and return the folder of its preprocessed cases."""
    folders = resolve_folders()
    images = folders.raw / NAME / "imagesTr"
    images.mkdir(parents=True)
    for number in range(cases):
        write_image(images / f"case{number:02d}_0000.nii.gz", make_phantom((9, 25, 31), number)[0], (2.5, 0.9, 1.0))
    return folders.preprocessed / NAME


def read_cases(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of cases and of the fingerprint."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and (path.parent != folder or "fingerprint" in path.name)
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def test_a_worker_that_is_killed_loses_no_case(processes, nnunet_folders, monkeypatch):
    """Fingerprint and cases are those of this process, though a worker is killed in the middle of preprocessing."""
    folder = make_raw(8)
    settings = PlanSettings(configurations=["2d"], preset="cpu", channel_names=["MRI"], processes=1)
    follow_jobs = preprocess.follow_jobs
    killed = []
    with lines_to(lambda line: None):
        plan_and_preprocess(501, settings)
        alone = read_cases(folder)
        shutil.rmtree(folder)

        def kill_one(results, *args):
            for result in follow_jobs(results, *args):
                if not killed:
                    killed.append(next(iter(processes.workers.values())).pid)
                    os.kill(killed[0], signal.SIGKILL)
                yield result

        monkeypatch.setattr(preprocess, "follow_jobs", kill_one)
        prepared = plan_and_preprocess(501, replace(settings, dask_address=processes.scheduler_address))
    assert killed
    assert prepared.report.done == 8
    assert not prepared.report.set_aside
    assert read_cases(folder) == alone


def test_a_wrong_cluster_is_noticed_before_any_case_is_read(nnunet_folders, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "TIMEOUT_S", 1)
    folder = make_raw(1)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        plan_and_preprocess(501, PlanSettings(preset="cpu", dask_address="tcp://127.0.0.1:9"))
    assert not folder.exists()
