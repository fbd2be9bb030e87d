"""Locks on folders: one process at a time, also after processes that were killed, on this machine and on others."""

import errno
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nnssl import locks
from nnssl.errors import ArgumentError, UserError
from nnssl.locks import Owner, lock_of, only_process
from nnssl.log import lines_to
from tests.holding import held_elsewhere, waits_for
from tests.waiting import HUNG_S, wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="the start of a process is read from /proc")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(locks, "POLL_S", 0.01)
    return tmp_path / "results"


def enter(folder: Path, **options) -> list[str]:
    """Take the lock and release it; return what was said."""
    said: list[str] = []
    with lines_to(said.append), only_process(folder, "testing", **options):
        holder = locks._read(lock_of(folder))
        assert holder is not None
        assert (holder.process, holder.host) == (os.getpid(), socket.gethostname())
    assert not list(folder.parent.iterdir())
    return said


def leave_lock(folder: Path, age_s: float = 0.0, **changes) -> Owner:
    """Write the lock of another process."""
    owner = replace(locks._this_process("training"), token="other", **changes)
    lock_of(folder).write_text(json.dumps(asdict(owner)))
    renewed = lock_of(folder).stat().st_mtime - age_s
    os.utime(lock_of(folder), (renewed, renewed))
    return owner


def test_a_second_process_waits_and_names_the_first(folder):
    _, said = waits_for(folder, lambda: enter(folder))
    assert f"on {socket.gethostname()} (" in said[0]
    assert "holding, since " in said[0]
    assert said[0].endswith(f"which works on {folder}; if it does not run any more, delete {lock_of(folder)}")


def test_a_second_process_that_is_not_to_wait_stops_with_one_line(folder):
    with (
        held_elsewhere(folder) as process,
        pytest.raises(ArgumentError, match=f"process {process.pid} on .* works there"),
    ):
        enter(folder, wait=False)


def test_the_lock_of_a_killed_process_is_taken_over(folder):
    with held_elsewhere(folder) as process:
        process.kill()
        process.wait()
        assert lock_of(folder).exists()
        assert enter(folder, wait=False)[0].startswith(f"Taking over from process {process.pid} on ")


@linux
def test_another_process_with_the_same_number_is_another_process(folder):
    leave_lock(folder, process=os.getppid(), started="17")
    assert "Taking over" in enter(folder, wait=False)[0]
    started = locks._start_of(os.getppid())
    leave_lock(folder, age_s=10 * locks.DEAD_S, process=os.getppid(), started=started)  # stopped for long, not dead
    with pytest.raises(ArgumentError, match="works there"):
        enter(folder, wait=False)


def test_a_process_on_another_machine_is_dead_once_it_no_longer_renews_its_lock(folder):
    leave_lock(folder, age_s=locks.DEAD_S / 2, host="node7", machine="other")
    with pytest.raises(ArgumentError, match=r"process \d+ on node7 \(.*, training, since .*\) works there"):
        enter(folder, wait=False)
    leave_lock(folder, age_s=locks.DEAD_S + 60, host="node7", machine="other")
    assert " on node7 " in enter(folder, wait=False)[0]
    lock_of(folder).write_text("")  # a process that died while it wrote
    os.utime(lock_of(folder), (0, 0))
    enter(folder)


def test_a_holder_renews_its_lock(folder, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_S", 0.01)
    with only_process(folder, "testing"):
        os.utime(lock_of(folder), (0, 0))
        wait_until(lambda: lock_of(folder).stat().st_mtime > 0)


def test_a_holder_that_was_taken_over_leaves_the_new_lock_alone(folder):
    with only_process(folder, "testing"):
        other = leave_lock(folder, host="node7", machine="other")
    assert locks._read(lock_of(folder)) == other


def test_locks_of_one_process_can_be_nested(folder):
    with only_process(folder, "testing"):
        with only_process(folder, "testing again", wait=False):
            pass
        assert lock_of(folder).exists()
    assert not lock_of(folder).exists()


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"), only_process(tmp_path / "none" / "results", "testing"):
        pass


def test_a_file_system_that_reports_existing_files_as_another_error_is_waited_for(folder, monkeypatch):
    """sshfs does so; a lock that cannot be written at all is still an error."""
    original = os.open

    def open_as_on_sshfs(path, flags, *mode, **options):
        if flags & os.O_EXCL and Path(path).exists():
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return original(path, flags, *mode, **options)

    monkeypatch.setattr(locks.os, "open", open_as_on_sshfs)
    _, said = waits_for(folder, lambda: enter(folder))
    assert said[0].startswith("Waiting for process")
    with held_elsewhere(folder), pytest.raises(ArgumentError, match="works there"):
        enter(folder, wait=False)


def test_a_lock_that_was_taken_over_meanwhile_is_not_deleted(folder):
    """Between reading the lock of a dead process and deleting it, another process may have taken over."""
    dead = leave_lock(folder, age_s=10 * locks.DEAD_S, host="node7", machine="other")
    alive = leave_lock(folder, host="node8", machine="other")
    locks._remove_dead(lock_of(folder), dead, locks._this_process("testing"))
    assert locks._read(lock_of(folder)) == alive


def test_a_full_disk_leaves_no_half_lock_behind(folder, monkeypatch):
    def fill(content, file):
        file.write("{")
        file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.json, "dump", fill)
    with pytest.raises(UserError, match="No space left on device.*free space"), only_process(folder, "testing"):
        pass
    assert not list(folder.parent.iterdir())


def count(folder: Path, times: int) -> None:
    """Add to the number in a file, which loses additions if two processes read it at the same time."""
    locks.POLL_S = 0.001
    file = folder.parent / "number.txt"
    for _ in range(times):
        with only_process(folder, "counting"):
            file.write_text(str(int(file.read_text()) + 1))


def test_many_processes_after_one_that_died_come_one_at_a_time(folder):
    leave_lock(folder, age_s=10 * locks.DEAD_S, host="node7", machine="other")
    (folder.parent / "number.txt").write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count, args=(folder, 20)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HUNG_S)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (folder.parent / "number.txt").read_text() == "80"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["number.txt"]
