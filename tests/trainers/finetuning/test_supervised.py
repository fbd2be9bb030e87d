"""Weights of stock nnU-Net: loaded without its loader, their segmentation layers kept for the same labels."""

import shutil
from pathlib import Path

import pytest
import torch

from nnssl.cli.finetune import main
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json, write_json
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.tensor_names import HEAD
from tests.nnssl.weights.tiny_networks import unet, write_trained
from tests.trainers.finetuning.runs import (
    CPU,
    DATASET,
    SCHEDULE,
    assert_stock_nnunet_predicts_the_same,
    is_segmentation_layer,
    trainer_of,
)
from tests.trainers.finetuning.test_adapted_weights import labelled  # noqa: F401 (a fixture)
from tests.trainers.pretraining.test_pretrain import CONFIGURATION, NAME
from tests.trainers.pretraining.test_pretrain import run as pretrain_toy
from tests.trainers.tiny_plan import tiny_plan
from trainers.finetuning.adapted_weights import adapt_if_made_elsewhere
from trainers.finetuning.finetune import finetune
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.optimisation import choose_parameters
from trainers.finetuning.pretrained_weights import load_weights
from trainers.finetuning.recipes import Choices, make_schedule
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining.pretext import RepRecContrastiveTrainer


def write_stock(path: Path, described: dict, **changes) -> dict[str, torch.Tensor]:
    """Write what stock nnU-Net writes after training the tiny plan with the labels of a ``dataset.json``."""
    plan = {key: value for key, value in tiny_plan("Dataset291_Supervised").items() if key != "pretext"}
    arguments = {
        "plans": plan | {"plans_name": "nnUNetPlans"},
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": described,
        "device": torch.device("cpu"),
    } | changes
    network = arguments["plans"]["configurations"]["3d_fullres"]["architecture"]
    names = list(described["channel_names"].values())
    return write_trained(path, network, 3, names, len(described["labels"]), init_args=arguments)


def with_other_labels(described: dict) -> dict:
    """Return a ``dataset.json`` with the same number of labels under other names."""
    renamed = {name if value == 0 else f"{name}2": value for name, value in described["labels"].items()}
    return {**described, "labels": renamed}


@pytest.mark.parametrize("same", [True, False])
def test_the_network_starts_with_the_weights(run, tmp_path, same):
    described = read_json(run.folder / "preprocessed" / DATASET / "dataset.json", "dataset.json")
    weights = write_stock(tmp_path / "a.pth", described if same else with_other_labels(described))
    source = open_checkpoint(tmp_path / "a.pth")
    assert source.keeps_head(described) is same
    pretrained = (*source.own_provenance.pretrained, *([HEAD] if same else []))
    trainer = trainer_of(run, tmp_path / "model", pretrained=pretrained)
    load_weights(trainer, source.without_content())
    state = trainer.network.state_dict()
    for name, value in weights.items():
        assert torch.equal(state[name], value) is (same or not is_segmentation_layer(name)), name
    chosen = choose_parameters(trainer.network, pretrained, "everything")
    heads = {id(p) for name, p in trainer.network.named_parameters() if is_segmentation_layer(name)}
    assert {id(each) for each in chosen.new} == (set() if same else heads)


def test_weights_of_another_configuration(run, tmp_path):
    described = read_json(run.folder / "preprocessed" / DATASET / "dataset.json", "dataset.json")
    path = tmp_path / "a.pth"
    plan = tiny_plan()
    wide = plan["configurations"]["3d_fullres_wide"]["architecture"]
    plan["configurations"]["3d_fullres"]["architecture"] = wide
    write_stock(path, described, plans=plan)
    with pytest.raises(UserError, match=r"a\.pth: does not fit configuration 3d_fullres \(.* differs\)"):
        load_weights(trainer_of(run, tmp_path / "model"), open_checkpoint(path))


def test_recipes_where_no_layer_is_new():
    """The first phase of sawtooth would train nothing."""
    choices = Choices(epochs=10, iterations_per_epoch=10)
    assert make_schedule("finetune", choices).recipe == "sawtooth"
    schedule = make_schedule("finetune", choices, head=True)
    assert (schedule.recipe, schedule.new_steps, schedule.warmup_steps) == ("warmup", 0, 10)
    assert make_schedule("finetune", choices, "primus", head=True).recipe == "warmup"
    for wrong in ({"recipe": "sawtooth"}, {"trained": "new"}):
        with pytest.raises(ArgumentError, match="their segmentation layers are kept"):
            make_schedule("finetune", Choices(epochs=10, iterations_per_epoch=10, **wrong), head=True)


