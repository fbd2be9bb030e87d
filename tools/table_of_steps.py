"""Print patch, batch and cost of every pretext stage for many kinds of data and all presets, as Markdown.

Run ``python -m tools.table_of_steps`` (a few minutes), or name kinds and presets: ``--kinds BTCV x-ray --presets cpu 24gb``.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nnssl.environment import variables
from nnssl.log import print_line, silence
from nnssl.paths import resolve_folders
from nnssl.plan import Plan
from nnssl.sizes import in_voxels, in_words
from planners.presets import PRESETS
from planners.pretrain_planner import plan_pretraining
from tools.synthetic_fingerprints import KINDS, synthetic_inputs


def plan_of(kind: str, preset: str) -> Plan:
    """Return the plan of a synthetic data set; its files are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("raw", "preprocessed", "results"):
            (Path(folder) / name).mkdir()
        names = {f"nnUNet_{name}": f"{folder}/{name}" for name in ("raw", "preprocessed", "results")}
        with variables(**names), silence():
            dataset, fingerprint = synthetic_inputs(KINDS[kind])
            return plan_pretraining(dataset, fingerprint, resolve_folders(), preset)


def table(kind: str, plans: dict[str, Plan]) -> list[str]:
    """Return the lines of one Markdown table: one row per stage, one column per preset."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for preset, plan in plans.items():
        for name, configuration in plan.pretext.configurations.items():
            for stage, planned in configuration.stages.items():
                step, cost = planned.schedule, planned.cost
                pieces = f" in {step.pieces} pieces" if step.pieces > 1 else ""
                again = ", computed again" if step.checkpointing else ""
                rows.setdefault((name, stage), {})[preset] = (
                    f"{step.batch_size} of {in_voxels(step.patch_size)}{pieces}{again}; {cost.memory_gb:.2g} GB, "
                    f"{in_words(cost.multiply_adds)}"
                )
    lines = [
        "",
        f"## {kind}",
        "",
        f"| configuration | stage | {' | '.join(plans)} |",
        "|---|---" + "|---" * len(plans) + "|",
    ]
    for (name, stage), cells in rows.items():
        lines.append(f"| `{name}` | `{stage}` | {' | '.join(cells.get(preset, 'left out') for preset in plans)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds of data")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="memory targets")
    args = parser.parse_args(argv)
    for kind in args.kinds:
        for line in table(kind, {preset: plan_of(kind, preset) for preset in args.presets}):
            print_line(line)


if __name__ == "__main__":
    main()
