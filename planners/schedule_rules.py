"""Planner rules for the length of a stage, its key queue and the momentum of its teacher."""

import math

from nnssl.methods import Stage
from nnssl.momentum import momentum_for_run
from nnssl.plan import Reasons
from planners.presets import LENGTHS

STEPS_PER_EPOCH = (25, 250)
"""Smallest and largest number of steps in an epoch; nnU-Net uses 250."""


def decide_length(stage: Stage, batch: int, patches: int, length: str) -> tuple[tuple[int, int, int], Reasons]:
    """Choose the length of a stage.

    Most stages are planned in passes over the patches, as many as in the paper. A stage that declares ``least_steps`` is planned
    in steps: passes over few patches would end before its loss has seen enough comparisons, of which every patch gives new ones.

    Args:
        stage: Stage of a method.
        batch: Patches per step.
        patches: Number of distinct patches in the data set.
        length: Length, a key of ``LENGTHS``.

    Returns:
        Epochs, steps per epoch and epochs of warm-up; and what, value and reason of the decision.
    """
    share = LENGTHS[length]
    defaults = stage.load().defaults.training
    iterations = min(max(math.ceil(patches / batch), STEPS_PER_EPOCH[0]), STEPS_PER_EPOCH[1])
    reason = f"an epoch is one pass over the {patches:,} distinct patches (25 to 250 steps); length {length}: {share:.0%} of "
    if stage.least_steps is None:
        epochs, warmup = max(1, round(defaults.epochs * share)), round(defaults.warmup_epochs * share)
        reason += f"the paper's {defaults.epochs:,} epochs"
    else:
        steps = max(stage.least_steps, round(defaults.total_steps * share))
        epochs = math.ceil(steps / iterations)
        warmup = round(epochs * defaults.warmup_epochs / defaults.epochs)
        reason += (
            f"the authors' {defaults.total_steps:,} steps, at least {stage.least_steps:,}, whatever the number of patches, "
            "because every step draws new places to compare"
        )
    text = f"{epochs:,} epochs of {iterations} steps"
    if warmup:
        text += f", {warmup} of them for warm-up"
    return (epochs, iterations, warmup), [(f"length ({stage.name})", text, reason)]


def decide_teacher(stage: Stage, batch: int, steps: int, patches: int) -> tuple[int, float, Reasons]:
    """Choose the length of the key queue and the momentum of the teacher.

    Args:
        stage: Stage of a method.
        batch: Patches per step.
        steps: Steps of the stage.
        patches: Number of distinct patches in the data set.

    Returns:
        The number of keys in the queue, the momentum, and what, value and reason of both.
    """
    queue = min(max(2 ** int(math.log2(max(2, patches / 4))), 64, 2 * batch), 4096)
    momentum = momentum_for_run(0.999, steps)
    why_queue = (
        f"a quarter of the {patches:,} distinct patches, rounded down to a power of 2; at least 64 and two batches, "
        "at most 4,096 (for negatives=queue)"
    )
    why_momentum = f"averages over at most a twentieth of the {steps:,} steps; at most MoCo's 0.999"
    return (
        queue,
        momentum,
        [
            (f"queue ({stage.name})", f"{queue:,}", why_queue),
            (f"teacher momentum ({stage.name})", f"{momentum:.4f}", why_momentum),
        ],
    )
