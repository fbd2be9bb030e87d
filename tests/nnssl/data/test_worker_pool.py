"""A worker that dies costs its own job; its signal is named, and memory only where there is evidence."""

import ctypes
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from nnssl.data import memory_record
from nnssl.data.jobs import run_jobs
from nnssl.data.memory_record import MemoryRecord, memory_bytes, out_of_memory_kills, peak_of_children_bytes
from nnssl.data.worker_pool import Death, name_of
from nnssl.errors import UserError
from nnssl.log import lines_to


def die(job, by, at, folder):
    """End this process at some jobs; note every start."""
    with open(folder / f"{job}", "a") as file:
        file.write("x")
    if job in at:
        if by == "abort":
            ctypes.CDLL(None).abort()
        elif by == "exit":
            os._exit(3)
        os.kill(os.getpid(), by)
    return str(job)


def die_if_not_alone(job, folder):
    """Be killed as by the kernel, unless the other job has finished."""
    if job == 1 and not (folder / "done").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 2:
        time.sleep(0.5)
        (folder / "done").touch()
    return str(job)


def note(job, reason):
    return f"{job} {reason}"


@pytest.mark.parametrize(
    ("by", "how", "times"),
    [
        (signal.SIGKILL, "signal 9 (SIGKILL)", 2),
        (signal.SIGSEGV, "signal 11 (SIGSEGV)", 1),
        (signal.SIGBUS, f"signal {signal.SIGBUS.value} (SIGBUS)", 1),
        ("abort", "signal 6 (SIGABRT)", 1),
        ("exit", "exit code 3", 1),
    ],
)
def test_only_the_job_that_ends_its_worker_is_lost(by, how, times, tmp_path):
    work = partial(die, by=by, at=(3, 7), folder=tmp_path)
    said = []
    with lines_to(said.append):
        found = sorted(run_jobs(work, range(12), 2, None, note))
    assert found == sorted(
        [
            *(str(job) for job in range(12) if job not in (3, 7)),
            *(f"{job} ended the process that worked on it by {how}" for job in (3, 7)),
        ]
    )
    starts = {int(path.name): len(path.read_text()) for path in tmp_path.iterdir()}
    assert starts == {job: times if job in (3, 7) else 1 for job in range(12)}
    assert len(said) == (2 if times == 2 else 0)
    assert multiprocessing.active_children() == []


def test_a_job_that_was_killed_is_repeated_alone(tmp_path):
    said = []
    with lines_to(said.append):
        found = sorted(run_jobs(partial(die_if_not_alone, folder=tmp_path), [1, 2], 2, None, note))
    assert found == ["1", "2"]
    assert said == ["1: the process that worked on it ended by signal 9 (SIGKILL); it is repeated alone at the end"]


def fail_with_cause(job):
    raise UserError(f"{job}: wrong")


def test_errors_of_jobs_are_those_of_the_worker_and_leave_no_process():
    with pytest.raises(UserError) as error:
        list(run_jobs(fail_with_cause, [0], 2, None))
    assert str(error.value) == "0: wrong"
    if hasattr(error.value, "__notes__"):
        assert "fail_with_cause" in error.value.__notes__[0]
    assert multiprocessing.active_children() == []


def sleep(job):
    time.sleep(job)
    return job


def test_leaving_early_ends_the_workers():
    results = run_jobs(sleep, [0, 60, 60], 2, None)
    assert next(results) == 0
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 30
    assert multiprocessing.active_children() == []


@dataclass(frozen=True)
class Case:
    name: str


@dataclass(frozen=True)
class Holder:
    case: Case


def test_jobs_are_named_after_their_case():
    assert name_of(Case("a")) == "a"
    assert name_of(Holder(Case("b"))) == "b"
    assert name_of(("c", 1)) == "c"
    assert name_of(Path("/folder/d")) == "d"
    assert name_of(3.5) == "a float"


# evidence of a lack of memory


def test_the_kernels_record_is_evidence_and_nothing_else_is(tmp_path, monkeypatch):
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 9\n")
    monkeypatch.setattr(memory_record, "_group_files", lambda *names: [tmp_path / "none", events])
    record = MemoryRecord()
    assert record.lack_of_memory(2) == ""
    events.write_text("oom 4\noom_kill 3\n")
    assert record.lack_of_memory(2) == "memory ran out according to the kernel's record"
    assert record.lack_of_memory(2) == ""
    events.unlink()
    assert out_of_memory_kills() == memory_record.out_of_memory_kills()  # /proc/vmstat, or None
    death = Death(-9, "memory ran out according to the kernel's record")
    assert (
        str(death) == "signal 9 (SIGKILL), because memory ran out according to the kernel's record; use fewer processes"
    )
    assert str(Death(-11)) == "signal 11 (SIGSEGV)"


def test_a_peak_near_the_limit_is_evidence(monkeypatch):
    monkeypatch.setattr(memory_record, "out_of_memory_kills", lambda: None)
    monkeypatch.setattr(memory_record, "memory_bytes", lambda: 16_000_000_000)
    peaks = iter([1_000_000_000, 5_000_000_000, 5_000_000_000, 7_500_000_000])
    monkeypatch.setattr(memory_record, "peak_of_children_bytes", lambda: next(peaks))
    record = MemoryRecord()
    assert record.lack_of_memory(2) == ""  # 10 of 16 GB
    assert record.lack_of_memory(4) == ""  # the peak was that of an earlier process
    assert record.lack_of_memory(2) == "2 processes with its peak of 7.5 GB fill the memory of 16.0 GB"


@pytest.mark.parametrize(
    ("groups", "file", "content", "limit"),
    [
        ("0::/box\n", "box/memory.max", "2000000000\n", 2_000_000_000),
        ("0::/box\n", "box/memory.max", "max\n", None),
        ("4:cpu,memory:/box\n0::/\n", "memory/box/memory.limit_in_bytes", "3000000000\n", 3_000_000_000),
        ("4:memory:/elsewhere\n", "memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_limits_of_control_groups_are_found(groups, file, content, limit, tmp_path, monkeypatch):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    monkeypatch.setattr(memory_record, "GROUPS", tmp_path)
    real = memory_record._text_of
    cgroup = Path("/proc/self/cgroup")
    monkeypatch.setattr(memory_record, "_text_of", lambda path: groups if path == cgroup else real(path))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes() == (limit or pytest.approx(installed, rel=1e-3))
    assert peak_of_children_bytes() >= 0
