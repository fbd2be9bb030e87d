"""Records of an epoch: the embeddings that are kept, the means, and a metric that first appears during a run."""

import csv
import math

import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnssl.collapse import COLLAPSED_RANK, FEWEST_EMBEDDINGS, FEWEST_STEPS
from nnssl.methods.settings import TrainingSettings
from trainers.pretraining.epoch import EMBEDDINGS_KEPT, Epoch, mean_of_steps
from trainers.pretraining.optimisation import steps_at_full_rate
from trainers.pretraining.progress import collect_metrics, last_values, log_epoch, write_metrics


def test_the_last_embeddings_stay():
    epoch, part = Epoch(), EMBEDDINGS_KEPT // 3 + 1
    for step in range(5):
        epoch.keep(torch.full((part, 2), float(step), dtype=torch.float16, requires_grad=True))
    assert [float(kept[0, 0]) for kept in epoch.embeddings] == [2, 3, 4]
    assert all(kept.dtype == torch.float32 and not kept.requires_grad for kept in epoch.embeddings)


def test_equal_embeddings_are_warned_of_and_others_are_not():
    generator = torch.Generator().manual_seed(0)
    spread = Epoch(embeddings=[torch.randn(40, 7, generator=generator) for _ in range(2)])
    monitors, warning = spread.collapse(FEWEST_STEPS)
    assert monitors["head_rank"] > 4
    assert warning is None
    monitors, warning = Epoch(embeddings=[torch.ones(5, 7)] * 7).collapse(FEWEST_STEPS)
    assert monitors == {"head_std": 0.0, "head_rank": 0.0}
    assert warning is not None
    assert "collapsed" in warning
    assert Epoch().collapse(FEWEST_STEPS) == ({}, None)


@pytest.mark.parametrize(
    ("embeddings", "steps", "warned"),
    [
        (FEWEST_EMBEDDINGS, FEWEST_STEPS, True),
        (FEWEST_EMBEDDINGS - 1, FEWEST_STEPS, False),
        (FEWEST_EMBEDDINGS, FEWEST_STEPS - 0.5, False),
        (10 * FEWEST_EMBEDDINGS, 2, False),
    ],
)
def test_a_collapse_is_judged_on_enough_embeddings_after_enough_steps(embeddings, steps, warned):
    monitors, warning = Epoch(embeddings=[torch.ones(embeddings, 7)]).collapse(steps)
    assert monitors == {"head_std": 0.0, "head_rank": 0.0}  # measured and written in any case
    assert (warning is not None) == warned


def test_two_healthy_embeddings_are_not_called_collapsed():
    """Their rank is 1 whatever they are, which the fewest embeddings keep from being judged."""
    two = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    monitors, warning = Epoch(embeddings=[two]).collapse(10 * FEWEST_STEPS)
    assert monitors["head_rank"] < COLLAPSED_RANK
    assert warning is None


def test_steps_of_the_warm_up_count_by_their_rate():
    """Of 4 steps of warm-up, the first three have a quarter, half and three quarters of the rate; after it each counts fully."""
    training = TrainingSettings(
        optimizer="adamw", learning_rate=1e-3, learning_rate_schedule="constant", momentum=(0.9, 0.999), weight_decay=0.0,
        gradient_clip=1.0, batch_size=2, epochs=10, iterations_per_epoch=2, warmup_epochs=2,
    )  # fmt: skip
    assert [steps_at_full_rate(training, steps) for steps in (0, 1, 3, 4, 7)] == [0, 0.25, 1.5, 2.5, 5.5]


def test_means_are_over_the_steps():
    records = [
        {"loss": torch.tensor(1.0), "seconds_waiting": 0.5, "seconds": 1.0},
        {"loss": torch.tensor(4.0), "seconds_waiting": 0.0, "seconds": 3.0},
    ]
    values = mean_of_steps(records, 6, torch.device("cpu"))
    assert values == pytest.approx({"loss": 2.5, "data_wait_share": 0.125, "patches_per_second": 3.0})


def test_a_metric_that_begins_later_is_empty_before(tmp_path):
    logger = MetaLogger(str(tmp_path), False)
    for epoch, values in enumerate(({"loss": 2.0}, {"loss": 1.5, "probe_dice": 0.25})):
        logger.log("epoch_start_timestamps", 10.0 * epoch, epoch)
        log_epoch(logger, epoch, values, learning_rate=0.1)
        logger.log("epoch_end_timestamps", 10.0 * epoch + 4, epoch)
    metrics = collect_metrics(logger.get_checkpoint())
    assert math.isnan(metrics["probe_dice"][0])
    assert last_values(metrics) == "loss 1.5000 (probe_dice 0.25, learning_rate 0.1, epoch_seconds 4)"
    write_metrics(tmp_path / "metrics.csv", metrics)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["probe_dice"]) for row in rows] == [("2.0", ""), ("1.5", "0.25")]