def test_the_command_takes_them(labelled, monkeypatch, capsys):  # noqa: F811
    """Up to the first step: the plan of the weights is moved, and the network has the weights."""
    described = read_json(labelled / "raw" / DATASET / "dataset.json", "dataset.json")
    weights = write_stock(labelled / "a.pth", described)
    seen = {}

    def watch(trainer):
        seen.update({name: value.clone() for name, value in trainer.network.state_dict().items()})
        seen["settings"] = trainer.settings
        raise SystemExit

    monkeypatch.setattr(FinetuneTrainer, "on_train_start", watch)
    words = ["--labels", "3", "--epochs", "1", "--iterations-per-epoch", "2", "--device", "cpu", "--processes", "1"]
    with pytest.raises(SystemExit):
        main(["-d", "4", "-w", str(labelled / "a.pth"), *words])
    settings = seen.pop("settings")
    assert settings.pretrained == ("decoder.", "encoder.", HEAD)
    assert settings.schedule.recipe == "warmup"
    assert all(torch.equal(seen[name], value) for name, value in weights.items())
    plan = read_json(labelled / "preprocessed" / DATASET / "nnUNetPlans.json", "plan")
    assert plan["configurations"]["3d_fullres"]["spacing"] == [2.5, 1.5, 1.7]
    assert "The segmentation layers are kept" in capsys.readouterr().out


@pytest.mark.nightly
def test_stock_nnunet_predicts_what_was_fine_tuned(labelled, finetuned):  # noqa: F811
    described = with_other_labels(read_json(labelled / "raw" / DATASET / "dataset.json", "dataset.json"))
    write_stock(labelled / "a.pth", described)
    arguments = {**SCHEDULE, "test_cases": finetuned.arguments["test_cases"], "processes": 1, "device": CPU}
    (result,) = finetune(4, labelled / "a.pth", FinetuneSettings(**arguments, labels=3))
    assert result.arm == "supervised"
    assert result.schedule.recipe == "sawtooth"
    assert_stock_nnunet_predicts_the_same(finetuned, result, None, labelled)


@pytest.mark.nightly
def test_another_number_of_channels(labelled):  # noqa: F811
    """The data set is planned around the network, as for weights made elsewhere; the batch size is that of the weights."""
    described = read_json(labelled / "raw" / DATASET / "dataset.json", "dataset.json")
    plan = tiny_plan("Dataset291_Supervised", 2)
    plan["configurations"]["3d_fullres"]["batch_size"] = 3
    two = {**described, "channel_names": {"0": "T1", "1": "T2"}}
    weights = write_stock(labelled / "a.pth", two, plans=plan)
    adapted = adapt_if_made_elsewhere(open_checkpoint(labelled / "a.pth"), DATASET, resolve_folders(), 1)
    planned = adapted.own_provenance.plans["configurations"]["3d_fullres"]
    assert planned["batch_size"] == 3
    assert planned["spacing"] == [2.5, 1.5, 1.7]
    state = adapted.content["network_weights"]
    first, other = "encoder.stages.0.0.convs.0.conv.weight", "decoder.stages.0.convs.0.conv.weight"
    torch.testing.assert_close(state[first], weights[first].sum(1, keepdim=True))
    assert torch.equal(state[other], weights[other])
    assert adapted.keeps_head(described)
    assert torch.equal(adapted.head_for(described)[f"{HEAD}0.weight"], weights[f"{HEAD}0.weight"])


def test_pretraining_goes_on_from_them(toy, tmp_path, monkeypatch):
    """Encoder and decoder, unlike for a file in the adaptation-plan format."""
    plan = read_json(toy.preprocessed / NAME / "nnsslPlans.json", "plan")
    kwargs = plan["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    stock = unet("plain", 3) | {
        "arch_kwargs": {key: value for key, value in kwargs.items() if not key.startswith(("transformer", "token"))}
    }
    weights = write_trained(tmp_path / "a.pth", stock, 3, ["c0"])
    seen = {}

    def watch(trainer):
        trainer.initialize()
        seen.update({name: value.clone() for name, value in trainer.network.state_dict().items()})
        raise SystemExit

    monkeypatch.setattr(RepRecContrastiveTrainer, "on_train_start", watch)
    with pytest.raises(SystemExit):
        pretrain_toy(toy, init=tmp_path / "a.pth")
    names = [name for name in weights if not is_segmentation_layer(name)]
    assert all(torch.equal(seen[name], weights[name]) for name in names)


@pytest.mark.nightly
def test_a_stock_run_passes_through_all(labelled, monkeypatch):  # noqa: F811
    """A training of nnU-Net itself, on its own plans of the phantoms with the residual encoder."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.run.run_training import get_trainer_from_args

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("nnUNet_compile", "f")
    extract_fingerprints([4], num_processes=1)
    plan_experiments([4], experiment_planner_class_name="nnUNetPlannerResEncM")
    name = "nnUNetResEncUNetMPlans"
    path = labelled / "preprocessed" / DATASET / f"{name}.json"
    plan = read_json(path, "plan")
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs |= {"features_per_stage": [4, 6, 8, 8, 8, 8][: kwargs["n_stages"]]}
    write_json(path, plan)
    preprocess([4], name, configurations=["3d_fullres"], num_processes=[1])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = get_trainer_from_args("4", "3d_fullres", 0, "nnUNetTrainer", name, device=CPU)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.run_training()
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    weights = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    alone = shutil.copy(final, labelled / "alone.pth")
    source = open_checkpoint(Path(alone))
    assert all(torch.equal(value, weights[key]) for key, value in source.content["network_weights"].items())
    said: list[str] = []
    with lines_to(said.append):
        done = export(alone, ExportSettings(out=labelled / "o.pth")).path
    state = torch.load(done, weights_only=True)["network_weights"]
    assert all(torch.equal(value, weights[key]) for key, value in state.items())
