"""Print the plans of several data sets side by side in Markdown.

Run ``python -m tools.plans_side_by_side PLAN.json PLAN.json``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnssl.plan import Plan, read_plan


def table(plans: list[Plan]) -> list[str]:
    """Return the lines of one Markdown table per configuration, with the decisions of each plan and their reasons."""
    found = {(d.configuration, d.what): None for plan in plans for d in plan.pretext.decisions}
    lines: list[str] = []
    order = ["data set", "3d_fullres", "3d_fullres_hybrid", "3d_fullres_primus", "2d", "2d_hybrid"]
    for configuration in order:
        names = [plan.dataset_name.partition("_")[2] for plan in plans]
        lines += ["", f"## {configuration}", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(plans)}"]
        for what in [w for c, w in found if c == configuration]:
            cells = []
            for plan in plans:
                match = [d for d in plan.pretext.decisions if (d.configuration, d.what) == (configuration, what)]
                cells.append(f"**{match[0].value}**: {match[0].reason}" if match else "-")
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path, help="plans of pretraining, nnsslPlans.json")
    args = parser.parse_args(argv)
    print("\n".join(table([read_plan(path) for path in args.plans])))


if __name__ == "__main__":
    main()
