"""Weights that were made elsewhere: fine-tuned on a data set that is planned around them, and pretrained further."""

import pytest
import torch

from nnssl.checkpoint import read_checkpoint
from nnssl.cli.finetune import main
from nnssl.cli.info import explain_checkpoint
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.log import lines_to
from nnssl.networks.backbone import build_network
from nnssl.paths import resolve_folders
from nnssl.plan import read_plan
from nnssl.weights.adaptation_plan import KEY, write_adaptation_plan
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from nnssl.weights.opened_checkpoint import open_checkpoint
from planners.foreign_planner import plan_for_network
from tests.nnssl.weights.tiny_networks import plans, primus, unet, write_plans
from tests.trainers.finetuning.runs import CPU, DATASET, SCHEDULE, folders_set
from tests.trainers.pretraining.test_pretrain import CONFIGURATION, NAME
from tests.trainers.pretraining.test_pretrain import run as pretrain_toy
from trainers.benchmark.leaks import seen_by_checkpoint
from trainers.finetuning.adapted_weights import adapt_if_made_elsewhere
from trainers.finetuning.finetune import finetune
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining.pretext import RepRecContrastiveTrainer


def write_elsewhere(path, network, channels=2, patch=(8, 24, 16), spacing_mm=(2.0, 1.5, 1.5)):
    """A checkpoint as other programs write it, without anything of nnssl, and its weights."""
    built = build_network(network, channels, 2, 5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    plan, _ = write_adaptation_plan(network, "3d_fullres", patch, spacing_mm, channels)
    torch.save({"network_weights": built.state_dict(), KEY: plan, "citations": []}, path)
    return built.state_dict()


@pytest.fixture
def labelled(finetuned, tmp_path):
    """The phantoms with labels, not planned yet."""
    for name in ("preprocessed", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "raw").symlink_to(finetuned.folder / "raw")
    with folders_set(tmp_path):
        yield tmp_path


@pytest.mark.nightly
def test_finetuning(labelled):
    weights = write_elsewhere(labelled / "mae.pth", unet("residual", 3))
    content = torch.load(labelled / "mae.pth", weights_only=True)
    content[KEY]["architecture_plans"]["arch_kwargs"]["features_per_stage"] = (4, 6, 8)  # tuples are allowed
    torch.save(content, labelled / "mae.pth")
    said = []
    arguments = {**SCHEDULE, "labels": 3, "processes": 1, "device": CPU}
    with lines_to(said.append):
        (result,) = finetune(4, labelled / "mae.pth", FinetuneSettings(**arguments))
    assert result.configuration == "3d_fullres"
    folder = labelled / "preprocessed" / DATASET
    plan = read_json(folder / f"{result.plans_name}.json", "plan")["configurations"]["3d_fullres"]
    assert plan["spacing"] == [2.0, 1.5, 1.5]
    assert plan["patch_size"] == [8, 24, 16]
    assert any("2 to 1 channels by mean" in line for line in said)
    state = read_checkpoint(folder / f"{result.plans_name}_weights.pth")[0]["network_weights"]
    name = (
        "eva.blocks.1.mlp.fc2.weight" if "eva.pos_embed" in weights else "encoder.stages.2.blocks.1.conv2.conv.weight"
    )
    assert torch.equal(state[name], weights[name])
    assert len(result.train_cases) == 3
    said.clear()
    with lines_to(said.append):
        finetune(4, labelled / "mae.pth", FinetuneSettings(**arguments))
    assert any("Plan and weights exist already" in line for line in said)
    assert any("finished already" in line for line in said)


@pytest.mark.nightly
def test_primus_has_a_plan_with_a_last_layer_for_any_classes(labelled):
    weights = write_elsewhere(labelled / "mae.pth", primus(), channels=1)
    path = adapt_if_made_elsewhere(open_checkpoint(labelled / "mae.pth"), DATASET, resolve_folders(), 1).path
    content, provenance = read_checkpoint(path)
    name = provenance.plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"]
    assert name == "nnssl.networks.primus.PlannedPrimus"
    for part in ("eva.blocks.1.mlp.fc2.weight", "eva.pos_embed", "down_projection.proj.weight"):
        assert torch.equal(content["network_weights"][part], weights[part])


@pytest.mark.nightly
def test_a_patch_is_not_longer_than_the_images(labelled):
    from trainers.finetuning.labelled_data import make_fingerprint

    folders = resolve_folders()
    make_fingerprint(DATASET, folders, 1)
    # phantoms of 24 x 32 x 28 voxels; strides of 2 x 4 x 4
    plan = plan_for_network(unet("residual", 3), (160, 160, 160), None, DATASET, "aPlans", folders)
    configuration = plan["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [24, 32, 28]
    assert not (labelled / "preprocessed" / DATASET / "aPlans.json").exists()
    coarse = [mm * 3 for mm in configuration["spacing"]]
    plan = plan_for_network(primus(), (160, 160, 160), coarse, DATASET, "aPlans", folders)["configurations"][
        "3d_fullres"
    ]
    assert plan["patch_size"] == plan["architecture"]["arch_kwargs"]["input_shape"] == [8, 16, 16]
    with pytest.raises(UserError, match="use weights for 3D images"):
        plan_for_network(unet("plain", 2), (16, 16), None, DATASET, "aPlans", folders)


def test_files_that_are_no_weights(nnunet_folders, capsys):
    torch.save({"network_weights": {}}, nnunet_folders / "other.pth")
    (nnunet_folders / "raw" / DATASET).mkdir()
    assert main(["-d", "4", "-w", str(nnunet_folders / "other.pth"), "--device", "cpu"]) == 2
    assert "other.pth: has weights of a training but no plans" in capsys.readouterr().err


def test_pretraining_goes_on_from_weights_made_elsewhere(toy, tmp_path, monkeypatch):
    plan = read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet
    network = plan["configurations"][CONFIGURATION]["architecture"]
    kwargs = {
        key: value for key, value in network["arch_kwargs"].items() if not key.startswith(("transformer", "token"))
    }
    stock = network | {
        "arch_kwargs": kwargs,
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    }
    weights = write_elsewhere(tmp_path / "mae.pth", stock)
    seen = {}

    def watch(self):
        self.initialize()
        seen.update({name: value.clone() for name, value in self.network.state_dict().items()})
        raise SystemExit

    monkeypatch.setattr(RepRecContrastiveTrainer, "on_train_start", watch)
    with pytest.raises(SystemExit):
        pretrain_toy(toy, init=tmp_path / "mae.pth")
    first = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(seen[first], weights[first].sum(1, keepdim=True))
    assert torch.equal(
        seen["encoder.stages.1.0.convs.0.conv.weight"], weights["encoder.stages.1.0.convs.0.conv.weight"]
    )
    # the decoder of such a file is not known to be pretrained
    name = "decoder.stages.0.convs.0.conv.weight"
    assert not torch.equal(seen[name], weights[name])


def test_info_explains_them(tmp_path):
    write_elsewhere(tmp_path / "mae.pth", unet("residual", 3))
    lines = "\n".join(explain_checkpoint(tmp_path / "mae.pth"))
    for text in (
        "made elsewhere",
        "ResidualEncoderUNet",
        "2 channel(s)",
        "patch 8x24x16",
        "nnssl_export",
        "nnssl_finetune",
    ):
        assert text in lines, text


def test_what_weights_made_elsewhere_have_seen_is_not_known(toy, tmp_path):
    write_elsewhere(tmp_path / "mae.pth", unet("residual", 3), channels=1)
    said = []
    with lines_to(said.append):
        assert seen_by_checkpoint(tmp_path / "mae.pth", toy, None) == []
    assert "cannot be checked" in said[0]
    path = write_plans(tmp_path / "user", plans(unet("residual", 3), 3, 1), ["CT"])
    adapted = export(tmp_path / "mae.pth", ExportSettings(for_plans=str(path), out=tmp_path / "o.pth"), toy).path
    with lines_to(said.append):
        assert seen_by_checkpoint(adapted, toy, None) == []
    assert len(said) == 2
