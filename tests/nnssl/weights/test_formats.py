"""What an export leaves: the adaptation plan key by key, a folder for a hub, an encoder for plain PyTorch; and reading them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nnssl.checkpoint import read_checkpoint, write_checkpoint
from nnssl.cli.export import main
from nnssl.cli.info import explain_checkpoint
from nnssl.errors import UserError
from nnssl.files import write_json
from nnssl.networks.backbone import build_network
from nnssl.paths import Folders
from nnssl.weights.adaptation_plan import KEY, RESENC_L, read_adaptation_plan, write_adaptation_plan
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from nnssl.weights.opened_checkpoint import open_checkpoint
from tests.nnssl.weights.tiny_networks import architecture, plans, primus, unet, write_plans, write_source

ENDS = ("PlainConvUNet", "ResidualEncoderUNet", "Primus", "PrimusS", "PrimusM", "PrimusL", "PrimusB", "ResEncL")


@pytest.fixture
def folders(tmp_path):
    return Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")))


def exported(tmp_path, folders, kind="residual", dim=3, **options):
    write_source(tmp_path / "a.pth", architecture(kind, dim), dim, ["CT"])
    path = write_plans(tmp_path / "user", plans(architecture(kind, dim), dim, 2), ["CT", "PET"])
    return export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), **options), folders).path


@pytest.mark.parametrize(("kind", "dim"), [("plain", 2), ("plain", 3), ("residual", 3), ("hybrid", 3), ("primus", 3)])
def test_adaptation_plan_key_by_key(tmp_path, folders, kind, dim):
    """Keys and types are those that nnU-Net's main branch reads, from a file that opens with ``weights_only``."""
    path = exported(tmp_path, folders, kind, dim, out=tmp_path / "out.pth")
    content = torch.load(path, weights_only=True)
    for each in content["citations"]:
        assert set(each) == {"type", "name", "apa_citations"}
        assert all(isinstance(text, str) for text in each["apa_citations"])
    plan = content[KEY]
    network = build_network(architecture(kind, dim), 2, 3, 0)
    names = plan["architecture_plans"]
    assert set(names) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert names["arch_class_name"].endswith(ENDS)
    assert type(names["arch_kwargs"]) is dict
    assert type(names["arch_kwargs_requiring_import"]) is list
    for key in names["arch_kwargs_requiring_import"]:
        assert names["arch_kwargs"][key] is None or type(names["arch_kwargs"][key]) is str
    (first,) = plan["pretrain_plan"]["configurations"].values()
    assert [type(n) for n in first["patch_size"]] == [int] * dim
    assert [type(mm) for mm in first["spacing"]] == [float] * dim
    assert plan["pretrain_num_input_channels"] == 2
    assert plan["recommended_downstream_patchsize"] == plan["pretrain_patch_size"] == first["patch_size"]
    assert plan["architecture_kwargs"] == names["arch_kwargs"]
    parts = [plan["key_to_encoder"], plan["key_to_stem"], *plan["keys_to_in_proj"]]
    for part in parts:
        network.get_submodule(part)
    weights = {content["network_weights"][f"{key}.weight"].data_ptr() for key in plan["keys_to_in_proj"]}
    assert len(weights) == 1
    assert plan["key_to_lpe"] is None or plan["key_to_lpe"] in content["network_weights"]
    assert (plan["key_to_lpe"] == "eva.pos_embed") == (kind == "primus")
    assert_mic_dkfz_reads(plan, kind)
    assert set(plan) == {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe", "pretrain_patch_size", "architecture_kwargs",
    }  # fmt: skip


