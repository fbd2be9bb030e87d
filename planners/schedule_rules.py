"""Planner rules for batch size and length of a stage, from the memory target and the number of patches."""

import math
from collections.abc import Sequence

from nnssl.methods import Stage
from nnssl.momentum import momentum_for_run
from nnssl.plan import Reasons, StageSchedule, TokenGrid, TransformerSize
from planners.presets import Preset

NO_GRAD_SHARE = 0.15
"""Memory of a pass without a graph relative to a pass with one: only two feature maps of one stage exist at a time."""
STEPS_PER_EPOCH = (25, 250)
"""Smallest and largest number of steps in an epoch; nnU-Net uses 250."""


def values_of_patch(
    stage: Stage, features: tuple[float, float], tokens: TokenGrid | None, size: TransformerSize | None
) -> float:
    """Return the number of feature values that one patch of a stage keeps in memory.

    Args:
        stage: Stage of a method.
        features: Numbers of feature values of one pass through encoder and decoder with a graph.
        tokens: Token grid that the stage reads; None if it reads none.
        size: Size of the transformer that reads the tokens; None for the encoder of a U-Net.
    """
    encoder, decoder = features
    masked = stage.reads_tokens and tokens is not None and size is not None
    graphs = 0 if masked else stage.encoder_graphs
    values = (NO_GRAD_SHARE * stage.encoder_passes + graphs) * encoder + stage.decoder_graphs * decoder
    if masked:
        assert tokens is not None
        assert size is not None
        # the token decoder reads all tokens, the encoder at most a quarter of them
        blocks = size.depth / 4 + size.decoder_depth
        values += math.prod(tokens.grid) * 9 * size.width * blocks
    if tokens is not None:
        values += math.prod(tokens.grid) * stage.token_values
    return values


def decide_schedule(
    stage: Stage,
    features: tuple[float, float],
    budget: float,
    tokens: TokenGrid | None,
    size: TransformerSize | None,
    patches: int,
    preset: Preset,
) -> tuple[StageSchedule, Reasons]:
    """Choose the batch size and length of a stage.

    Args:
        stage: Stage of a method.
        features: See ``values_of_patch``.
        budget: Number of feature values that fit into the memory target.
        tokens: See ``values_of_patch``.
        size: See ``values_of_patch``.
        patches: Number of distinct patches in the data set.
        preset: Memory target.

    Returns:
        The schedule, and what, value and reason of every decision.
    """
    fits = int(budget // values_of_patch(stage, features, tokens, size))
    most = max(2, min(fits, preset.largest_batch, patches // 2))
    batch = most // stage.batch_multiple * stage.batch_multiple
    limit = {
        fits: "the memory target",
        preset.largest_batch: "the preset's largest batch",
        patches // 2: "half of the distinct patches",
    }
    reason = (
        f"memory allows {fits:,}, the data set has {patches:,} distinct patches; "
        f"limited by {limit.get(most, 'the minimum of 2')}"
    )
    if batch < most:
        reason += f", rounded down to a multiple of {stage.batch_multiple}"
    if fits < batch:
        reason += "; WARNING: exceeds the memory target; use a larger memory target or a smaller patch"
    if batch < stage.useful_batch:
        reason += (
            f"; WARNING: this stage learns little from fewer than {stage.useful_batch} patches per step; "
            "use a larger memory target or more data"
        )
    defaults = stage.load().defaults.training
    iterations = min(max(math.ceil(patches / batch), STEPS_PER_EPOCH[0]), STEPS_PER_EPOCH[1])
    epochs = max(1, round(defaults.epochs * preset.epochs_share))
    warmup = round(defaults.warmup_epochs * preset.epochs_share)
    length = (
        f"an epoch is one pass over the {patches:,} distinct patches (25 to 250 steps); {preset.epochs_share:.0%} of "
        f"the paper's {defaults.epochs:,} epochs"
    )
    text = f"{epochs:,} epochs of {iterations} steps"
    if warmup:
        text += f", {warmup} of them for warm-up"
    return StageSchedule(batch_size=batch, epochs=epochs, iterations_per_epoch=iterations, warmup_epochs=warmup), [
        (f"batch size ({stage.name})", str(batch), reason),
        (f"length ({stage.name})", text, length),
    ]


def decide_teacher(patches: int, taught: Sequence[StageSchedule]) -> tuple[int, float, Reasons]:
    """Choose the length of the key queue and the momentum of the teacher.

    Args:
        patches: Number of distinct patches in the data set.
        taught: Schedules of the stages with a teacher.

    Returns:
        The number of keys in the queue, the momentum, and what, value and reason of both; no reasons without such a stage.
    """
    batch = max((schedule.batch_size for schedule in taught), default=2)
    queue = min(max(2 ** int(math.log2(max(2, patches / 4))), 64, 2 * batch), 4096)
    steps = min((schedule.epochs * schedule.iterations_per_epoch for schedule in taught), default=None)
    if steps is None:
        return queue, 0.999, []
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
            ("queue", f"{queue:,}", why_queue),
            ("teacher momentum", f"{momentum:.4f}", why_momentum),
        ],
    )
