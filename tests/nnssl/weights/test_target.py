"""Which plans, configuration and channels a target has, and what of a source's plan and names counts."""

import copy
import json

import pytest
import torch

from nnssl.errors import UserError
from nnssl.files import write_json
from nnssl.networks.backbone import build_network, planned_configuration
from nnssl.paths import Folders
from nnssl.weights import formats
from nnssl.weights.adaptation_plan import KEY, KEYS, PLAIN, RESENC_L, RESIDUAL, network_kind
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from nnssl.weights.formats import check_loads
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.target import _choose_configuration, _dataset_json, _find_plans, build_target
from tests.nnssl.weights.tiny_networks import dataset_json, plans, unet, write_plans, write_source

NAME = "Dataset004_Labelled"


@pytest.fixture
def folders(tmp_path):
    return Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")))


@pytest.mark.parametrize(
    ("present", "wanted", "usual", "chosen"),
    [
        (["2d", "3d_fullres"], "2d", "3d_fullres", "2d"),
        (["2d", "3d_fullres"], None, "3d_fullres", "3d_fullres"),
        (["2d", "3d_fullres"], None, "3d_fullres_hybrid", "3d_fullres"),
        (["2d", "3d_fullres"], None, "2d_hybrid", "2d"),
        (["2d", "3d_fullres"], None, "3d_fullres_primus", "3d_fullres"),
        (["2d", "3d_fullres", "3d_fullres_hybrid"], None, "3d_fullres_hybrid", "3d_fullres_hybrid"),
        (["3d_lowres"], None, "3d_fullres", "3d_lowres"),
    ],
)
def test_the_configuration_is_the_wanted_the_usual_its_u_net_or_the_only_one(tmp_path, present, wanted, usual, chosen):
    assert _choose_configuration(tmp_path, present, wanted, usual) == chosen


def test_a_configuration_is_not_guessed(tmp_path):
    with pytest.raises(UserError, match="none of them 3d_fullres; choose one with -c"):
        _choose_configuration(tmp_path, ["2d", "3d_lowres"], None, "3d_fullres")


def test_plans_of_a_data_set(tmp_path, folders):
    """The only ones, whatever their name; nnU-Net's own among several; what is no plans file does not count."""
    folder = folders.preprocessed / NAME
    content = plans(unet("plain", 3), 3, 1, "otherPlans")
    write_plans(folder, content, ["CT"])
    write_json(folder / "plansOfSomebody.json", {"a": 1})
    assert _find_plans("4", folders, None) == folder / "otherPlans.json"
    write_plans(folder, {**content, "plans_name": "nnUNetPlans"}, ["CT"])
    assert _find_plans("4", folders, None) == folder / "nnUNetPlans.json"
    assert _find_plans(NAME, folders, "otherPlans") == folder / "otherPlans.json"
    with pytest.raises(UserError, match="leave -p out"):
        _find_plans(str(folder / "otherPlans.json"), folders, "otherPlans")


def test_channels_that_the_user_names_count(tmp_path, folders):
    path = write_plans(tmp_path / "user", plans(unet("plain", 3), 3, 2), ["T1", "T2"])
    content = json.loads(path.read_text())
    assert _dataset_json(path, content, folders, None, False)["channel_names"] == {"0": "T1", "1": "T2"}
    assert _dataset_json(path, content, folders, ["CT", "PET"], False)["channel_names"] == {"0": "CT", "1": "PET"}
    assert _dataset_json(path, content, folders, ["3"], False)["channel_names"] == {"0": "0", "1": "1", "2": "2"}
    with pytest.raises(UserError, match="--channels 0: a network needs 1 or more"):
        _dataset_json(path, content, folders, ["0"], False)
    # the data set's own description is looked for beside the plans, then among nnU-Net's folders
    (path.parent / "dataset.json").unlink()
    for folder, channels in ((folders.raw, ["raw", "b"]), (folders.preprocessed, ["preprocessed", "b"])):
        (folder / NAME).mkdir(parents=True)
        write_json(folder / NAME / "dataset.json", dataset_json(channels))
        assert _dataset_json(path, content, folders, None, False)["channel_names"]["0"] == channels[0]


def test_numbers_are_no_names_of_channels():
    """``--channels 2`` says how many there are, so weights for channels 0 and 1 are not matched by name."""
    content = plans(unet("plain", 3), 3, 2)
    assert build_target(content, "3d_fullres", dataset_json(["0", "1"]), "a").channel_names is None
    described = dataset_json(["b", "a"])
    described["channel_names"] = {"1": "a", "0": "b"}  # in the order of their numbers, not of the file
    assert build_target(content, "3d_fullres", described, "a").channel_names == ("b", "a")