def assert_mic_dkfz_reads(plan, kind):
    """``AdaptationPlan.from_dict`` of MIC-DKFZ's package passes these keys to dataclasses, which accept no others."""
    pretraining = plan["pretrain_plan"]
    assert set(pretraining) == {
        "dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer", "transpose_forward",
        "transpose_backward", "configurations", "experiment_planner_used",
    }  # fmt: skip
    for configuration in pretraining["configurations"].values():
        assert set(configuration) == {
            "data_identifier", "preprocessor_name", "spacing_style", "normalization_schemes", "use_mask_for_norm",
            "resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_mask", "resampling_fn_mask_kwargs", "spacing",
            "patch_size",
        }  # fmt: skip
        assert configuration["spacing_style"] in ("onemmiso", "median", "noresample")
        assert None not in configuration.values()
        assert set(configuration["resampling_fn_mask_kwargs"]) == set(configuration["resampling_fn_data_kwargs"])
    if kind == "residual":
        assert set(plan["architecture_plans"]["arch_kwargs"]) == {
            "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_blocks_per_stage",
            "n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs", "nonlin",
            "nonlin_kwargs",
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "residual", "hybrid"])
def test_the_network_of_an_adaptation_plan_holds_the_encoder(tmp_path, folders, kind):
    """Built from what the plan says alone, its stem and encoder load strictly."""
    content = torch.load(exported(tmp_path, folders, kind, out=tmp_path / "out.pth"), weights_only=True)
    plan = content[KEY]
    named = plan["architecture_plans"]
    described = {
        "network_class_name": named["arch_class_name"],
        "arch_kwargs": named["arch_kwargs"],
        "_kw_requires_import": named["arch_kwargs_requiring_import"],
    }
    network = build_network(described, 2, 3, 1)
    for part in (plan["key_to_encoder"], plan["key_to_stem"]):
        weights = {
            name.removeprefix(f"{part}."): value
            for name, value in content["network_weights"].items()
            if name.startswith(f"{part}.")
        }
        network.get_submodule(part).load_state_dict(weights, strict=True)


def test_sizes_with_a_name():
    stock = primus(embed_dim=864, eva_depth=16, eva_numheads=12, patch_embed_size=[8, 8, 8])
    plan, remark = write_adaptation_plan(stock, "3d_fullres_primus", [8, 24, 16], [1, 1, 1], 1)
    assert plan["architecture_plans"] == {
        "arch_class_name": "PrimusM", "arch_kwargs": None, "arch_kwargs_requiring_import": None,
    }  # fmt: skip
    assert remark == ""
    plan, remark = write_adaptation_plan(primus(), "3d", [8, 24, 16], [1, 1, 1], 1)
    assert "four sizes" in remark
    written = plan["architecture_plans"]["arch_kwargs"]
    assert written["encoder_eva_depth"] == written["eva_depth"] == 2
    assert written["encoder_eva_numheads"] == written["eva_numheads"] == 3
    network = build_network(primus(), 1, 2, 0)
    scale = network.state_dict()["eva.blocks.0.gamma_1"]
    assert (scale == written["init_values"]).all()
    assert written["scale_attn_inner"] is any("attn.norm" in name for name in network.state_dict())
    assert "transformer" in write_adaptation_plan(unet("hybrid", 3), "3d", [8, 24, 16], [1, 1, 1], 1)[1]


@pytest.mark.parametrize("names", ["of nnU-Net", "of nnssl", "both"])
def test_arguments_of_primus_under_the_names_of_others(tmp_path, folders, names):
    path, weights = elsewhere(tmp_path, folders, "primus")
    content = torch.load(path, weights_only=True)
    arguments = content[KEY]["architecture_plans"]["arch_kwargs"]
    removed = {
        "of nnU-Net": ("eva_depth", "eva_numheads", "strides", "decoder_features"),
        "of nnssl": ("encoder_eva_depth", "encoder_eva_numheads", "init_values", "scale_attn_inner"),
        "both": (),
    }[names]
    for name in removed:
        del arguments[name]
    arguments |= {"init_values": [0.1]} if names == "of nnU-Net" else {}
    torch.save(content, path)
    read = open_checkpoint(path).architecture["arch_kwargs"]
    assert (read["embed_dim"], read["eva_depth"], read["eva_numheads"]) == (36, 2, 3)
    target = write_plans(tmp_path / "third", plans(primus(), 3, 2), ["CT", "PET"])
    done = export(path, ExportSettings(for_plans=str(target), out=tmp_path / "third.pth"), folders)
    state = torch.load(done.path, weights_only=True)["network_weights"]
    for name in ("eva.blocks.1.mlp.fc2.weight", "eva.pos_embed"):
        assert torch.equal(state[name], weights[name])


