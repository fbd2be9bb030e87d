"""The estimate of a study: from recorded durations of finished cells, or from trials of the parts of a cell."""

import math
import re
from dataclasses import fields

import pytest
import torch

from nnssl.checkpoint import FINAL
from tests.trainers.benchmark.test_study import prepare
from tests.trainers.phantom_study import SHAPE, SPACING_MM
from trainers.benchmark import estimate
from trainers.benchmark.cell_times import SCHEMA_VERSION, CellTimes, median_times, record_times, times_of
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.estimate import describe_estimate, estimate_seconds
from trainers.benchmark.trial import PASSES, Trial, number_of_passes, tiles_of, try_cell
from trainers.finetuning.result import FILE_NAME

EPOCHS = ((0.0, 10.0), (10.0, 20.0), (200.0, 220.0))
"""Start and end of the epochs of a cell whose third was trained in another call."""


@pytest.fixture
def cell(tmp_path):
    """Model folder of a cell with a log."""
    (tmp_path / "fold_0").mkdir()
    log = {"epoch_start_timestamps": [e[0] for e in EPOCHS], "epoch_end_timestamps": [e[1] for e in EPOCHS]}
    torch.save({"logging": log}, tmp_path / "fold_0" / FINAL)
    return tmp_path


def test_a_cell_records_what_is_not_training(cell):
    record_times(cell, steps=10, started=150.0, seconds=100.0)
    assert times_of(cell, 10) == CellTimes(
        SCHEMA_VERSION, 3.0, 80.0
    )  # three epochs of 10 s; 20 of the 100 s were training


def test_a_cell_without_a_record_is_read_from_its_files(cell):
    assert times_of(cell, 10) is None  # it has no result
    (cell / FILE_NAME).write_text("{}")
    times = times_of(cell, 10)
    assert times is not None
    assert times.seconds_per_step == 3.0
    assert times.other_seconds >= 0


def test_a_cell_without_a_log_records_nothing(tmp_path):
    record_times(tmp_path, 10, 0.0, 5.0)
    assert list(tmp_path.iterdir()) == []


def test_medians():
    times = [CellTimes(SCHEMA_VERSION, *each) for each in ((1.0, 30.0), (9.0, 20.0), (2.0, 70.0))]
    assert median_times(times) == CellTimes(SCHEMA_VERSION, 2.0, 30.0)


def test_finished_cells_tell_what_the_others_take(folders, monkeypatch):
    """Four cells are finished: 2 s per step and 30 s besides. Steps of the mean teacher are estimated from them."""
    cells = StudyCells(prepare(folders, modes=("finetune", "mean_teacher")))
    trained = [each for each in cells.study.cells if (each.arm, each.mode, each.epochs) == ("scratch", "finetune", 1)]
    monkeypatch.setattr(cells, "is_trained", lambda each: each in trained)
    monkeypatch.setattr(estimate, "times_of", lambda folder, steps: CellTimes(SCHEMA_VERSION, 2.0, 30.0))
    monkeypatch.setattr(estimate, "try_cell", lambda study: pytest.fail("cells are finished"))
    _, *lines = describe_estimate(cells)  # the first is of the pretraining
    assert lines == [
        "12 cells of mode finetune: about 7 min in one process: training 40 s (2 s per step), set-up, prediction and "
        "evaluation 6 min (30 s per cell), from 4 finished cells",
        "16 cells of mode mean_teacher: about 10 min in one process: training 2 min (4.67 s per step), set-up, prediction and "
        "evaluation 8 min (30 s per cell), from 4 finished cells of mode finetune",
        "28 cells: about 17 min in one process",
    ]
    left = [each for each in cells.study.cells if each not in trained]
    assert estimate_seconds(cells, left) == pytest.approx(400 + 24 * 2 * 7 / 3 + 480)
    assert estimate_seconds(cells, []) == 0


def test_nothing_is_known_without_finished_cells(folders):
    cells = StudyCells(prepare(folders))
    assert estimate_seconds(cells, cells.study.cells) is None


def test_a_trial_adds_up():
    trial = Trial(step=3.0, augmentation=0.5, held_out_batches=5, prediction=40.0, evaluation=2.0)
    assert trial.training("finetune", epochs=2, steps=10) == 10 * 3.5 + 2 * 5 * 1.0
    assert trial.training("linear", epochs=2, steps=10) == pytest.approx(10 * 1.5 + 10)
    assert trial.training("mean_teacher", epochs=2, steps=10) == pytest.approx(10 * 8 + 10)
    assert trial.afterwards == 42
    assert set(PASSES) == {"finetune", "linear", "mean_teacher"}


def tiles_along(size: int, side: int) -> int:
    """Count tiles that overlap by at least half until the end of the image is reached."""
    tiles, end = 1, side
    while end < size:
        tiles, end = tiles + 1, end + side / 2
    return tiles


@pytest.mark.parametrize("shape", [(64, 64, 64), (110, 30, 65), (200, 64, 96), (129, 128, 127)])
def test_tiles_are_those_of_the_sliding_window(shape):
    assert tiles_of(shape, (64, 64, 64)) == math.prod(tiles_along(size, 64) for size in shape)


def test_every_part_of_a_cell_is_tried(folders):
    study = prepare(folders)
    trial = try_cell(study)
    assert all(getattr(trial, field.name) > 0 for field in fields(trial))
    configuration = study.nnunet_configuration
    sizes = [round(n * mm / own) for n, mm, own in zip(SHAPE, SPACING_MM, configuration["spacing"], strict=True)]
    tiles = math.prod(map(tiles_along, sizes, configuration["patch_size"]))
    assert number_of_passes(study) == len(study.test) * 8 * tiles
    chosen = prepare(folders, mirroring=False, learning_rates=(0.01, 0.001), validation_patients=1)
    assert number_of_passes(chosen) == (len(chosen.test) + 1) * tiles
    line = describe_estimate(StudyCells(study))[-1]
    assert re.fullmatch(
        r"16 cells: about .* in one process: training .* s per step\), prediction and evaluation .* s per cell\), from timed "
        r"steps of the bare network, nnU-Net's augmentation and tiles, and one evaluated case",
        line,
    )
