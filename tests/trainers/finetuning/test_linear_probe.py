"""Linear probe: which tensors change, by what rule, and that stock nnU-Net predicts with the result."""

import copy

import pytest
import torch

from nnssl.errors import UserError
from nnssl.log import lines_to
from tests.trainers.finetuning.runs import (
    CASES,
    DATASET,
    assert_stock_nnunet_predicts_the_same,
    final_weights,
    finetune_and_catch_trainers,
    is_segmentation_layer,
    killed_and_resumed,
    trainer_of,
    weights_of,
)
from tests.trainers.tiny_plan import tiny_plan, write_weights
from trainers.finetuning.finetune import finetune
from trainers.finetuning.linear_probe import LinearProbeTrainer
from trainers.finetuning.pretrained_weights import load_weights
from trainers.finetuning.result import read_result
from trainers.finetuning.settings import FinetuneSettings

LAYER = "decoder.seg_layers.1."
"""The segmentation layer of full resolution in the tiny network."""
HEAD = {f"{LAYER}weight", f"{LAYER}bias"}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("NNSSL_PRECISION", "float32")


def probe_of(run, folder, **changes):
    return trainer_of(run, folder, trainer_class=LinearProbeTrainer, optimizer="adam", **changes)


def test_only_the_last_segmentation_layer_changes(run, tmp_path):
    trainer = probe_of(run, tmp_path)
    load_weights(trainer, weights_of(run))
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.run_training()
    saved = final_weights(tmp_path)
    assert set(saved) == set(before) == set(run.tensors)
    assert {key for key, value in saved.items() if not torch.equal(value, before[key])} == HEAD
    for key, value in run.tensors.items():
        assert is_segmentation_layer(key) or torch.equal(saved[key], value), key


def test_features_are_those_of_prediction_and_have_no_graph(run, tmp_path):
    """With batch normalisation, whose stored statistics training mode would move."""
    trainer = probe_of(run, tmp_path, norm_op="BatchNorm3d")
    trainer.initialize()
    before = copy.deepcopy(trainer.network.state_dict())
    assert any("running_mean" in key for key in before)
    seen = []
    original = trainer.batch_loss

    def watched(batch):
        head = trainer.network.decoder.seg_layers[-1]
        with head.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad)):
            return original(batch)

    trainer.batch_loss = watched
    trainer.run_training()
    after = trainer.network.state_dict()
    assert {key for key, value in after.items() if not torch.equal(value, before[key])} == HEAD
    assert seen == [False] * 4


def test_linear_probe_is_adam_on_a_linear_layer(run, tmp_path):
    """One epoch by hand: the same layer on the same features, with a fresh Adam at the schedule's learning rates."""
    trainer = probe_of(run, tmp_path / "model")
    load_weights(trainer, weights_of(run))
    batches = list(copy.copy(trainer).get_dataloaders()[0])
    network = copy.deepcopy(trainer.network)
    trainer.run_training()
    features = {}
    network.decoder.stages[-1].register_forward_hook(lambda module, args, output: features.update(last=output.detach()))
    layer = network.decoder.seg_layers[-1]
    optimizer = torch.optim.Adam(layer.parameters(), lr=1.0)
    for step, batch in enumerate(batches):
        network(batch["data"])
        loss = trainer.loss(layer(features["last"]), batch["target"])
        optimizer.param_groups[0]["lr"] = 0.01 * [0.5, 1, 1, 0.5**0.9][step]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 12)
        optimizer.step()
    found = trainer.network.decoder.seg_layers[-1]
    torch.testing.assert_close(found.weight, layer.weight, atol=1e-6, rtol=1e-5)


