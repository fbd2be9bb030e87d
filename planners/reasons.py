"""The plan as text: a screen of its steps, the table of all decisions, and a page with the reasons."""

import shutil
import textwrap
from collections.abc import Sequence
from operator import itemgetter

from nnssl.methods import METHODS, find_method
from nnssl.networks.backbone import planned_configuration
from nnssl.plan import Plan, StagePlan
from nnssl.sizes import in_mm, in_time, in_voxels, in_words
from nnssl.tables import align
from planners.step_rules import multiply_adds_of_finetuning

LONG_SECONDS = 30 * 24 * 3600.0
"""Duration from which a plan is said to be too long for this machine."""
FINE_TUNING_STEPS = 1000 * 250
"""Steps of nnU-Net's own training, the default of ``nnssl_finetune``."""


def summarise(
    plan: Plan,
    configurations: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    speeds: dict[int, float] | None = None,
) -> list[str]:
    """Return what was decided on one screen: the data, and patch, batch, length and cost of every stage.

    Args:
        plan: Plan to describe.
        configurations: Configurations to list; None for the first that each method can use.
        methods: Methods to list; None for all.
        speeds: Multiply-adds per second of this machine in 2D and 3D, by number of axes; None to leave out the time.
    """
    pretext = plan.pretext
    decided = {(each.configuration, each.what): each for each in pretext.decisions}
    spacing = decided["data set", "spacing"]
    lines = [
        f"{plan.dataset_name}: {pretext.num_cases} cases, {', '.join(pretext.modalities)}; "
        f"spacing {spacing.value} ({spacing.reason})",
        f"memory target {pretext.memory_target_gb:g} GB (preset {pretext.preset})",
    ]
    header = ["stage", "configuration", "patch", "batch", "steps", "memory", "multiply-adds"]
    rows, longest = [header + (["time here"] if speeds else [])], ("", 0.0)
    listed = _listed(plan, configurations, methods)
    for name, stage, planned in listed:
        step = planned.schedule
        steps = step.epochs * step.iterations_per_epoch
        row = [stage, name, in_voxels(step.patch_size), str(step.batch_size), f"{steps:,}"]
        row += [f"{planned.cost.memory_gb:.2g} GB", in_words(planned.cost.multiply_adds)]
        if speeds:
            seconds = steps * planned.cost.multiply_adds / speeds[len(step.patch_size)]
            longest = max(longest, (f"{stage} in {name}", seconds), key=itemgetter(1))
            row.append(in_time(seconds))
        rows.append(row)
    for name in dict.fromkeys(name.removesuffix("_hybrid").removesuffix("_primus") for name, *_ in listed):
        if speeds and name in plan.nnunet["configurations"]:
            planned_unet = planned_configuration(plan.nnunet, name)
            patch, batch = planned_unet["patch_size"], planned_unet["batch_size"]
            work = multiply_adds_of_finetuning(plan.nnunet, name)
            seconds = FINE_TUNING_STEPS * work / speeds[len(patch)]
            longest = max(longest, (f"fine-tuning in {name}", seconds), key=itemgetter(1))
            row = ["fine-tuning", name, in_voxels(patch), str(batch), f"{FINE_TUNING_STEPS:,}", "nnU-Net's"]
            rows.append([*row, in_words(work), in_time(seconds)])
    if longest[1] > LONG_SECONDS:
        lines.insert(
            0,
            f"WARNING: on this machine, {longest[0]} would take about {in_time(longest[1])}; run "
            "nnssl_plan_and_preprocess with --preset cpu --length short, and nnssl_pretrain and nnssl_finetune with "
            "--epochs 5 --iterations-per-epoch 50, to try each within the hour",
        )
    lines += ["", *align(rows, left=(0, 1, 2))]
    left_out = [each for each in pretext.decisions if each.value == "left out" or each.what == "left out"]
    lines += [f"left out: {each.configuration} {each.what}: {each.reason}" for each in left_out]
    return lines


def _listed(
    plan: Plan, configurations: Sequence[str] | None, methods: Sequence[str] | None
) -> list[tuple[str, str, StagePlan]]:
    """Return configuration, stage and plan of the stages to list."""
    planned = plan.pretext.configurations
    found: dict[tuple[str, str], StagePlan] = {}
    for method in [find_method(name) for name in methods or METHODS]:
        usable = [name for name in method.configurations if name in planned]
        for name in [each for each in usable if each in configurations] if configurations else usable[:1]:
            for stage in method.stages:
                own = stage.runs_in(name)
                if own in planned and stage.name in planned[own].stages:
                    found.setdefault((own, stage.name), planned[own].stages[stage.name])
    return [(name, stage, each) for (name, stage), each in found.items()]


def reasons_page(plan: Plan) -> str:
    """Return a Markdown page with the cost of every step and every decision with its reason."""
    lines = [f"# Plan {plan.name} of {plan.dataset_name}", ""]
    for name, configuration in plan.pretext.configurations.items():
        lines += [
            f"## Steps of {name}",
            "",
            "| stage | patch | mm | batch | pieces | steps | distinct patches | memory | multiply-adds |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for stage, planned in configuration.stages.items():
            step = planned.schedule
            sides = [n * mm for n, mm in zip(step.patch_size, configuration.spacing_mm, strict=True)]
            lines.append(
                f"| {stage} | {in_voxels(step.patch_size)} | {in_mm(sides)} | {step.batch_size} | {step.pieces} | "
                f"{step.epochs * step.iterations_per_epoch:,} | {planned.distinct_patches:,} | "
                f"{planned.cost.memory_gb:.3g} GB | {in_words(planned.cost.multiply_adds)} |"
            )
        lines.append("")
    current = None
    for decision in plan.pretext.decisions:
        if decision.configuration != current:
            current = decision.configuration
            lines += ["", f"## Decisions: {current}", "", "| decision | value | reason |", "|---|---|---|"]
        lines.append(f"| {decision.what} | {decision.value} | {decision.reason} |")
    return "\n".join(lines) + "\n"


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
