"""Batch size and length of a stage, the key queue and the teacher's momentum."""

import math
from dataclasses import replace

import pytest

from nnssl.methods import find_stage
from nnssl.plan import StageSchedule
from planners.presets import PRESETS
from planners.schedule_rules import decide_schedule, decide_teacher

FEATURES = (1e6, 3e5)


def schedule(patches: int, fits: int, preset: str = "24gb", stage: str = "pix2rep.dense"):
    """Return the schedule of a stage in which a patch needs two passes with a graph through encoder and decoder."""
    budget = (fits + 0.5) * 2 * sum(FEATURES)
    return decide_schedule(find_stage(stage)[1], FEATURES, budget, None, None, patches, PRESETS[preset])


@pytest.mark.parametrize(
    ("patches", "fits", "preset", "batch", "limit"),
    [
        (10_000, 40, "24gb", 40, "the memory target"),
        (10_000, 400, "24gb", 256, "the preset's largest batch"),
        (10_000, 400, "cpu", 16, "the preset's largest batch"),
        (101, 400, "24gb", 50, "half of the distinct patches"),
        (3, 400, "24gb", 2, "the minimum of 2"),
        (10_000, 1, "24gb", 2, "the minimum of 2"),
    ],
)
def test_what_limits_the_batch(patches, fits, preset, batch, limit):
    chosen, reasons = schedule(patches, fits, preset)
    assert chosen.batch_size == batch
    assert f"limited by {limit}" in reasons[0][2]


@pytest.mark.parametrize(
    ("patches", "batch", "steps"),
    [(1000, 40, 25), (1001, 40, 26), (960, 40, 25), (9999, 40, 250), (10_001, 40, 250), (5000, 40, 125)],
)
def test_an_epoch_is_one_pass_within_25_to_250_steps(patches, batch, steps):
    chosen, _ = schedule(patches, batch)
    assert (chosen.batch_size, chosen.iterations_per_epoch) == (batch, steps)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_length_and_warm_up_are_shares_of_the_papers(preset):
    training = find_stage("simclr.contrast")[1].load().defaults.training
    share = {"cpu": 0.1}.get(preset, 1.0)
    chosen, reasons = schedule(10_000, 40, preset, "simclr.contrast")
    assert chosen.epochs == round(share * training.epochs) >= 1
    assert chosen.warmup_epochs == round(share * training.warmup_epochs)
    assert f"{share:.0%} of the paper's {training.epochs:,} epochs" in reasons[1][2]


def test_a_batch_below_the_useful_one_is_warned_of():
    assert find_stage("simclr.contrast")[1].useful_batch == 8
    for fits, warned in ((7, True), (8, False)):
        budget = (fits + 0.5) * 2 * FEATURES[0]
        chosen, reasons = decide_schedule(
            find_stage("simclr.contrast")[1], FEATURES, budget, None, None, 10_000, PRESETS["24gb"]
        )
        assert chosen.batch_size == fits
        assert ("WARNING: this stage learns little from fewer than 8 patches per step" in reasons[0][2]) == warned


@pytest.mark.parametrize(
    ("patches", "batch", "queue"),
    [
        (1000, 16, 128),  # a quarter is 250: the power of two below
        (1024, 16, 256),
        (200, 16, 64),
        (1000, 100, 200),  # two batches
        (10**6, 16, 4096),
        (2, 2, 64),
    ],
)
def test_a_queue_is_a_quarter_of_the_patches(patches, batch, queue):
    taught = [StageSchedule(2, 1, 30, 0), StageSchedule(batch, 1, 30, 0)]
    assert decide_teacher(patches, taught)[0] == queue


def test_a_teacher_averages_over_a_twentieth_of_the_shortest_run():
    long = StageSchedule(batch_size=8, epochs=100, iterations_per_epoch=250, warmup_epochs=0)
    short = replace(long, epochs=10, iterations_per_epoch=50)
    assert decide_teacher(1000, [long])[1] == 0.999
    for taught in ([long, short], [short, long]):
        _, momentum, reasons = decide_teacher(1000, taught)
        assert momentum == pytest.approx(1 - 20 / 500)
        assert "twentieth of the 500 steps" in reasons[1][2]
    queue, momentum, reasons = decide_teacher(1000, [])
    assert (queue, momentum, reasons) == (128, 0.999, [])
    assert math.log2(queue).is_integer()
