"""Records of an epoch: the embeddings that are kept, the means, and a metric that first appears during a run."""

import csv
import math

import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from trainers.pretraining.epoch import EMBEDDINGS_KEPT, Epoch, mean_of_steps
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
    monitors, warning = spread.collapse()
    assert monitors["effective_rank"] > 4
    assert warning is None
    monitors, warning = Epoch(embeddings=[torch.ones(5, 7)] * 3).collapse()
    assert monitors == {"feature_std": 0.0, "effective_rank": 0.0}
    assert warning is not None
    assert "collapsed" in warning
    assert Epoch().collapse() == ({}, None)


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
