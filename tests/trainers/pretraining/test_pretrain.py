"""The training loop end to end on a toy data set: stages, checkpoints, resuming, several processes, nnU-Net's command."""

import csv
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.checkpoint import read_checkpoint
from nnssl.cli.info import explain_checkpoint, explain_installation
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.methods import METHODS
from nnssl.networks.backbone import build_network
from nnssl.paths import resolve_folders
from nnssl.plan import read_plan
from nnssl.weights.adaptation_plan import KEY
from tests.nnssl.weights.test_formats import assert_mic_dkfz_reads
from tests.trainers.conftest import NAME, plan_toy
from trainers.pretraining import patches, pretrain_trainer, stopping
from trainers.pretraining.pretext import RepRecContrastiveTrainer
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings
from trainers.pretraining.stopping import StopRequest

CONFIGURATION = "3d_fullres_hybrid"


def run(folders, *overrides, **arguments) -> Path:
    return pretrain(
        "reprec",
        NAME,
        PretrainSettings(configuration=CONFIGURATION, overrides=overrides, workers=0, device="cpu", **arguments),
        folders,
    )


def folder_of(folders, stage: str, configuration: str = CONFIGURATION) -> Path:
    return folders.results / NAME / f"RepRec{stage}Trainer__nnsslPlans__{configuration}" / "fold_all"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    content, _ = read_checkpoint(path)
    found = dict(content["network_weights"])
    found |= {f"method/{k}": v for k, v in content["nnssl"]["state"]["method"].items()}
    for index, entry in content["optimizer_state"]["state"].items():
        found |= {f"optimizer/{index}/{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return found


def assert_same(first: dict, second: dict, **tolerance) -> None:
    assert set(first) == set(second)
    for key in first:
        if tolerance:
            assert torch.allclose(first[key], second[key], **tolerance), key
        else:
            assert torch.equal(first[key], second[key]), key


def test_a_later_stage_alone_starts_from_random_weights(toy):
    final = run(toy, stages=("reprec.generative",))
    assert final == folder_of(toy, "Generative") / "checkpoint_final.pth"
    assert not folder_of(toy, "Contrastive").exists()
    assert read_checkpoint(final)[1].init is None


@pytest.mark.figures
def test_both_stages_and_what_they_leave(toy):
    final = run(toy)
    contrastive, generative = (
        folder_of(toy, stage) / "checkpoint_final.pth" for stage in ("Contrastive", "Generative")
    )
    assert final == generative
    for path, stage in ((contrastive, "reprec.contrastive"), (generative, "reprec.generative")):
        content = torch.load(path, weights_only=True)
        assert content["trainer_name"] == "nnUNetTrainer"
        _, provenance = read_checkpoint(path)
        assert (provenance.stage, provenance.step, provenance.finished) == (stage, 6, True)
        assert provenance.cases == tuple(f"toy_{number:02}" for number in range(6))
        assert not (path.parent / "checkpoint_latest.pth").exists()
        assert (path.parent / "progress.png").stat().st_size > 5000
        rows = list(csv.DictReader((path.parent / "metrics.csv").open()))
        assert [row["epoch"] for row in rows] == ["0", "1"]
        # The retrieval of views is measured before the first and after the last epoch only.
        sparse = {name for name in rows[0] if name.startswith("retrieval_")}
        assert all(math.isfinite(float(value)) for row in rows for name, value in row.items() if name not in sparse)
        assert all(0 <= float(rows[-1][name]) <= 1 and rows[0][name] == "" for name in sparse)
        assert {"retrieval_pooled", "retrieval_points_random", "retrieval_pooled_encoder_0"} <= sparse
        assert not any(name.startswith("retrieval_pooled_decoder") for name in sparse)  # RepRec does not pretrain it
        measured = json.loads((path.parent / "retrieval.json").read_text())
        assert [entry["epochs"] for entry in measured["history"]] == [0, 2]
        assert not measured["set_aside"]
        assert measured == content["nnssl"]["state"]["retrieval"]
        if stage == "reprec.contrastive":  # it starts from random weights
            assert measured["history"][0]["stages"] == measured["random_weights"]
        assert {"loss", "head_std", "head_rank", "learning_rate", "data_wait_share"} <= set(rows[0])
        described = json.loads((path.parent / "run.json").read_text())
        assert described["settings"]["epochs"] == {"value": 2, "origin": "plan"}
        assert described["settings"]["weight_decay"]["origin"] == "method default"
        assert any(path.parent.glob("training_log_*.txt"))
    # Stage 2 uses the encoder of stage 1 and does not change it.
    first, second = tensors_of(contrastive), tensors_of(generative)
    encoder = [key for key in first if key.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(first[key], second[key]) for key in encoder)
    assert read_checkpoint(generative)[1].init == str(contrastive)
    moved = [k for k in second if k.startswith("transformer.blocks") and not torch.equal(first[k], second[k])]
    assert moved
    assert float(first["transformer.gate"]) == 0.0
    assert float(second["transformer.gate"]) == 1.0
    parts = "encoder.stages.0 to 2, decoder.encoder.stages.0 to 2, transformer.embed., transformer.blocks."
    assert f"  pretrained parts: {parts}; all others" in "\n".join(explain_checkpoint(final))


def test_final_checkpoint_is_what_stock_nnunet_takes(toy):
    final = run(toy)
    manager = PlansManager(read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet)
    weights = read_checkpoint(final)[0]["network_weights"]
    for configuration in (CONFIGURATION, "3d_fullres"):
        network = nnUNetTrainer.build_network_architecture(
            manager, manager.get_configuration(configuration), 1, 5, True
        )
        load_pretrained_weights(network, str(final))
        state = network.state_dict()
        kept = [key for key in state if ".seg_layers." not in key]
        assert all(torch.equal(state[key], weights[key]) for key in kept)
        assert any("transformer" in key for key in kept) == (configuration == CONFIGURATION)


def test_final_checkpoint_is_what_readers_of_adaptation_plans_take(toy):
    """Opened as they do: encoder and stem load strictly into the network that the plan alone describes."""
    content = torch.load(run(toy), weights_only=True)
    plan = content[KEY]
    assert_mic_dkfz_reads(plan, "hybrid")
    named = plan["architecture_plans"]
    described = {
        "network_class_name": named["arch_class_name"],
        "arch_kwargs": named["arch_kwargs"],
        "_kw_requires_import": named["arch_kwargs_requiring_import"],
    }
    network = build_network(described, plan["pretrain_num_input_channels"], 3, 1)
    for part in (plan["key_to_encoder"], plan["key_to_stem"]):
        weights = {
            name.removeprefix(f"{part}."): value
            for name, value in content["network_weights"].items()
            if name.startswith(f"{part}.")
        }
        network.get_submodule(part).load_state_dict(weights, strict=True)


def test_finished_stages_are_skipped_and_other_settings_are_refused(toy):
    final = run(toy)
    before = final.stat().st_mtime_ns
    said = []
    with lines_to(said.append):
        run(toy)
    assert final.stat().st_mtime_ns == before
    assert sum("already finished" in line for line in said) == 2
    with pytest.raises(UserError, match=r"other settings \(temperature 0.2 -> 0.1\); use restart"):
        run(toy, "temperature=0.1")
    run(toy, "temperature=0.1", restart=True)
    assert final.stat().st_mtime_ns != before


def test_ctrl_c_saves_at_the_step_and_then_interrupts(toy, monkeypatch):
    original = pretrain_trainer.PretrainTrainer.train_step

    def interrupted(self, batch):
        if self.current_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # it may arrive twice, from the terminal and from a parent
        return original(self, batch)

    monkeypatch.setattr(pretrain_trainer.PretrainTrainer, "train_step", interrupted)
    said: list[str] = []
    with lines_to(said.append), pytest.raises(KeyboardInterrupt):
        run(toy)
    assert read_checkpoint(folder_of(toy, "Contrastive") / "checkpoint_latest.pth")[1].step == 2
    assert "Received Ctrl-C: saved at step 2; run the same command again to resume" in said
    assert not list(folder_of(toy, "Contrastive").parent.glob(".*.lock"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_for_the_step(monkeypatch):
    monkeypatch.setattr(stopping, "IMPATIENT_S", -1.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stage", ["Contrastive", "Generative"])
@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.nightly), 3, pytest.param(4, marks=pytest.mark.nightly)]
)
def test_stopped_run_ends_bit_identical(toy, monkeypatch, stage, step):
    """After SIGTERM in the middle or at the end of an epoch, a run resumes and ends like one that was never stopped."""
    final = run(toy)
    expected = {
        name: tensors_of(folder_of(toy, name) / "checkpoint_final.pth") for name in ("Contrastive", "Generative")
    }
    wanted = f"RepRec{stage}Trainer"
    original = pretrain_trainer.PretrainTrainer.train_step

    def interrupted(self, batch):
        if type(self).__name__ == wanted and self.current_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(pretrain_trainer.PretrainTrainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(toy, restart=True)
    assert stopped.value.code == 143
    latest = folder_of(toy, stage) / "checkpoint_latest.pth"
    assert read_checkpoint(latest)[1].step == step
    assert not final.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    monkeypatch.setenv("NNSSL_PRECISION", "float32")
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(getattr(toy, name)))
    run(toy)
    for name, tensors in expected.items():
        assert_same(tensors_of(folder_of(toy, name) / "checkpoint_final.pth"), tensors)
    rows = list(csv.DictReader((folder_of(toy, stage) / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]


@pytest.mark.parametrize("start", ["warm_start", pytest.param("cold_start", marks=pytest.mark.nightly)])
def test_two_processes_equal_one(toy, request, start):
    """Equal weights, teacher and optimizer after both stages show that all gradients and draws are the same.

    SGD is used because AdamW amplifies the rounding noise of gradients that are zero (a bias before a norm).
    """
    if start == "cold_start":
        request.getfixturevalue(start)
    sgd = ("optimizer=sgd", "learning_rate=0.001")
    run(toy, *sgd)
    alone = {name: tensors_of(folder_of(toy, name) / "checkpoint_final.pth") for name in ("Contrastive", "Generative")}
    run(toy, *sgd, restart=True, num_gpus=2)
    for name, tensors in alone.items():
        together = tensors_of(folder_of(toy, name) / "checkpoint_final.pth")
        # The head divides by the spread of pooled features, some thousandths, which enlarges the rounding of gradients.
        for prefix, atol in ((True, 2e-4), (False, 2e-5)):
            first, second = (
                {key: value for key, value in each.items() if key.startswith("optimizer") == prefix}
                for each in (together, tensors)
            )
            assert_same(first, second, rtol=1e-3, atol=atol)


def test_readers_end_with_a_failed_step(toy, monkeypatch):
    """Readers that outlive a failed step would keep the process from ending, and the failure would not be reported."""

    def fail(self, batch):
        raise ZeroDivisionError

    monkeypatch.setattr(pretrain_trainer.PretrainTrainer, "train_step", fail)
    with pytest.raises(ZeroDivisionError):
        pretrain("reprec", NAME, PretrainSettings(configuration=CONFIGURATION, workers=1), toy)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "setting", ["temperature=0", "epochs=0", "batch_size=0", "crop_fraction=2,3", "mask_ratio=1", "mask_block=1,1"]
)
def test_values_out_of_range_are_refused(toy, setting):
    with pytest.raises(
        UserError, match=f"^{setting.partition('=')[0]} must (be|have) .*, got {setting.partition('=')[2]}$"
    ):
        run(toy, setting)


def test_odd_batch_is_refused_on_two_processes(toy):
    with pytest.raises(
        UserError, match=r"batch_size of .* must be a multiple of 2 for 2 processes, got 3; set batch_size=2"
    ):
        run(toy, "batch_size=3", num_gpus=2)


def test_seed_decides_everything(toy):
    first = tensors_of(run(toy))
    assert_same(tensors_of(run(toy, restart=True)), first)
    other = tensors_of(run(toy, restart=True, seed=1))
    assert not torch.equal(other["transformer.embed.weight"], first["transformer.embed.weight"])


def test_two_dimensions_and_two_channels(nnunet_folders):
    """Train on slices with two channels, in bfloat16 if the CPU supports it."""
    folders = resolve_folders()
    plan_toy(folders, channels=2)
    final = pretrain("reprec", NAME, PretrainSettings(configuration="2d_hybrid", workers=0), folders)
    content, provenance = read_checkpoint(final)
    assert provenance.configuration == "2d_hybrid"
    assert content["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2


def test_nnunets_own_command_runs_the_same_training(toy, monkeypatch):
    """nnUNetv2_train with nnUNet_extTrainer ends with the same tensors as nnssl_pretrain with the same seed."""
    from nnunetv2.run.run_training import run_training

    monkeypatch.setattr(patches, "default_workers", lambda device: 0)
    run(toy)
    expected = tensors_of(folder_of(toy, "Contrastive") / "checkpoint_final.pth")
    line = next(line for line in _ext_trainer_lines() if line.startswith("export nnUNet_extTrainer="))
    monkeypatch.setenv("nnUNet_extTrainer", line.partition("=")[2])
    for stage in ("Contrastive", "Generative"):
        for file in folder_of(toy, stage).glob("checkpoint*"):
            file.unlink()
    run_training("501", CONFIGURATION, "all", "RepRecContrastiveTrainer", "nnsslPlans", device=torch.device("cpu"))
    assert_same(tensors_of(folder_of(toy, "Contrastive") / "checkpoint_final.pth"), expected)


def _ext_trainer_lines() -> list[str]:
    import contextlib
    import io

    from nnssl.cli.info import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["--ext-trainer"]) == 0
    return out.getvalue().splitlines()


def test_data_set_planned_last_is_taken_and_said(toy):
    said = []
    from trainers.pretraining.pretrain import find_plan

    with lines_to(said.append):
        assert find_plan(toy, None, "nnsslPlans").parent.name == NAME
    assert said == [f"Using the data set that was planned last: {NAME}"]


def test_wrong_inputs_are_one_line(toy, tmp_path):
    def message(function, *args, **kwargs) -> str:
        with pytest.raises(UserError) as error:
            function(*args, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"Unknown method 'nosuch'. Available methods: {', '.join(sorted(METHODS))}" in message(
        pretrain, "nosuch", NAME, None, toy
    )
    assert "data set Dataset777_No was not found" in message(pretrain, "reprec", "Dataset777_No", None, toy)
    (toy.raw / "Dataset777_No").mkdir(parents=True)
    for wanted in ("Dataset777_No", 777):  # its number as well as its name
        assert "run nnssl_plan_and_preprocess -d Dataset777_No" in message(pretrain, "reprec", wanted, None, toy)
    for wanted, expected in (
        ("3d_fullres", "needs a convolutional U-Net with a transformer"),
        ("4d", "has no configuration '4d'"),
    ):
        assert expected in message(pretrain, "reprec", NAME, PretrainSettings(configuration=wanted), toy)
    assert "Unknown setting 'colour'" in message(run, toy, "colour=blue")
    assert "epochs must be of type int, got many" in message(run, toy, "epochs=many")
    empty = tmp_path / "results2"
    empty.mkdir()
    plans = {**read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet, "continue_training": False}
    dataset_json = json.loads((toy.preprocessed / NAME / "dataset.json").read_text())
    assert "fold must be 'all'" in message(
        RepRecContrastiveTrainer, dict(plans), CONFIGURATION, 0, dataset_json, torch.device("cpu")
    )
    # stage 2 without stage 1
    from trainers.pretraining.pretext import RepRecGenerativeTrainer

    trainer = RepRecGenerativeTrainer(dict(plans), CONFIGURATION, "all", dataset_json, torch.device("cpu"))
    assert "starts from these weights; run nnssl_pretrain -m reprec" in message(trainer.initialize)


def test_weights_of_another_plan_are_refused(toy, nnunet_folders):
    final = run(toy)
    path = toy.preprocessed / NAME / "nnsslPlans.json"
    content = json.loads(path.read_text())
    hybrid = content["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    hybrid["features_per_stage"] = [2 * n for n in hybrid["features_per_stage"]]
    other = toy.preprocessed / NAME / "otherPlans.json"
    content["plans_name"] = "otherPlans"
    other.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"checkpoint_final.pth: only \d+.\d% of the encoder's parameters .*--like"):
        run(toy, init=final, plans_name="otherPlans")


def test_init_starts_from_the_weights(toy, monkeypatch):
    final = run(toy)
    weights = read_checkpoint(final)[0]["network_weights"]
    seen = {}

    def watch(self):
        seen.update({k: v.clone() for k, v in self.network.state_dict().items()})
        raise SystemExit

    monkeypatch.setattr(RepRecContrastiveTrainer, "on_train_start", lambda self: (self.initialize(), watch(self)))
    with pytest.raises(SystemExit):
        _start_elsewhere(toy, final)
    assert torch.equal(
        seen["encoder.stages.0.0.convs.0.conv.weight"], weights["encoder.stages.0.0.convs.0.conv.weight"]
    )


def _start_elsewhere(toy, final: Path) -> None:
    """Start stage 1 again, from a copy of the weights."""
    copy = final.parent.parent.parent / "copy.pth"
    copy.write_bytes(final.read_bytes())
    run(toy, init=copy, restart=True)


def test_info_lists_methods_and_folders(toy):
    lines = "\n".join(explain_installation())
    assert "reprec: Representation Recovering" in lines
    assert f"nnUNet_results: {toy.results}" in lines
