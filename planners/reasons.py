"""The plan's decisions as a table of text."""

import shutil
import textwrap

from nnssl.plan import Plan


def format_decisions(plan: Plan, width: int | None = None) -> list[str]:
    """Return a table of every decision with its reason, grouped by configuration.

    Args:
        plan: Plan whose decisions are listed.
        width: Width of the lines in characters; None for the width of the terminal.
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
