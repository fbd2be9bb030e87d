"""TensorBoard and Weights & Biases receive the numbers of a run once, also when it resumes, and do not change it."""

import json
import math
import os
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nnssl.errors import ArgumentError
from nnssl.paths import resolve_folders
from tests.trainers.finetuning.runs import DATASET, folders_set
from tests.trainers.pretraining.test_pretrain import assert_same, folder_of, run, tensors_of
from tests.waiting import wait_until
from trainers import tracking
from trainers.finetuning.finetune import finetune
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining import pretrain_trainer
from trainers.pretraining.progress import read_metrics
from trainers.tracking import Tracking, check_trackers

STAGE = ("reprec.generative",)
BOTH = ("tensorboard", "wandb")


def tensorboard_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that TensorBoard shows, as (epoch, value)."""
    found = _events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def tensorboard_pictures(folder: Path) -> dict[str, list[int]]:
    found = _events(folder)
    return {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}


def _events(folder: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return found.Reload()


def wandb_records(folder: Path) -> list:
    """Return the records of the only offline run in a folder, once its process has written the last one."""
    pytest.importorskip("wandb")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    wait_until(lambda: any(record.HasField("exit") for record in _records_of(file)))
    return _records_of(file)


def _records_of(file: Path) -> list:
    """Return the records in a file of Weights & Biases.

    It is a log of LevelDB: blocks of 32 KiB with pieces of records, each after its checksum, length and kind (whole, first,
    middle, last), behind a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, piece, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too little for another piece
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return records


def wandb_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            if not key.startswith(("_", "progress/")) and isinstance(
                value, (int, float)
            ):  # the picture has a size there
                curves.setdefault(key, []).append((row["_step"], value))
    return curves


CURVES = {"tensorboard": tensorboard_curves, "wandb": wandb_curves}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "progress.png"
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    own = tmp_path / "Dataset501_A" / "Trainer__plans__2d" / "fold_all"
    own.mkdir(parents=True)
    return own


@pytest.mark.parametrize("name", BOTH)
def test_a_resumed_run_has_every_epoch_once(name, folder, picture):
    """It was killed after epoch 2 and resumes from a checkpoint with two epochs; epoch 2 is that of the second attempt."""
    pytest.importorskip(name)
    first = Tracking((name, name), folder)
    first.start({"seed": 0}, {})
    metrics = {"loss": [4.0, 3.0, 9.0], "probe_dice": [0.5, math.nan, 0.625]}
    for epochs in (1, 2, 3):
        first.write({key: values[:epochs] for key, values in metrics.items()})
    first.write_picture(picture)
    first.close()
    second = Tracking((name,), folder)
    second.start({"seed": 0}, {key: values[:2] for key, values in metrics.items()})
    second.write({"loss": [4.0, 3.0, 2.0, 1.0], "probe_dice": [0.5, math.nan, math.nan, 0.75]})
    second.write_results({"final_dice/mean": 0.875})
    second.close()
    curves = CURVES[name](folder)
    assert curves["loss"] == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    assert curves["probe_dice"] == [(0, 0.5), (3, 0.75)]


@pytest.mark.parametrize("name", BOTH)
def test_a_run_that_is_tracked_from_its_middle_on_has_all_epochs(name, folder):
    pytest.importorskip(name)
    own = Tracking((name,), folder)
    own.start({}, {"loss": [4.0, 3.0]})
    own.write({"loss": [4.0, 3.0, 2.0]})
    own.close()
    assert CURVES[name](folder)["loss"] == [(0, 4.0), (1, 3.0), (2, 2.0)]


@pytest.mark.parametrize("name", BOTH)
def test_a_run_that_starts_over_drops_the_curves_of_the_earlier_one(name, folder):
    pytest.importorskip(name)
    for loss in (4.0, 5.0):
        own = Tracking((name,), folder)
        own.start({}, {})
        own.write({"loss": [loss]})
        own.close()
    assert CURVES[name](folder)["loss"] == [(0, 5.0)]


def test_a_resumed_run_keeps_its_identity(folder):
    pytest.importorskip("wandb")
    names = []
    for epochs in (0, 1):
        own = Tracking(("wandb",), folder)
        own.start({}, {"loss": [4.0] * epochs})
        own.write({"loss": [4.0] * (epochs + 1)})
        own.close()
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        names.append(file.name)
    assert names[0] == names[1]


