"""Checkpoints of nnU-Net's training with labels: read safely, fitted to other networks, refused in one line."""

import io
import os
import pickle
import re

import numpy as np
import pytest
import torch

from nnssl.checkpoint import ACCEPTED, load_tensors, write_checkpoint
from nnssl.cli.info import explain_checkpoint
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.networks.backbone import build_network
from nnssl.paths import Folders
from nnssl.plan import plan_from_dict
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from nnssl.weights.nnunet_training import SUPERVISED
from nnssl.weights.opened_checkpoint import open_checkpoint
from tests.nnssl.weights.tiny_networks import UNETS, dataset_json, plans, primus, unet, write_plans, write_trained

FIRST = {"plain": "encoder.stages.0.0.convs.0.conv.weight", "residual": "encoder.stem.convs.0.conv.weight"}


@pytest.fixture
def folders(tmp_path):
    return Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")))


def refused(path, *parts):
    """Opening the file and asking for its tensors is refused in one line with these parts, and with all accepted formats."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(path).check_tensors()
    message = str(caught.value)
    assert "\n" not in message
    assert ACCEPTED in message
    for part in (path.name, *parts):
        assert part in message


@pytest.mark.parametrize(("kind", "dim"), [("plain", 2), ("plain", 3), ("residual", 3)])
def test_everything_that_a_checkpoint_says(tmp_path, kind, dim):
    weights = write_trained(tmp_path / "a.pth", unet(kind, dim), dim, ["CT", "PET"])
    source = open_checkpoint(tmp_path / "a.pth")
    assert source.by_nnunet
    assert not source.made_elsewhere
    assert source.label == "supervised, trained with labels on Dataset291_Supervised"
    assert source.channel_names == ("CT", "PET")
    assert source.architecture["network_class_name"] == unet(kind, dim)["network_class_name"]
    provenance = source.own_provenance
    assert provenance.configuration == ("2d" if dim == 2 else "3d_fullres")
    assert provenance.settings == {"trainer": "nnUNetTrainer", "fold": 1, "epochs": 2}
    assert provenance.pretrains("decoder.stages.")
    assert provenance.pretrains("encoder.")
    assert source.choosing_probe is None
    assert source.chosen is None
    body = {name for name in weights if ".seg_layers." not in name}
    assert set(source.tensors) == body
    assert all(torch.equal(source.tensors[name], weights[name]) for name in body)
    with pytest.raises(UserError, match="trained by nnU-Net with labels"):
        _ = source.plan
    lines = "\n".join(explain_checkpoint(tmp_path / "a.pth"))
    for text in ("nnUNetTrainer, fold 1, 2 epochs", "labels background, organ1, organ2", "2 channel(s) (CT, PET)"):
        assert text in lines, text


def test_numbers_of_numpy_are_read_as_plain_numbers(tmp_path):
    values = [np.float64(0.125), np.float32(-1.5), np.int64(7), np.bool_(True), np.float16(0.25), np.uint8(200)]
    torch.save({"a": values}, tmp_path / "a.pth")
    read = load_tensors(tmp_path / "a.pth")["a"]
    assert read == [0.125, -1.5, 7, True, 0.25, 200]
    assert [type(value) for value in read] == [float, float, int, bool, float, int]


def test_numbers_of_numpy_1_are_read(tmp_path):
    """NumPy 1 pickles numbers under another name of the module."""
    path = tmp_path / "a.pth"
    torch.save({"a": np.float64(0.125)}, path)
    old = tmp_path / "old.pth"
    source, writer = torch.PyTorchFileReader(str(path)), torch.PyTorchFileWriter(str(old))
    renamed = re.sub(rb"numpy\._?core\.multiarray", b"numpy.core.multiarray", source.get_record("data.pkl"))
    for name in source.get_all_records():
        value = renamed if name == "data.pkl" else source.get_record(name)
        writer.write_record(name, value, len(value))
    writer.write_end_of_file()
    assert b"cnumpy.core.multiarray\n" in renamed
    before = set(torch.serialization.get_safe_globals())
    assert load_tensors(old) == {"a": 0.125}
    assert set(torch.serialization.get_safe_globals()) == before


def test_labels_channels_and_depth_of_a_target_may_differ(tmp_path, folders):
    weights = write_trained(tmp_path / "a.pth", unet("residual", 3), 3, ["CT", "PET"], classes=5)
    deeper = unet("residual", 3, n_blocks_per_stage=[1, 2, 3])
    path = write_plans(tmp_path / "user", plans(deeper, 3, 1, patch_size=[8, 16, 16]), ["CT"])
    done = export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "o.pth"), folders)
    state = torch.load(done.path, weights_only=True)["network_weights"]
    first = FIRST["residual"]
    assert torch.equal(state[first], weights[first][:, :1])  # by name
    same = "decoder.stages.1.convs.0.conv.weight"
    assert torch.equal(state[same], weights[same])
    again = open_checkpoint(done.path)
    assert again.own_provenance.method == SUPERVISED
    assert not again.by_nnunet
    assert not again.keeps_head(dataset_json(["CT"], 3))
    assert "trained by nnU-Net with labels" in "\n".join(explain_checkpoint(done.path))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_segmentation_layers_are_kept_for_the_same_labels_only(tmp_path, folders, kind):
    weights = write_trained(tmp_path / "a.pth", unet(kind, 3), 3, ["CT"])
    head = "decoder.seg_layers.1.weight"
    exported = export(tmp_path / "a.pth", ExportSettings(out=tmp_path / "same.pth"), folders).path
    for path in (tmp_path / "a.pth", exported):
        source = open_checkpoint(path)
        assert torch.equal(source.head_for(dataset_json(["CT"]))[head], weights[head])
        assert source.head_for(dataset_json(["CT"], 4)) == {}
        same = dataset_json(["CT"])
        same["labels"] = {name: [value] for name, value in same["labels"].items()}  # another spelling
        assert source.keeps_head({**same, "regions_class_order": [1, 2]})  # without regions, the order says nothing
        swapped = dataset_json(["CT"])
        swapped["labels"] = {"background": 0, "organ2": 1, "organ1": 2}
        assert not source.keeps_head(swapped)
    path = write_plans(tmp_path / "user", plans(unet(kind, 3), 3, 1), ["CT"], classes=4)
    other = export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "other.pth"), folders).path
    assert open_checkpoint(other).head_for(dataset_json(["CT"], 4)) == {}


def test_the_card_of_a_model_hub_claims_no_self_supervision(tmp_path, folders):
    write_trained(tmp_path / "a.pth", unet("plain", 2), 2, ["CT"])
    path = export(tmp_path / "a.pth", ExportSettings(form="hub", out=tmp_path / "hub"), folders).path
    card = (path / "README.md").read_text()
    assert "# nnU-Net, trained on Dataset291_Supervised" in card
    assert "nnUNetTrainer, fold 1, 2 epochs" in card
    assert "without labels" not in card
    assert "- self-supervised-learning" not in card
    assert "- nnU-Net\n---\n" in card
    assert read_json(path / "config.json", "description")["steps"] is None


def test_plans_two_folders_up(tmp_path):
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    folder.mkdir(parents=True)
    path = folder / "checkpoint_final.pth"
    write_trained(path, unet("plain", 3), 3, ["CT"], init_args=None)
    refused(path, "no plans", "plans.json", "two folders up")
    write_plans(folder.parent, plans(unet("plain", 3), 3, 1, "plans"), ["CT"])
    assert open_checkpoint(path).own_provenance.configuration == "3d_fullres"
    both = plans(unet("plain", 3), 3, 1, "plans")
    both["configurations"]["3d_lowres"] = both["configurations"]["3d_fullres"]
    write_json(folder.parent / "plans.json", both)
    assert open_checkpoint(path).own_provenance.configuration == "3d_fullres"  # by the name of the folder
    other = folder.parent.rename(tmp_path / "renamed") / "fold_all" / "checkpoint_final.pth"
    with pytest.raises(UserError, match="does not say which of the configurations 3d_fullres, 3d_lowres"):
        open_checkpoint(other)


def test_prefixes_of_wrappers_are_removed(tmp_path):
    weights = write_trained(tmp_path / "a.pth", unet("plain", 2), 2, ["CT"])
    content = torch.load(tmp_path / "a.pth", weights_only=False)
    content["network_weights"] = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    torch.save(content, tmp_path / "a.pth")
    assert set(open_checkpoint(tmp_path / "a.pth").content["network_weights"]) == set(weights)


def change_plans(path, change):
    content = torch.load(path, weights_only=False)
    change(content["init_args"]["plans"]["configurations"]["3d_fullres"], content["init_args"])
    torch.save(content, path)


def test_names_of_earlier_versions_are_mapped(tmp_path, folders):
    """Class paths, ``modality`` for ``channel_names``, and plans without architecture, as nnU-Net 2.0 to 2.2 wrote them."""
    path = tmp_path / "a.pth"
    write_trained(path, unet("residual", 3), 3, ["CT"])

    def move(configuration, arguments):
        configuration["architecture"]["network_class_name"] = "nnunetv2.old.residual_unet.ResidualEncoderUNet"
        arguments["dataset_json"]["modality"] = arguments["dataset_json"].pop("channel_names")

    change_plans(path, move)
    source = open_checkpoint(path)
    assert source.architecture["network_class_name"] == f"{UNETS}.ResidualEncoderUNet"
    assert source.channel_names == ("CT",)

    network = unet("plain", 3, features_per_stage=[4, 8, 8])
    weights = write_trained(path, network, 3, ["CT"])
    kwargs = network["arch_kwargs"]

    def age(configuration, arguments):
        del configuration["architecture"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 8,
            "n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [1, 1], "num_pool_per_axis": [1, 2, 2],
            "pool_op_kernel_sizes": kwargs["strides"], "conv_kernel_sizes": kwargs["kernel_sizes"],
        }  # fmt: skip

    change_plans(path, age)
    assert open_checkpoint(path).architecture["arch_kwargs"]["features_per_stage"] == [4, 8, 8]
    done = export(path, ExportSettings(out=tmp_path / "o.pth"), folders)
    state = torch.load(done.path, weights_only=True)["network_weights"]
    assert torch.equal(state["decoder.transpconvs.0.weight"], weights["decoder.transpconvs.0.weight"])

    def misname(configuration, arguments):
        age(configuration, arguments)
        configuration["UNet_class_name"] = "MyUNet"

    write_trained(path, network, 3, ["CT"])
    change_plans(path, misname)
    refused(path, "MyUNet")


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("conv_blocks_context.0.0.conv1.weight", "STU-Net"),
        ("conv_blocks_context.0.blocks.0.conv.weight", "nnU-Net version 1 (Generic_UNet)"),
        ("module.swinViT.patch_embed.proj.weight", "SwinUNETR"),
    ],
)
@pytest.mark.parametrize("key", ["network_weights", "state_dict"])
def test_networks_of_others_are_refused_by_name(tmp_path, name, network, key):
    torch.save({key: {name: torch.ones(2)}, "epoch": 1}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", network)


def test_weights_of_another_network_than_that_of_the_plans(tmp_path):
    """Some trainers build a network of their own, of which the plans know nothing."""
    path = tmp_path / "a.pth"
    write_trained(path, unet("plain", 3), 3, ["CT"])
    content = torch.load(path, weights_only=False)
    content["network_weights"] = build_network(primus(), 1, 3, 0).state_dict()
    torch.save(content, path)
    refused(path, "PlainConvUNet", "is missing", "its trainer built another network")
    content["network_weights"] = build_network(unet("plain", 3, features_per_stage=[4, 6, 10]), 1, 3, 0).state_dict()
    torch.save(content, path)
    refused(path, "PlainConvUNet", "has the shape [10, 6, 3, 3, 3] instead of [8, 6, 3, 3, 3]")
    torch.save({"network_weights": {}, "init_args": {}}, path)
    refused(path, "has weights of a training but no plans")
    torch.save({"network_weights": {"a": 1}}, path)
    refused(path, "no network_weights that map names to tensors")
    torch.save({"weights": {}}, path)
    refused(path, "holds no weights of a known kind")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network_class_name", "os.system"),
        ("network_class_name", "my_project.networks.MyUNet"),
        ("network_class_name", "dynamic_network_architectures.architectures.unet.np.load"),
        ("network_class_name", "nnssl.networks.backbone.build_network"),
        ("conv_op", "builtins.exec"),
        ("norm_op", "torch.nn.modules.module.torch._C._jit_clear_class_registry"),
    ],
)
def test_a_file_does_not_choose_what_is_called(tmp_path, key, value):
    path = tmp_path / "a.pth"
    write_trained(path, unet("plain", 3), 3, ["CT"])

    def rename(configuration, arguments):
        architecture = configuration["architecture"]
        (architecture if key in architecture else architecture["arch_kwargs"])[key] = value

    change_plans(path, rename)
    refused(path, value, "must not choose what is imported")


def test_a_network_that_cannot_be_built(tmp_path):
    """The error of torch has several lines, the refusal one."""
    path = tmp_path / "a.pth"
    write_trained(path, unet("plain", 3), 3, ["CT"])
    change_plans(path, lambda configuration, _: configuration["architecture"]["arch_kwargs"].update(n_stages=7))
    refused(path, "nnU-Net cannot build the network of its plans")


class Trap:
    """Makes a folder when it is unpickled by an unsafe reader."""

    def __reduce__(self):
        return os.mkdir, (os.environ["NNSSL_TEST_TRAP"],)


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_objects_are_refused_by_name_and_with_a_way_out(tmp_path, monkeypatch, legacy):
    path = tmp_path / "a.pth"
    torch.save(build_network(unet("plain", 2), 1, 2, 0), path, _use_new_zipfile_serialization=not legacy)
    refused(path, f"holds {UNETS}.PlainConvUNet", "if you trust the file, convert it", "weights_only=False")
    monkeypatch.setenv("NNSSL_TEST_TRAP", str(tmp_path / "trap"))
    write_trained(path, unet("plain", 2), 2, ["CT"], logging=Trap())
    refused(path, "holds posix.mkdir", "could run code")
    assert not (tmp_path / "trap").exists()


def test_a_scalar_of_numpy_is_no_way_in(tmp_path):
    """NumPy's function for scalars would unpickle objects; only numbers are read."""

    class Hidden:
        def __reduce__(self):
            scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
            return scalar, (np.dtype("O"), "whatever")

    path = tmp_path / "a.pth"
    torch.save({"network_weights": {}, "logging": Hidden()}, path)
    refused(path, "could run code")
    torch.save({"network_weights": {}, "logging": np.array([1.0])}, path)
    refused(path, "holds numpy._core.multiarray._reconstruct", "convert it")


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.pth"
    refused(path, "there is no such checkpoint")
    path.write_bytes(b"not a checkpoint")
    refused(path, "is not a checkpoint")
    path.write_bytes(pickle.dumps([1, 2]))
    refused(path)
    torch.save([torch.ones(1)], path)
    refused(path, "must hold the dictionary of a checkpoint, got list")
    whole = io.BytesIO()
    torch.save({"network_weights": {"a": torch.ones(1000)}}, whole)
    path.write_bytes(whole.getvalue()[:-600])
    refused(path)


