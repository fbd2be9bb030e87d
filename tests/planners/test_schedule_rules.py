"""Length of a stage, the key queue and the teacher's momentum."""

import math

import pytest

from nnssl.methods import find_stage
from planners.presets import LENGTHS
from planners.schedule_rules import decide_length, decide_teacher

STAGE = find_stage("simclr.contrast")[1]


@pytest.mark.parametrize(
    ("patches", "batch", "steps"),
    [(1000, 40, 25), (1001, 40, 26), (960, 40, 25), (9999, 40, 250), (10_001, 40, 250), (5000, 40, 125)],
)
def test_an_epoch_is_one_pass_within_25_to_250_steps(patches, batch, steps):
    assert decide_length(STAGE, batch, patches, "full")[0][1] == steps


@pytest.mark.parametrize(("length", "share"), [("short", 0.1), ("medium", 1 / 3), ("full", 1.0)])
def test_length_and_warm_up_are_shares_of_the_papers(length, share):
    assert LENGTHS[length] == share
    training = STAGE.load().defaults.training
    (epochs, _, warmup), reasons = decide_length(STAGE, 40, 10_000, length)
    assert epochs == round(share * training.epochs) >= 1
    assert warmup == round(share * training.warmup_epochs)
    assert f"length {length}: {share:.0%} of the paper's {training.epochs:,} epochs" in reasons[0][2]


@pytest.mark.parametrize(("length", "steps"), [("short", 2_000), ("medium", 6_667), ("full", 20_000)])
@pytest.mark.parametrize("patches", [12, 48, 100, 5_000])
def test_few_scans_do_not_shorten_embeddings(length, steps, patches):
    """Twelve scans of four patches each; passes over them would end after 200 steps of a short run."""
    sam = find_stage("sam.embedding")[1]
    (epochs, iterations, warmup), reasons = decide_length(sam, 4, patches, length)
    assert iterations == min(max(math.ceil(patches / 4), 25), 250)
    assert steps <= epochs * iterations < steps + iterations
    assert warmup / epochs == pytest.approx(500 / 20_000, abs=0.51 / epochs)
    assert "of the authors' 20,000 steps, at least 2,000" in reasons[0][2]


def test_embeddings_have_a_floor_in_steps(monkeypatch):
    sam = find_stage("sam.embedding")[1]
    monkeypatch.setitem(LENGTHS, "tiny", 0.001)
    assert decide_length(sam, 4, 48, "tiny")[0][:2] == (80, 25)
    assert decide_length(STAGE, 4, 48, "tiny")[0][0] == max(1, round(STAGE.load().defaults.training.epochs * 0.001))


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
    assert decide_teacher(STAGE, batch, 30, patches)[0] == queue


def test_a_teacher_averages_over_a_twentieth_of_the_run():
    assert decide_teacher(STAGE, 8, 25_000, 1000)[1] == 0.999
    queue, momentum, reasons = decide_teacher(STAGE, 8, 500, 1000)
    assert momentum == pytest.approx(1 - 20 / 500)
    assert "twentieth of the 500 steps" in reasons[1][2]
    assert math.log2(queue).is_integer()
