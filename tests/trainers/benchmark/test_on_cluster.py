"""A study on a Dask cluster ends in the table of one process, also if a worker is killed in the middle."""

import os
import signal
import threading
from pathlib import Path

import pytest

from nnssl.cli.benchmark import main
from nnssl.data import cluster as cluster_module
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.log import lines_to
from tests.trainers.benchmark.test_run import COMMAND
from tests.trainers.benchmark.test_study import prepare
from tests.trainers.phantom_study import LABELLED
from tests.waiting import HUNG_S, wait_until
from trainers.benchmark import on_cluster
from trainers.benchmark.benchmark import _device_of_workers, benchmark
from trainers.benchmark.on_cluster import CellJob, Outcome
from trainers.benchmark.settings import StudySettings


def fill_all_but_the_second(job: CellJob) -> Outcome:
    if job.cell == job.study.cells[1]:
        return Outcome(job.key, job.name, 1.0, "case_3: cannot be read")
    job.log.with_name(f"{job.study.cells.index(job.cell)}.done").touch()
    return Outcome(job.key, job.name, 1.0)


def fail(job: CellJob) -> Outcome:
    raise RuntimeError("CUDA out of memory")


def die(job: CellJob) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.fixture
def threads(monkeypatch):
    """A cluster with two workers in this process."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster_module, "TIMEOUT_S", HUNG_S)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        yield cluster


def test_a_cell_that_cannot_be_filled_does_not_end_the_others(folders, threads, tmp_path):
    study = prepare(folders)
    jobs = [CellJob(study, cell, tmp_path / "log.txt") for cell in study.cells]
    said: list[str] = []
    done = []
    with lines_to(said.append), pytest.raises(UserError) as error:
        done += on_cluster._run(fill_all_but_the_second, jobs, study, threads.scheduler_address)
    name = jobs[1].name
    assert str(error.value) == f"{name}: case_3: cannot be read; the other jobs are done, run the command again"
    assert said == [f"{name}: case_3: cannot be read"]
    assert len(list(tmp_path.glob("*.done"))) == len(jobs) - 1


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (fail, "CUDA out of memory"),
        (die, "ended the process that worked on it by signal 9 (SIGKILL)"),
    ],
)
def test_any_end_of_a_job_is_told_once(folders, tmp_path, work, reason):
    study = prepare(folders)
    job = CellJob(study, study.cells[0], tmp_path / "log.txt")
    outcome = on_cluster._apart(work, job)
    assert (outcome.job, outcome.name, outcome.error) == (job.cell, job.name, reason)


def test_the_device_is_that_of_the_workers():
    assert str(_device_of_workers(None, gpus=True)) == "cuda"
    assert str(_device_of_workers(None, gpus=False)) == "cpu"
    assert str(_device_of_workers("cuda", gpus=False)) == "cuda"
    with pytest.raises(ArgumentError, match="device must be cpu, cuda or mps, got gpu"):
        _device_of_workers("gpu", gpus=True)


def test_workers_that_come_later_get_jobs(threads):
    """One worker holds its job until another one, which joins meanwhile, has begun its own."""
    threads.scale(1)
    wait_until(lambda: len(threads.scheduler.workers) == 1)
    MEETING.clear()

    def join() -> None:
        wait_until(lambda: bool(MEETING))
        threads.scale(2)

    joining = threading.Thread(target=join)
    joining.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module, "SECONDS_PER_LINE", 0.1)
        results = cluster_module.run_on_cluster(meet, range(3), threads.scheduler_address, jobs_per_thread=1)
        assert sorted(results) == [0, 1, 2]
    joining.join()


MEETING: set[int] = set()


def meet(job: int) -> int:
    """Wait until another job has begun too; the third does not wait."""
    MEETING.add(job)
    wait_until(lambda: len(MEETING) > 1)
    return job


def test_gpus_are_asked_for_where_workers_declare_them(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster_module, "TIMEOUT_S", HUNG_S)
    asked = []
    submit = distributed.Client.submit
    monkeypatch.setattr(
        distributed.Client,
        "submit",
        lambda client, *args, **options: asked.append(options["resources"]) or submit(client, *args, **options),
    )
    for resources, gpus in (({"GPU": 1}, 1), ({"GPU": 1}, 0), (None, 1)):
        with distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, resources=resources
        ) as cluster:
            assert list(cluster_module.run_on_cluster(str, [7], cluster.scheduler_address, gpus=gpus)) == ["7"]
    assert asked == [{"GPU": 1}, None, None]


def test_parts_and_a_cluster_exclude_each_other():
    settings = StudySettings(dataset=4, arms=("pix2rep",), labels=(1,), epochs=(1,))
    with pytest.raises(ArgumentError, match="part must not be given together with dask_address"):
        benchmark(settings, part="1/2", dask_address="tcp://127.0.0.1:9")


def test_a_missing_cluster_is_noticed_at_once(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster_module, "TIMEOUT_S", 1)
    settings = StudySettings(dataset=4, arms=("pix2rep",), labels=(1,), epochs=(1,))
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        benchmark(settings, dask_address="tcp://127.0.0.1:9")


@pytest.mark.nightly
@pytest.mark.figures
def test_a_study_with_a_killed_worker_is_that_of_one_process(phantoms, tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster_module, "TIMEOUT_S", HUNG_S)
    found = []
    for place in ("alone", "cluster"):
        results = tmp_path / place
        results.mkdir()
        folders = {"raw": phantoms / "raw", "preprocessed": phantoms / "preprocessed", "results": results}
        study = results / LABELLED / "nnssl_benchmark_study"
        with variables(NNSSL_PRECISION="float32", **{f"nnUNet_{name}": str(path) for name, path in folders.items()}):
            if place == "alone":
                assert main(COMMAND) == 0
            else:
                assert run_with_a_kill(distributed, study) == 0
        found.append(((study / "results.csv").read_text(), (study / "table.md").read_text()))
    assert found[0] == found[1]


def run_with_a_kill(distributed, study: Path) -> int:
    """Run the study on two workers, and kill one of them as soon as the first cell is being trained."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        killed = []

        def kill() -> None:
            wait_until(lambda: (study / "log.txt").exists())
            for worker in cluster.scheduler.workers.values():
                if worker.processing:
                    killed.append(
                        next(each.pid for each in cluster.workers.values() if each.worker_address == worker.address)
                    )
                    break
            os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        code = main([*COMMAND, "--dask", cluster.scheduler_address])
        killer.join()
    assert killed
    return code