def test_plans_that_are_none(tmp_path):
    path = tmp_path / "a.pth"
    for content, part in (
        ({"configurations": {}}, "not those of nnU-Net version 2"),
        ([1], "plans must be a dictionary, got list"),
    ):
        write_trained(path, unet("plain", 3), 3, ["CT"])
        change_plans(path, lambda _, arguments, content=content: arguments.update(plans=content))
        refused(path, part)
    write_trained(path, unet("plain", 3), 3, ["CT"])
    change_plans(path, lambda _, arguments: arguments["dataset_json"].update(channel_names=["CT"]))
    with pytest.raises(UserError, match="must name the channels as"):
        open_checkpoint(path)


def test_own_files_are_no_trainings(tmp_path, folders):
    """An exported file is one of nnssl, and one of nnU-Net has no plan of nnssl."""
    write_trained(tmp_path / "a.pth", unet("plain", 3), 3, ["CT"])
    provenance = open_checkpoint(tmp_path / "a.pth").own_provenance
    write_checkpoint(tmp_path / "b.pth", {"network_weights": {}}, provenance, {})
    assert not open_checkpoint(tmp_path / "b.pth").by_nnunet
    with pytest.raises(UserError, match="has no section 'pretext'"):
        plan_from_dict(provenance.plans, "x")