def elsewhere(tmp_path, folders, kind="residual"):
    """A checkpoint as other programs write it: the adaptation plan and nothing of nnssl."""
    content = torch.load(exported(tmp_path, folders, kind, out=tmp_path / "out.pth"), weights_only=True)
    del content["nnssl"], content[KEY]["architecture_kwargs"], content[KEY]["pretrain_patch_size"]
    torch.save(content, tmp_path / "elsewhere.pth")
    return tmp_path / "elsewhere.pth", content["network_weights"]


@pytest.mark.parametrize("kind", ["plain", "residual", "primus"])
def test_a_checkpoint_made_elsewhere_is_read(tmp_path, folders, kind):
    path, weights = elsewhere(tmp_path, folders, kind)
    source = open_checkpoint(path)
    assert source.num_channels == 2
    assert source.provenance is None
    assert not any(name.startswith(("decoder.stages", "up_projection")) for name in source.tensors)
    target = write_plans(tmp_path / "third", plans(architecture(kind, 3), 3, 1), ["CT"])
    done = export(path, ExportSettings(for_plans=str(target), out=tmp_path / "third.pth"), folders)
    state = torch.load(done.path, weights_only=True)["network_weights"]
    first = {"primus": "down_projection.proj.weight", "plain": "encoder.stages.0.0.convs.0.conv.weight"}
    name = first.get(kind, "encoder.stem.convs.0.conv.weight")
    torch.testing.assert_close(state[name], weights[name].sum(1, keepdim=True))
    name = "eva.pos_embed" if kind == "primus" else "encoder.stages.1.0.convs.0.conv.weight"
    if name in weights:
        assert torch.equal(state[name], weights[name])
    with pytest.raises(UserError, match="made elsewhere and has no plans"):
        export(path, ExportSettings(out=tmp_path / "x.pth"), folders)


def test_names_of_networks_made_elsewhere(tmp_path):
    """ResEncL and the sizes of Primus come without arguments."""
    base = {
        "architecture_plans": {"arch_class_name": "ResEncL"},
        "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": [160, 160, 160]}, "second": {}}},
        "pretrain_num_input_channels": 1,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
    }
    content = {"network_weights": {}, KEY: base}
    read = read_adaptation_plan(tmp_path / "a.pth", content)
    assert read.arch_kwargs == RESENC_L
    assert read.spacing_mm is None
    assert read.patch_vox == (160, 160, 160)
    base["architecture_plans"] = {"arch_class_name": "PrimusB", "arch_kwargs": None}
    read = read_adaptation_plan(tmp_path / "a.pth", content)
    assert (read.arch_kwargs["embed_dim"], read.arch_kwargs["eva_depth"], read.arch_kwargs["eva_numheads"]) == (
        792,
        12,
        12,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_to_stem": None}, "lacks the key 'key_to_stem'"),
        (
            {"architecture_plans": {"arch_class_name": "SwinUNETR", "arch_kwargs": {}}},
            "SwinUNETR is not a PlainConvUNet",
        ),
        ({"architecture_plans": {"arch_class_name": "PlainConvUNet", "arch_kwargs": None}}, "has no known size"),
        ({"pretrain_plan": {"configurations": {}}}, "cannot be read"),
    ],
)
def test_adaptation_plans_that_say_too_little(tmp_path, folders, change, message):
    path = elsewhere(tmp_path, folders)[0]
    content = torch.load(path, weights_only=True)
    content[KEY] = {key: value for key, value in (content[KEY] | change).items() if value is not None}
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        open_checkpoint(path).check_tensors()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"network_weights": {}, KEY: Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code"):
        open_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_folder_for_a_hub(tmp_path, folders):
    rows = [{"dataset": "Dataset004_Labelled", "arm": "pix2rep", "labels": 5, "steps": 300, "dice": 0.8125}]
    path = exported(tmp_path, folders, form="hub", licence="CC-BY-4.0", results=rows, out=tmp_path / "hub")
    assert sorted(each.name for each in path.iterdir()) == [
        "README.md", "adaptation_plan.json", "checkpoint_final.pth", "checkpoint_final.pth.table.json", "config.json",
        "dataset.json", "nnUNetPlans.json",
    ]  # fmt: skip
    content = torch.load(path / "checkpoint_final.pth", weights_only=True)
    assert json.loads((path / "adaptation_plan.json").read_text()) == json.loads(json.dumps(content[KEY]))
    config = json.loads((path / "config.json").read_text())
    assert config["license"] == "CC-BY-4.0"
    assert config["pretraining_cases"] == 2
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlicense: CC-BY-4.0\n")
    for line in (
        "| Dataset004_Labelled | pix2rep | 5 | 300 | 81.2 |",
        "| `temperature` | `0.1` |",
        "## Limits",
        "Pix2Rep",
    ):
        assert line in card, line
    assert any("pretrained with patch" in line for line in explain_checkpoint(path))
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        exported(tmp_path, folders, form="hub", out=tmp_path / "hub")
    with pytest.raises(TypeError):  # a row without a number: nothing half-made is left
        exported(tmp_path, folders, form="hub", results=[{**rows[0], "dice": None}], out=tmp_path / "second")
    assert not [each for each in tmp_path.iterdir() if "second" in each.name]