def test_a_killed_probe_goes_on_and_ends_with_the_same_weights(run, tmp_path):
    def make(folder, **options):
        return probe_of(run, folder, epochs=3, **options)

    whole = make(tmp_path / "whole")
    whole.run_training()
    latest, found, _ = killed_and_resumed(make, tmp_path / "killed")
    expected = final_weights(tmp_path / "whole")
    assert not torch.equal(latest["network_weights"][f"{LAYER}weight"], expected[f"{LAYER}weight"])
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.nightly
def test_from_the_command_to_what_stock_nnunet_predicts(run, tmp_path, monkeypatch):
    """Both arms: of pretrained and of random features; each predicts with its own."""
    said = []
    options = {**run.arguments, "mode": "linear", "epochs": 1, "warmup": None, "learning_rate": None}
    with lines_to(said.append):
        results, trainers = finetune_and_catch_trainers(monkeypatch, 4, run.weights, **options)
    assert [result.arm for result in results] == ["rep-rec-linear", "scratch-linear"]
    for result, trainer in zip(results, trainers, strict=True):
        assert f"nnssl_{result.arm}_3cases_seed3_" in result.model_folder
        assert read_result(trainer.settings.model_folder / "finetune.json") == result
        assert (result.mode, result.schedule.learning_rate, result.schedule.optimizer) == ("linear", 0.01, "adam")
        assert result.unlabelled_cases == ()
        assert trainer.network.decoder.deep_supervision is False
        assert_stock_nnunet_predicts_the_same(run, result, trainer, tmp_path)
    initial = probe_of(run, tmp_path / "initial")
    initial.initialize()
    for key, value in trainers[1].network.state_dict().items():
        assert torch.equal(value, initial.network.state_dict()[key]) == (key not in HEAD), key
    assert any("held-out cases" in line and "scratch-linear" in line and line.endswith("gain") for line in said)
    assert sum("no pretrained decoder" in line for line in said) == 1


@pytest.mark.nightly
def test_probe_reads_the_pyramid_where_it_was_pretrained(run, tmp_path, monkeypatch):
    """Both arms, from the command to stock nnU-Net: one linear layer on all maps is trained, and everything else stays."""
    weights = run.folder / "results" / "pyramid.pth"
    pretrained = write_weights(weights, tiny_plan(), settings={"features": "pyramid"})
    plan_file = run.folder / "preprocessed" / DATASET / "nnsslPlans.json"
    before = plan_file.read_text()
    said = []
    options = {**run.arguments, "mode": "linear", "epochs": 1, "warmup": None, "learning_rate": None}
    with lines_to(said.append):
        results, trainers = finetune_and_catch_trainers(monkeypatch, 4, weights, **options)
    assert plan_file.read_text() == before
    assert any("all decoder stages and the bottleneck (18 channels)" in line for line in said)
    read = {"bottleneck.seg_layers.0.weight", "decoder.seg_layers.0.weight", *HEAD}
    initial = trainers[1].network.state_dict()
    for result, trainer in zip(results, trainers, strict=True):
        assert "rep-rec-linear" in result.model_folder or "scratch-linear" in result.model_folder
        network = trainer.network
        assert [tuple(p.shape[:2]) for p in network.linear_layer()[:-1]] == [(5, 8), (5, 6), (5, 4)]
        assert {name for name, p in network.named_parameters() if p.requires_grad} == read
        assert torch.equal(network.decoder.seg_layers[0].bias, torch.zeros(5))
        assert_stock_nnunet_predicts_the_same(run, result, trainer, tmp_path)
    for key, value in trainers[0].network.state_dict().items():
        assert is_segmentation_layer(f".{key}") or torch.equal(value, pretrained[key]), key
        assert not is_segmentation_layer(f".{key}") or key not in read or not torch.equal(value, initial[key]), key
    again = finetune(4, weights, FinetuneSettings(**options))
    assert [each.model_folder for each in again] == [each.model_folder for each in results]


def test_an_optimizer_that_a_probe_does_not_have_is_refused(run):
    with pytest.raises(UserError, match="optimizer must be adam in mode linear, got sgd"):
        finetune(4, run.weights, FinetuneSettings(**{**run.arguments, "mode": "linear", "optimizer": "sgd"}))


def test_a_list_of_unlabelled_cases_is_refused(run, tmp_path):
    (tmp_path / "list.txt").write_text(CASES[0])
    options = {**run.arguments, "mode": "linear", "warmup": None, "unlabelled": tmp_path / "list.txt"}
    with pytest.raises(UserError, match="unlabelled can only be given with mode mean_teacher"):
        finetune(4, run.weights, FinetuneSettings(**options))