def test_unknown_and_missing_trackers_are_one_line(monkeypatch):
    with pytest.raises(ArgumentError, match="^track must be one of tensorboard, wandb, got mlflow$"):
        check_trackers(["mlflow"])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in BOTH:
        with pytest.raises(ArgumentError, match=rf"track {name} .* run pip install 'nnssl\[{name}\]'") as error:
            check_trackers([name])
        assert f"--track {name}" in error.value.with_flags({"track": "--track"})
    check_trackers([])


def test_a_folder_named_like_a_package_is_not_the_package(monkeypatch, tmp_path):
    """Runs leave a folder wandb behind, which Python would import as an empty package."""
    (tmp_path / "mlflow_folder").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(tracking.TRACKERS, "mlflow_folder", tracking.WandbTracker)
    with pytest.raises(ArgumentError, match="is not installed"):
        check_trackers(["mlflow_folder"])


def test_two_loggers_of_wandb_are_refused(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    with pytest.raises(ArgumentError, match="unset nnUNet_wandb_enabled"):
        check_trackers(["wandb"])


@pytest.mark.figures
def test_tracking_a_pretraining_that_is_stopped_and_resumed(toy, monkeypatch):
    """Its curves are those of metrics.csv, and its tensors those of a run without trackers."""
    for name in BOTH:
        pytest.importorskip(name)
    expected = tensors_of(run(toy, stages=STAGE))
    original = pretrain_trainer.PretrainTrainer.train_step

    def interrupted(self, batch):
        if self.current_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_trainer.PretrainTrainer, "train_step", interrupted)
        with pytest.raises(SystemExit):
            run(toy, stages=STAGE, restart=True, track=BOTH)
    final = run(toy, stages=STAGE, track=BOTH)
    assert_same(tensors_of(final), expected)
    metrics = read_metrics(folder_of(toy, "Generative") / "metrics.csv")
    for curves in (tensorboard_curves(final.parent), wandb_curves(final.parent)):
        assert set(curves) == set(metrics)
        for key, values in metrics.items():
            # The retrieval of views is not measured after every epoch.
            measured = [(epoch, value) for epoch, value in enumerate(values) if not math.isnan(value)]
            assert [step for step, _ in curves[key]] == [epoch for epoch, _ in measured]
            assert measured[-1][0] == 1
            assert [value for _, value in curves[key]] == pytest.approx([value for _, value in measured], rel=1e-6)
    assert tensorboard_pictures(final.parent)["progress"][-1] == 1
    assert list(final.parent.glob("wandb/offline-run-*/files/media/images/progress*.png"))


@pytest.mark.nightly
@pytest.mark.figures
def test_tracking_a_fine_tuning(finetuned, tmp_path, monkeypatch):
    """Its curves and its final Dice are nnU-Net's, and its weights those of the arm without trackers."""
    for name in BOTH:
        pytest.importorskip(name)
    (tmp_path / "results").mkdir()
    with folders_set(finetuned.folder):
        monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
        settings = FinetuneSettings(**{**finetuned.arguments, "scratch": False}, track=BOTH)
        (result,) = finetune(4, finetuned.weights, settings)
        assert resolve_folders().results == tmp_path / "results"
    assert Path(result.model_folder).parent == tmp_path / "results" / DATASET
    fold = Path(result.model_folder, "fold_0")
    content = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    plain = torch.load(finetuned.fold(0) / "checkpoint_final.pth", weights_only=True)
    assert_same(content["network_weights"], plain["network_weights"])
    log = content["logging"]
    curves = tensorboard_curves(fold)
    assert [value for _, value in curves["loss/training"]] == pytest.approx(log["train_losses"])
    names = list(finetuned.results[0].dice)
    for column, name in enumerate(names):
        rows = [(epoch, row[column]) for epoch, row in enumerate(log["dice_per_class_or_region"])]
        expected = [row for row in rows if not math.isnan(row[1])]
        assert [epoch for epoch, _ in curves[f"dice/{name}"]] == [epoch for epoch, _ in expected]
        assert [dice for _, dice in curves[f"dice/{name}"]] == pytest.approx([dice for _, dice in expected])
    assert curves["final_dice/mean"] == [(2, pytest.approx(result.mean_dice))]
    offline = wandb_curves(fold)
    assert [step for step, _ in offline["loss/training"]] == [0, 1]
    assert {key for key in curves if not key.startswith("final_dice")} == set(offline)
    assert "final_dice/mean" in str([each.summary for each in wandb_records(fold)])
    assert tensorboard_pictures(fold) == {"progress": [1]}  # drawn every 20 epochs and after the last one