@pytest.mark.parametrize(
    ("kind", "dim"), [("plain", 2), ("residual", 3), pytest.param("primus", 3, marks=pytest.mark.nightly)]
)
def test_encoder_alone_in_plain_pytorch(tmp_path, folders, kind, dim):
    """Every tensor under one name; the example runs as it is and nothing of nnssl is imported but the network of Primus."""
    path = exported(tmp_path, folders, kind, dim, form="encoder", out=tmp_path / "encoder")
    tensors = load_file(path / "encoder.safetensors")
    network = build_network(architecture(kind, dim), 2, 3, 0)
    parts = [network.encoder] if kind != "primus" else [network.eva, network.down_projection]
    assert sum(value.numel() for value in tensors.values()) == sum(
        parameter.numel() for part in parts for parameter in part.parameters()
    )
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r}); import torch; from pathlib import Path;"
        "from load_encoder import load_encoder;"
        f"network, spec = load_encoder(Path({str(path)!r}));"
        "torch.save({k: v for k, v in network.state_dict().items()}, sys.argv[1]);"
        "sys.exit(('nnssl' in sys.modules) != spec['architecture']['network_class_name'].startswith('nnssl'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "loaded.pth")], check=True)
    printed = subprocess.run(
        [sys.executable, str(path / "load_encoder.py")], check=True, capture_output=True, text=True
    )
    assert printed.stdout.splitlines()[0] == {"plain": "(1, 4, 16, 24)", "residual": "(1, 4, 8, 24, 16)"}.get(
        kind, "(1, 24, 36)"
    )
    assert any("encoder of" in line for line in explain_checkpoint(path))
    loaded = torch.load(tmp_path / "loaded.pth", weights_only=True)
    expected = torch.load(exported(tmp_path, folders, kind, dim, out=tmp_path / "o.pth"), weights_only=True)
    for name in tensors:
        assert torch.equal(loaded[name], expected["network_weights"][name]), name


def test_the_card_names_the_minutes_if_they_are_recorded(tmp_path, folders):
    source = tmp_path / "source.pth"
    write_source(source, architecture("plain", 3), 3, ["CT"])
    content, provenance = read_checkpoint(source)
    unknown = export(source, ExportSettings(form="hub", out=tmp_path / "unknown"), folders).path
    assert json.loads((unknown / "config.json").read_text())["minutes"] is None
    assert "minutes" not in (unknown / "README.md").read_text()
    log = {"epoch_start_timestamps": [100.0, 400.0, 500.0], "epoch_end_timestamps": [160.0, 490.0]}
    own = {"network_weights": content["network_weights"], "logging": log}
    write_checkpoint(source, own, provenance, {"method": {}, "probe": None})
    known = export(source, ExportSettings(form="hub", out=tmp_path / "known"), folders).path
    assert json.loads((known / "config.json").read_text())["minutes"] == 2.5
    assert f"{provenance.step} steps in 2.5 minutes, nnssl" in (known / "README.md").read_text()


