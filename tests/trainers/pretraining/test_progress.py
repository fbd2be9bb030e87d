"""A table of metrics is read as it was written."""

import math

import pytest

from nnssl.errors import UserError
from trainers.pretraining.progress import read_metrics, write_metrics


def test_metrics_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = {"loss": [2.5, 1.25, 0.1], "probe_dice": [0.5, math.nan, 0.75]}
    write_metrics(path, metrics)
    found = read_metrics(path)
    assert list(found) == list(metrics)
    assert found["loss"] == metrics["loss"]
    assert found["probe_dice"][::2] == [0.5, 0.75]
    assert math.isnan(found["probe_dice"][1])
    write_metrics(path, {"loss": []})
    assert read_metrics(path) == {"loss": []}


@pytest.mark.parametrize("text", ["", "loss\n1\n", "epoch,loss\n0\n", "epoch,loss\n0,much\n"])
def test_other_tables_are_refused(tmp_path, text):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv: not a table of pretraining metrics"):
        read_metrics(path)