def test_plans_that_do_not_name_an_architecture_are_written_with_one():
    """As nnU-Net made them before version 2.3; what a configuration inherits is named."""
    content = plans(unet("plain", 3), 3, 1)
    old = content["configurations"]["3d_fullres"]
    kwargs = old.pop("architecture")["arch_kwargs"]
    old |= {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 12,
        "n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [1, 2, 2], "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }  # fmt: skip
    content["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    for name in ("3d_fullres", "child"):
        with pytest.warns(UserWarning, match="old nnU-Net plans format"):
            target = build_target(copy.deepcopy(content), name, dataset_json(["CT"]), "a")
        written = target.plans["configurations"][name]
        assert written["architecture"]["arch_kwargs"]["features_per_stage"] in ([4, 8, 12], (4, 8, 12))
    new = plans(unet("plain", 3), 3, 1)
    new["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    assert build_target(new, "child", dataset_json(["CT"]), "a").plans == new


def test_a_configuration_overrides_what_it_inherits():
    configurations = {
        "a": {"architecture": {}, "patch_size": [1], "spacing": [2]},
        "b": {"inherits_from": "a", "patch_size": [3]},
        "c": {"inherits_from": "b", "batch_size": 4},
    }
    found = planned_configuration({"configurations": configurations}, "c")
    assert (found["patch_size"], found["spacing"], found["batch_size"]) == ([3], [2], 4)


def test_channel_names_of_a_source_are_in_the_order_of_their_numbers(tmp_path):
    write_source(tmp_path / "a.pth", unet("plain", 2), 2, ["b", "a"])
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    many = {str(n): f"c{n}" for n in (10, 2, 0, 1, *range(3, 10))}
    content["nnssl"]["provenance"]["dataset_json"]["channel_names"] = many
    torch.save(content, tmp_path / "a.pth")
    source = open_checkpoint(tmp_path / "a.pth")
    assert source.channel_names == tuple(f"c{n}" for n in range(11))
    assert source.pretraining["channel_names"] == list(source.channel_names)


def test_a_name_that_only_begins_like_a_part_is_another_part(tmp_path, folders):
    write_source(tmp_path / "a.pth", unet("residual", 2), 2, ["CT"])
    path = export(tmp_path / "a.pth", ExportSettings(out=tmp_path / "o.pth"), folders).path
    content = torch.load(path, weights_only=True)
    del content["nnssl"]
    assert content[KEY]["key_to_encoder"] == "encoder.stages"
    content["network_weights"]["encoder.stages2.0.weight"] = torch.zeros(3)
    content["network_weights"]["encoder.stem_of_another.weight"] = torch.zeros(3)
    torch.save(content, path)
    tensors = open_checkpoint(path).tensors
    assert tensors
    assert not [name for name in tensors if "stages2" in name or "another" in name]


def test_what_a_file_does_not_bring_back_is_found(tmp_path):
    """A tensor that was changed, left out or of another shape; segmentation layers are nnU-Net's to start."""
    network = build_network(unet("plain", 2), 1, 3, 0)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    path = tmp_path / "a.pth"

    def load(content) -> None:
        torch.save({"network_weights": content}, path)
        check_loads(network, path, path)

    load(state)
    name = "decoder.stages.1.convs.0.norm.bias"
    with pytest.raises(UserError, match="does not bring decoder.stages.1.convs.0"):
        load({key: value + ("stages.1.convs.0" in key and key.endswith("bias")) for key, value in state.items()})
    for broken in ({key: value for key, value in state.items() if key != name}, {**state, name: torch.zeros(5)}):
        with pytest.raises(UserError, match="nnU-Net's loader refuses it"):
            load(broken)
    load({key: value + (".seg_layers." in key) for key, value in state.items()})


def test_a_file_that_nnunet_refuses_does_not_replace_a_former_export(tmp_path, folders, monkeypatch):
    write_source(tmp_path / "a.pth", unet("plain", 2), 2, ["CT"])
    path = export(tmp_path / "a.pth", ExportSettings(out=tmp_path / "out" / "o.pth"), folders).path
    before = path.read_bytes()

    def refuse(*_):
        raise UserError("nnU-Net's loader refuses it")

    monkeypatch.setattr(formats, "check_loads", refuse)
    with pytest.raises(UserError, match="refuses"):
        export(tmp_path / "a.pth", ExportSettings(out=path, seed=1), folders)
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["o.pth", "o.pth.table.json"]


def test_an_export_says_what_was_pretrained_and_a_hub_gets_no_section_of_nnssl(tmp_path, folders):
    """Of encoder weights the decoder is a seeded start, in the second file as in the first."""
    write_source(tmp_path / "a.pth", unet("plain", 2), 2, ["CT"], pretrained=("encoder.",))
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["nnssl"]["provenance"]["plans"]["pretext"] = {"schema_version": 5}
    torch.save(content, tmp_path / "a.pth")
    path = export(tmp_path / "a.pth", ExportSettings(form="hub", out=tmp_path / "hub"), folders).path
    assert "pretext" not in json.loads((path / "nnsslPlans.json").read_text())
    made = open_checkpoint(path / "checkpoint_final.pth").provenance
    assert made.pretrains("encoder.stages.1.")
    assert not made.pretrains("decoder.stages.")
    assert "pretext" not in made.plans


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("PlainConvUNet", PLAIN),
        ("nnssl.networks.hybrid.HybridUNet", PLAIN),
        ("nnssl.networks.hybrid.HybridResidualEncoderUNet", RESIDUAL),
        ("somewhere.MyResidualEncoderUNet", RESIDUAL),
        ("ResEncL", RESIDUAL),
    ],
)
def test_kinds_of_networks(name, kind):
    assert network_kind(name) == kind
    assert KEYS[kind]["key_to_encoder"] == "encoder.stages"


def test_the_residual_encoder_l_has_as_many_blocks_as_nnunets(monkeypatch):
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as stock

    monkeypatch.setattr(stock.ExperimentPlanner, "__init__", lambda *_, **__: None)  # it would look for a data set
    planner, stages = stock.ResEncUNetPlanner(0), RESENC_L["n_stages"]
    assert list(planner.UNet_blocks_per_stage_encoder[:stages]) == RESENC_L["n_blocks_per_stage"]
    assert list(planner.UNet_blocks_per_stage_decoder[: stages - 1]) == RESENC_L["n_conv_per_stage_decoder"]
    assert len(RESENC_L["features_per_stage"]) == len(RESENC_L["strides"]) == len(RESENC_L["kernel_sizes"]) == stages