@pytest.mark.parametrize("chose_weights", [True, False])
def test_an_export_keeps_the_probe_only_if_it_chose_the_weights(tmp_path, folders, chose_weights):
    source = tmp_path / "source.pth"
    write_source(source, architecture("plain", 3), 3, ["CT"])
    content, provenance = read_checkpoint(source)
    probe = {
        "dataset_name": "Dataset004_Labelled",
        "train": ["a"],
        "test": ["b", "c"],
        "chose_weights": chose_weights,
        "history": [{"epochs": 1, "dice": {"liver": 0.5}, "mean": 0.5}],
    }
    write_checkpoint(
        source, {"network_weights": content["network_weights"]}, provenance, {"method": {}, "probe": probe}
    )
    hub = export(source, ExportSettings(form="hub", out=tmp_path / "hub"), folders).path
    again = export(hub / "checkpoint_final.pth", ExportSettings(out=tmp_path / "again.pth"), folders).path
    kept = {"probe": probe} if chose_weights else {}
    for path in (hub / "checkpoint_final.pth", again):
        assert torch.load(path, weights_only=True)["nnssl"]["state"] == kept
    line = "| chosen by a linear probe on | 3 labelled cases of Dataset004_Labelled, which must not be test cases |"
    assert (line in (hub / "README.md").read_text()) == chose_weights
    config = json.loads((hub / "config.json").read_text())
    assert (config["probe_data"], config["probe_cases"]) == (
        ("Dataset004_Labelled", 3) if chose_weights else (None, None)
    )


def test_nothing_of_the_users_is_replaced(tmp_path, folders):
    path = exported(tmp_path, folders, out=tmp_path / "user" / "nnUNetPlans.pth")  # beside nnUNetPlans.json
    assert "configurations" in json.loads((tmp_path / "user" / "nnUNetPlans.json").read_text())
    exported(tmp_path, folders, out=path)  # a former export may be
    for out, message in [
        (tmp_path / "w.json", "a name that ends in .pth"),
        (tmp_path / "a.pth", "exists already and is not an earlier export"),
        (tmp_path / "user.pth", "exists already"),
        (tmp_path / "a.pth" / "x.pth", "not writable"),
    ]:
        (tmp_path / "user.pth").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            exported(tmp_path, folders, out=out)
    for form in ("hub", "encoder"):
        with pytest.raises(UserError, match="not an empty folder"):
            exported(tmp_path, folders, form=form, out=tmp_path / "a.pth")
    with pytest.raises(UserError, match="form must be one of nnunet, hub, encoder, got safetensors"):
        exported(tmp_path, folders, form="safetensors")
    with pytest.raises(UserError, match="policy must be one of mean, repeat, named, got average"):
        exported(tmp_path, folders, policy="average")


def test_an_exported_file_remembers_its_pretraining(tmp_path, folders):
    """Its plans are the target's; spacing, patch and channels of the pretraining stay those of the source."""
    network = unet("plain", 3)
    write_source(tmp_path / "a.pth", network, 3, ["T1", "T2"], spacing=[2.0, 1.0, 1.0])
    first = write_plans(tmp_path / "first", plans(network, 3, 1), ["CT"])
    once = export(tmp_path / "a.pth", ExportSettings(for_plans=str(first), out=tmp_path / "once.pth"), folders).path
    second = write_plans(tmp_path / "second", plans(network, 3, 2), ["CT", "PET"])
    twice = export(once, ExportSettings(for_plans=str(second), out=tmp_path / "twice.pth"), folders).path
    source = open_checkpoint(twice)
    assert source.pretraining["spacing_mm"] == [2.0, 1.0, 1.0]
    assert source.pretraining["channel_names"] == ["T1", "T2"]
    assert source.channel_names == ("CT", "PET")
    assert torch.load(twice, weights_only=True)[KEY]["pretrain_plan"]["configurations"]["3d_fullres"]["spacing"] == [
        2,
        1,
        1,
    ]
    assert source.provenance.pretrains("decoder.stages.")
    assert not source.provenance.pretrains("eva.")


