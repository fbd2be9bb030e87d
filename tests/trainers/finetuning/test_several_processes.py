"""Fine-tuning in two processes of the CPU: batches, gradients and results of one process."""

import copy
from dataclasses import dataclass

import pytest
import torch

from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json
from tests.trainers.finetuning.runs import (
    CASES,
    CPU,
    DATASET,
    final_weights,
    folders_set,
    make_settings,
    trainer_of,
    weights_of,
)
from tests.trainers.tiny_plan import tiny_plan
from trainers.finetuning import finetune_trainer
from trainers.finetuning.training import TrainingJob, train_in_group
from trainers.launch import launch


def test_rows_of_the_processes_are_the_batch_of_one(run, tmp_path, monkeypatch):
    """A process makes its own rows only; foreground is oversampled in the rows in which one process does it."""
    trainer = trainer_of(run, tmp_path / "model", batch_size=4)
    trainer.initialize()
    whole = next(copy.copy(trainer).get_dataloaders()[0])
    monkeypatch.setattr(finetune_trainer, "world_size", lambda: 2)
    for number, rows in enumerate(([0, 1], [2, 3])):
        monkeypatch.setattr(finetune_trainer, "rank", lambda number=number: number)
        part = next(copy.copy(trainer).get_dataloaders()[0])
        assert torch.equal(part["data"], whole["data"][rows])
        assert all(torch.equal(own, both[rows]) for own, both in zip(part["target"], whole["target"], strict=True))
        assert part["keys"] == [whole["keys"][row] for row in rows]


@pytest.mark.parametrize(("mode", "batch_dice"), [("finetune", True), ("mean_teacher", False)])
def test_two_processes_equal_one(run, tmp_path, monkeypatch, mode, batch_dice):
    """The weights after four steps, with Dice over the batch and over each sample; the files are those of one process."""
    monkeypatch.setenv("NNSSL_PRECISION", "float32")
    plan = tiny_plan(DATASET) | {"image_reader_writer": "SimpleITKIO"}
    plan["configurations"]["3d_fullres"]["batch_dice"] = batch_dice
    dataset_json = read_json(run.folder / "preprocessed" / DATASET / "dataset.json", "dataset.json")

    def job(folder):
        settings = make_settings(folder, batch_size=4, unlabelled_cases=CASES[4:5], recipe="nnunet", warmup_steps=0)
        (folder / "fold_0").mkdir(parents=True)
        weights = weights_of(run).without_content() if mode == "finetune" else None
        return TrainingJob("test", plan, "3d_fullres", dataset_json, CPU, settings, mode, 0, weights)

    with folders_set(run.folder):
        train_in_group(job(tmp_path / "one"))
        launch(train_in_group, job(tmp_path / "two"), 2)
    one, two = (final_weights(tmp_path / name) for name in ("one", "two"))
    start = trainer_of(run, tmp_path / "start")
    start.initialize()
    moved = max(float((one[key] - value).abs().max()) for key, value in start.network.state_dict().items())
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4 * moved, rtol=0)
    written = {path.name.split("_2")[0] for path in (tmp_path / "two" / "fold_0").iterdir()}
    assert {"checkpoint_final.pth", "progress.png", "training_log"} <= written
    assert len(list((tmp_path / "two" / "fold_0").glob("training_log*"))) == 1


@dataclass(frozen=True)
class Wrong:
    device: torch.device = CPU


def refuse(job: Wrong) -> None:
    raise UserError("a.nii.gz: is empty; remove it")


def test_an_error_of_the_user_in_a_process_is_one_here():
    with pytest.raises(UserError, match="a.nii.gz: is empty; remove it"):
        launch(refuse, Wrong(), 2)


def test_a_batch_that_cannot_be_divided_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_trainer, "world_size", lambda: 2)
    trainer = trainer_of(run, tmp_path / "model", batch_size=3)
    with pytest.raises(ArgumentError, match=r"batch_size must be a multiple of num_gpus \(2\), got 3"):
        trainer.initialize()
