"""What shows that a process was killed because memory ran out: the kernel's record, and the peak of a child process.

Source: Linux kernel documentation, control group v2 (``memory.events``: ``oom_kill``) and v1 (``memory.oom_control``);
``/proc/vmstat`` outside control groups.
"""

import re
import sys
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MOST_BYTES = 1 << 60
"""Limit from which on a control group counts as unlimited."""
FULL = 0.9
"""Share of the memory from which on processes fill it."""


class MemoryRecord:
    """Compares the kernel's record with that at the time of creation or of the last question."""

    def __init__(self) -> None:
        self._kills = out_of_memory_kills()
        self._peak = peak_of_children_bytes()

    def lack_of_memory(self, processes: int) -> str:
        """Return what shows that memory has run out since the last question, as a clause; empty if nothing does.

        Args:
            processes: Number of processes that were running.
        """
        before, self._kills = self._kills, out_of_memory_kills()
        earlier_peak, self._peak = self._peak, peak_of_children_bytes()
        if before is not None and self._kills is not None and self._kills > before:
            return "memory ran out according to the kernel's record"
        limit = memory_bytes()
        if self._peak > earlier_peak and limit and self._peak * processes > FULL * limit:
            return f"{processes} processes with its peak of {self._peak / 1e9:.1f} GB fill the memory of {limit / 1e9:.1f} GB"
        return ""


def out_of_memory_kills() -> int | None:
    """Return how many processes the kernel has killed because memory ran out; None if it keeps no record."""
    for file in (*_group_files("memory.events", "memory.oom_control"), Path("/proc/vmstat")):
        found = re.search(r"^oom_kill (\d+)$", _text_of(file), re.MULTILINE)
        if found:
            return int(found[1])
    return None


def memory_bytes() -> int:
    """Return how much memory this process and its children may use; 0 if this is not known."""
    limits = []
    for file in _group_files("memory.max", "memory.limit_in_bytes"):
        text = _text_of(file).strip()
        if text.isdecimal():
            limits.append(int(text))
    found = re.search(r"^MemTotal:\s+(\d+) kB$", _text_of(Path("/proc/meminfo")), re.MULTILINE)
    if found:
        limits.append(int(found[1]) * 1024)
    usable = [limit for limit in limits if limit < MOST_BYTES]
    return min(usable, default=0)


def peak_of_children_bytes() -> int:
    """Return the largest resident set of a child process that has ended; 0 where the system does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _group_files(version_2: str, version_1: str) -> list[Path]:
    """Return where a file of this process's control group can lie; in a container, the group is the root of what it sees."""
    files = []
    for line in _text_of(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            files += [GROUPS / group.strip("/") / version_2, GROUPS / version_2]
        elif "memory" in controllers.split(","):
            files += [GROUPS / "memory" / group.strip("/") / version_1, GROUPS / "memory" / version_1]
    return files


def _text_of(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