@pytest.mark.parametrize(
    ("ours", "theirs"), [("encoder.", "online_encoder."), ("", "module."), ("", "_orig_mod.module.")]
)
def test_prefixes_of_other_programs(tmp_path, folders, ours, theirs):
    path, weights = elsewhere(tmp_path, folders)
    content = torch.load(path, weights_only=True)
    content["network_weights"] = {
        theirs + name.removeprefix(ours): value for name, value in weights.items() if name.startswith(ours)
    }
    if ours:
        content[KEY] |= {"key_to_encoder": "online_encoder.stages", "key_to_stem": "online_encoder.stem"}
    torch.save(content, path)
    tensors = open_checkpoint(path).tensors
    assert set(tensors) == {name for name in weights if name.startswith(("encoder.stages", "encoder.stem"))}
    assert all(torch.equal(value, weights[name]) for name, value in tensors.items())


def test_a_patch_that_was_cut_smaller_than_the_plan_says(tmp_path, folders):
    path, weights = elsewhere(tmp_path, folders, "primus")
    content = torch.load(path, weights_only=True)
    content[KEY]["pretrain_patch_size"] = [8, 24, 16]
    content[KEY]["pretrain_plan"]["configurations"]["3d_fullres"]["patch_size"] = [16, 48, 32]
    torch.save(content, path)
    target = write_plans(tmp_path / "third", plans(primus(), 3, 1), ["CT"])
    done = export(path, ExportSettings(for_plans=str(target), out=tmp_path / "third.pth"), folders)
    state = torch.load(done.path, weights_only=True)["network_weights"]
    assert torch.equal(state["eva.pos_embed"], weights["eva.pos_embed"])
    del content[KEY]["pretrain_patch_size"]  # then the positions do not fit what the plan says
    torch.save(content, path)
    report = export(path, ExportSettings(for_plans=str(target), out=tmp_path / "third.pth"), folders).report
    assert (
        "24 positions in the source, 8 x 6 x 4" in next(t for t in report.tensors if t.name == "eva.pos_embed").reason
    )


def test_citations_come_along(tmp_path, folders):
    path = elsewhere(tmp_path, folders)[0]
    content = torch.load(path, weights_only=True)
    theirs = {"type": "Pretraining Method", "name": "MAE", "apa_citations": ["He et al., 2022"]}
    content["citations"] = [theirs]
    torch.save(content, path)
    target = write_plans(tmp_path / "third", plans(architecture("residual", 3), 3, 1), ["CT"])
    hub = export(path, ExportSettings(for_plans=str(target), form="hub", out=tmp_path / "hub"), folders).path
    assert theirs in torch.load(hub / "checkpoint_final.pth", weights_only=True)["citations"]
    card = (hub / "README.md").read_text()
    assert "He et al., 2022" in card
    assert "without labels" not in card  # nothing here knows that


@pytest.mark.parametrize(
    ("change", "described", "message"),
    [
        ({"configurations": []}, {}, "is not a plans file of nnU-Net"),
        ({"dataset_name": 4}, {}, "is not a plans file of nnU-Net"),
        ({"configurations": {"3d_fullres": {"inherits_from": "nope"}}}, {}, "cannot build this network"),
        (
            {"configurations": {"3d_fullres": {"architecture": {"network_class_name": "x"}}}},
            {},
            "cannot build this network",
        ),
        ({}, {"channel_names": ["CT"]}, "channel_names must have the form"),
        ({}, {"channel_names": {}}, "channel_names must have the form"),
        ({}, {"channel_names": {"c0": "CT"}}, "channel_names must have the form"),
        ({}, {"channel_names": {"0": "CT", "1": "PET"}}, r"normalises 1 channel\(s\), but 2 are named"),
    ],
)
def test_plans_and_descriptions_that_cannot_be_used(tmp_path, folders, change, described, message):
    write_source(tmp_path / "a.pth", unet("plain", 3), 3, ["CT"])
    path = write_plans(tmp_path / "user", plans(unet("plain", 3), 3, 1) | {"dataset_name": "Dataset004_X"}, ["CT"])
    write_json(path, json.loads(path.read_text()) | change)
    dataset = path.with_name("dataset.json")
    write_json(dataset, json.loads(dataset.read_text()) | described)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "o.pth"), folders)
    assert not (tmp_path / "o.pth").exists()


