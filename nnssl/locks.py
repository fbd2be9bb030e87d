"""Locks on folders, so that two runs never write to the same one.

A lock is a file beside the folder that is created exclusively and says which process of which host works there. The locks of the
operating system (``flock``) are not used, because some network file systems keep them on each host for itself, so that two hosts
would hold the same lock; files are created exclusively on all of them.

A process that was killed leaves its file behind. On the same machine, the number and the start of a process tell whether
it still runs. A process of another machine sets the time of its file every ``RENEW_S`` seconds; one that has not done so for
``DEAD_S`` seconds, by the clock of the file system, counts as dead. In both cases the next process takes over.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from nnssl.errors import ArgumentError, UserError
from nnssl.log import logger

RENEW_S = 20.0
"""Interval at which the holder of a lock renews it, far below the time for which network file systems cache times of files."""
DEAD_S = 300.0
"""Time without renewal after which the holder on another machine counts as dead."""
HIDDEN = "hidden"
"""Start of a process that exists, but belongs to another user, and whose start the system hides."""
UNREADABLE_S = 5.0
"""Time after which a lock without content is told of, which a killed process may leave."""
POLL_S = 0.5
"""Interval at which a waiting process looks again."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: Name of the machine.
        machine: Identity of the running system and its process numbers; empty if unknown.
        process: Process number.
        started: Start of the process, which tells it from a later one with the same number; empty if unknown.
        doing: What it does, for messages.
        since: Local time at which it began.
        token: Random text, which tells two locks of one process apart.
    """

    host: str
    machine: str
    process: int
    started: str
    doing: str
    since: str
    token: str

    def is_same_process(self, other: "Owner") -> bool:
        """Return whether another lock is held by the same process."""
        return (self.machine, self.host, self.process, self.started) == (
            other.machine,
            other.host,
            other.process,
            other.started,
        )

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} ({self.doing}, since {self.since})"


@contextlib.contextmanager
def only_process(folder: Path, doing: str, wait: bool = True) -> Iterator[None]:
    """Keep other processes from working on a folder or file inside a ``with`` block, which may be nested.

    Args:
        folder: Folder or file to work on; it need not exist and may be deleted meanwhile, but its parent must exist.
        doing: What this process does, as a participle for the messages of others: "pretraining".
        wait: Whether to wait for a process that works on it; otherwise it is an error.

    Raises:
        ArgumentError: If another process works on the folder, and this one is not to wait.
        UserError: If the lock cannot be written.
    """
    path = lock_of(folder)
    me = _this_process(doing)
    holder = _read(path)
    if holder is not None and holder.is_same_process(me):
        yield
        return
    _acquire(path, folder, me, wait)
    released = threading.Event()
    threading.Thread(target=_renew, args=(path, me, released), daemon=True).start()
    try:
        yield
    finally:
        released.set()
        if _read(path) == me:
            path.unlink(missing_ok=True)


def lock_of(folder: Path) -> Path:
    """Return the file by which a folder is locked."""
    return folder.with_name(f".{folder.name}.lock")


def who_holds(lock: Path) -> str:
    """Return who holds a lock, from its file; empty if nobody does, or if the process has ended.

    A lock without content, which a process may be writing at this moment, counts as held until it is old.
    """
    holder = _read(lock)
    if not lock.exists() or _is_dead(lock, holder, _this_process("looking at a lock")):
        return ""
    return "a process that its lock does not name" if holder is None else str(holder)


def _acquire(path: Path, folder: Path, me: Owner, wait: bool) -> None:
    told: Owner | None = None
    unreadable_s = 0.0
    while not _create(path, me):
        holder = _read(path)
        if _is_dead(path, holder, me):
            _remove_dead(path, holder, me)
            continue
        if holder is None:  # being written, or deleted meanwhile
            if unreadable_s < UNREADABLE_S <= unreadable_s + POLL_S:
                text = f"{path}: is a lock that does not name its process; delete it if no other run works on {folder}"
                if not wait:
                    raise ArgumentError(text, "restart")
                logger.info(text)
            unreadable_s += POLL_S
            time.sleep(POLL_S)
            continue
        if not wait:
            raise ArgumentError(
                f"{folder}: {holder} works there; wait for it or stop it, then run the command again", "restart"
            )
        if told != holder:
            logger.info(f"Waiting for {holder}, which works on {folder}; if it does not run any more, delete {path}")
            told = holder
        time.sleep(POLL_S)


def _create(path: Path, me: Owner) -> bool:
    """Create a lock; return false if it exists."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        if _can_create_beside(path):  # then the file exists, which sshfs reports as "Operation not permitted"
            return False
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(me), file)
    except OSError as error:  # a full disk
        path.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from error
    return True


def _can_create_beside(path: Path) -> bool:
    """Return whether another file can be created in the folder of a lock."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        probe.touch(exist_ok=False)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        probe.unlink()
    return True


def _read(path: Path) -> Owner | None:
    """Return the holder of a lock; None if there is no lock or its content is not complete."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_dead(path: Path, holder: Owner | None, me: Owner) -> bool:
    """Return whether the holder of a lock has ended, or has not renewed it for so long that it counts as dead."""
    if holder is not None and holder.machine and holder.machine == me.machine:
        started = _start_of(holder.process)
        if started != HIDDEN:
            return started != holder.started
    return _seconds_since_renewal(path) > DEAD_S


def _remove_dead(path: Path, holder: Owner | None, me: Owner) -> None:
    """Delete the lock of a dead process, in one process at a time, so that nobody deletes the lock of who took over."""
    guard = path.with_name(f"{path.name}.takeover")
    if not _create(guard, me):
        if _is_dead(guard, _read(guard), me):
            guard.unlink(missing_ok=True)
        time.sleep(POLL_S)
        return
    try:
        if _read(path) == holder and _is_dead(path, holder, me):
            path.unlink(missing_ok=True)
            if holder is not None:
                logger.info(f"Taking over from {holder}, which does not run any more")
    finally:
        guard.unlink(missing_ok=True)


def _seconds_since_renewal(path: Path) -> float:
    """Return the age of a lock by the clock of its file system; 0 if it does not exist any more."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        renewed = path.stat().st_mtime
        probe.touch()
        return probe.stat().st_mtime - renewed
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _renew(path: Path, me: Owner, released: threading.Event) -> None:
    """Renew a lock until it is released."""
    while not released.wait(RENEW_S):
        holder = _read(path)
        if holder is not None and holder != me:
            logger.warning(f"Warning: {holder} took over while this process stood still; stop one of the two")
            return
        with contextlib.suppress(OSError):
            os.utime(path)


def _this_process(doing: str) -> Owner:
    command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c", "-m") else "python"
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    me = Owner(socket.gethostname(), _machine(), os.getpid(), "", f"{command}, {doing}", since, uuid.uuid4().hex)
    return replace(me, started=_start_of(me.process))


def _machine() -> str:
    """Return what identifies the running system and the name space of its process numbers; the host where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname() if sys.platform == "darwin" else ""


def _start_of(process: int) -> str:
    """Return the start of a process in ticks of the system, "running" on other systems than Linux; "ended" if it has ended."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return HIDDEN if _exists(process) else "ended"
        return "ended" if fields[0] in ("Z", "X") else fields[19]
    return "running" if _exists(process) else "ended"


def _exists(process: int) -> bool:
    """Return whether a process exists, also where /proc hides those of other users."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
