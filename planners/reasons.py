"""The plan's decisions and what was left out, as lines for a person."""

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from planners.plan import Plan


def format_decisions(plan: Plan, width: int | None = None) -> list[str]:
    """Return a table of every decision with its reason, grouped by configuration.

    Args:
        plan: the plan.
        width: of the lines in characters; None for that of the terminal.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    what = max(len(decision.what) for decision in plan.pretext.decisions)
    value = min(44, max(len(decision.value) for decision in plan.pretext.decisions))
    rest = max(30, width - what - value - 6)
    lines = []
    current = None
    for decision in plan.pretext.decisions:
        if decision.configuration != current:
            current = decision.configuration
            lines += ["", f"{current}:"]
        columns = [
            textwrap.wrap(decision.what, what) or [""],
            textwrap.wrap(decision.value, value) or [""],
            textwrap.wrap(decision.reason, rest) or [""],
        ]
        for row in range(max(map(len, columns))):
            cells = [column[row] if row < len(column) else "" for column in columns]
            lines.append(f"  {cells[0]:<{what}}  {cells[1]:<{value}}  {cells[2]}".rstrip())
    return [*lines, ""]


def format_set_aside(fingerprint: Any, report: Any) -> list[str]:
    """Return a line for every case that is not used and why, for the end of a command; empty when all are used.

    Args:
        fingerprint: ``planners.fingerprint.Fingerprint``.
        report: what preprocessing returned, None if it did not run.
    """
    aside: Iterable[Any] = [*fingerprint.set_aside, *(report.set_aside if report is not None else ())]
    lines = [f"  {entry.case}: {entry.reason} ({entry.file})" for entry in aside]
    lines += [f"  {entry.case}: same voxels as {entry.same_as}" for entry in fingerprint.duplicates]
    return [f"{len(lines)} cases are not used:", *lines] if lines else []