def test_weights_with_nan_are_refused_by_name(tmp_path, folders):
    write_source(tmp_path / "a.pth", unet("plain", 3), 3, ["CT"])
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["network_weights"]["encoder.stages.1.0.convs.0.norm.bias"][0] = float("nan")
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"encoder.stages.1.0.convs.0.norm.bias holds NaN"):
        export(tmp_path / "a.pth", ExportSettings(out=tmp_path / "o.pth"), folders)


def test_command(tmp_path, nnunet_folders, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "a.pth", unet("plain", 3), 3, ["CT"])
    folder = nnunet_folders / "preprocessed" / "Dataset004_Labelled"
    write_plans(folder, plans(unet("plain", 3), 3, 2), ["T1", "T2"])
    assert main([str(tmp_path / "a.pth"), "--for-plans", "4", "--input-policy", "repeat"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "for_Dataset004_Labelled_nnUNetPlans_3d_fullres.pth"
    assert f"nnUNetv2_train 004 3d_fullres 0 -p nnUNetPlans -pretrained_weights {out}" in printed
    assert "1 to 2 channels by repeat" in printed
    assert out.exists()
    write_json(folder / "otherPlans.json", plans(unet("plain", 3), 3, 2, "otherPlans"))
    (folder / "nnUNetPlans.json").rename(folder / "thirdPlans.json")
    wrong = [
        (["--for-plans", "4"], "has several plans (found: otherPlans, thirdPlans)"),
        (["--for-plans", "4", "-p", "nope"], "has no plans nope"),
        (["--for-plans", "4", "-p", "otherPlans", "-c", "2d"], "--configuration must be one of 3d_fullres"),
        (["--for-plans", str(tmp_path / "nope.json")], "there is no such plans file"),
        (["--channels", "CT"], "needs --for-plans"),
        (
            ["--for-plans", "4", "-p", "otherPlans", "--trainer", "Nope"],
            "--trainer must be one that nnUNetv2_train -tr accepts, got Nope",
        ),
        (
            ["--for-plans", "4", "-p", "otherPlans", "--channels", "CT", "CT"],
            "--channels must have different names, got CT CT",
        ),
        (["--results", "x.json"], "--results needs --format hub"),
        (["--least-share", "2"], "--least-share must be between 0 and 1, got 2.0"),
    ]
    for arguments, message in wrong:
        assert main([str(tmp_path / "a.pth"), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    for file in ("nothing.pth", "broken.pth"):
        (tmp_path / "broken.pth").write_bytes(b"PK not a checkpoint")
        assert main([str(tmp_path / file)]) == 2
        assert file in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["adaptation plan", "nnssl"])
def test_a_file_does_not_choose_what_is_called_when_its_network_is_built(tmp_path, folders, kind):
    """A layer that is a function would be called with arguments from the file."""
    path = exported(tmp_path, folders, "residual", out=tmp_path / "out.pth")
    content = torch.load(path, weights_only=True)
    if kind == "nnssl":
        plan = content["nnssl"]["provenance"]["plans"]
        architectures = [each["architecture"] for each in plan["configurations"].values() if "architecture" in each]
    else:
        del content["nnssl"]
        architectures = [content[KEY]["architecture_plans"]]
    for each in architectures:
        each["arch_kwargs"] |= {"nonlin": "os.system", "nonlin_kwargs": {"command": f"touch {tmp_path}/called"}}
    torch.save(content, path)
    with pytest.raises(UserError, match="os.system, which is not a network or layer"):
        open_checkpoint(path).check_tensors()
    assert not (tmp_path / "called").exists()
