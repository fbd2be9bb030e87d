"""Exported weights in stock nnU-Net: every network, channels, classes, with and without deep supervision, 2D and 3D."""

import itertools
import json

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.cli.info import explain_checkpoint
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.networks.backbone import build_network
from nnssl.paths import Folders
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from nnssl.weights.fit import fit_weights
from nnssl.weights.fit_report import refuse_below
from nnssl.weights.formats import table_of
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.target import build_target
from nnssl.weights.tensor_names import count_values
from tests.nnssl.weights.tiny_networks import architecture, dataset_json, plans, primus, unet, write_plans, write_source

KINDS = [
    (kind, dim)
    for kind, dim in itertools.product(["plain", "residual", "hybrid", "hybrid_residual", "primus"], [2, 3])
    if (kind, dim) != ("primus", 2)
]
CHANNELS = [(1, 1), (1, 2), (2, 1), (4, 7)]


@pytest.fixture
def folders(tmp_path):
    return Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")))


def stock(network, channels, classes, deep_supervision, seed=99):
    torch.manual_seed(seed)
    return get_network_from_plans(
        network["network_class_name"],
        network["arch_kwargs"],
        network["_kw_requires_import"],
        channels,
        classes,
        deep_supervision=deep_supervision,
    )


def mean_of_channels(weights, channels):
    """By loops: the mean over the old channels, such that the sum over the new ones is the sum over the old."""
    fitted = torch.zeros(weights.shape[0], channels, *weights.shape[2:])
    for new in range(channels):
        for old in range(weights.shape[1]):
            fitted[:, new] += weights[:, old] / channels
    return fitted


@pytest.mark.parametrize(("source_channels", "channels"), CHANNELS)
@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_matrix(tmp_path, folders, kind, dim, source_channels, channels):
    network = architecture(kind, dim)
    weights = write_source(tmp_path / "a.pth", network, dim, [f"s{n}" for n in range(source_channels)])
    path = write_plans(tmp_path / "user", plans(network, dim, channels), [f"t{n}" for n in range(channels)], 4)
    out = export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "out.pth"), folders).path
    for deep_supervision, classes in itertools.product([True, False], [2, 5]):
        target = stock(network, channels, classes, deep_supervision)
        untouched = {name: value.clone() for name, value in target.state_dict().items()}
        load_pretrained_weights(target, str(out), verbose=False)
        changed = []
        for name, value in target.state_dict().items():
            if ".seg_layers." in name:
                assert torch.equal(value, untouched[name]), name
            elif weights[name].shape == value.shape:
                assert torch.equal(value, weights[name]), name
            else:
                changed.append(name)
                torch.testing.assert_close(value, mean_of_channels(weights[name], channels))
        assert bool(changed) == (source_channels != channels)


@pytest.mark.parametrize(("kind", "dim"), [("plain", 2), ("residual", 3), ("hybrid", 3)])
def test_what_was_not_pretrained_is_a_seeded_start(tmp_path, folders, kind, dim):
    network = architecture(kind, dim)
    weights = write_source(tmp_path / "a.pth", network, dim, ["CT"], pretrained=("encoder.", "transformer."))
    path = write_plans(tmp_path / "user", plans(network, dim, 1), ["CT"])
    done = export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "out.pth", seed=3), folders)
    written = torch.load(done.path, weights_only=True)["network_weights"]
    fresh = build_network(network, 1, 3, 3).state_dict()
    for name, value in written.items():
        # nnU-Net registers the encoder in the decoder too
        expected = weights if name.startswith(("encoder.", "decoder.encoder.", "transformer.")) else fresh
        assert torch.equal(value, expected[name]), name
    report = json.loads(table_of(done.path).read_text())
    assert report["share_of_encoder"] == 1.0
    counted = {each["name"]: each for each in report["tensors"]}
    assert counted["decoder.stages.0.convs.0.conv.weight"]["status"] == "random"
    assert counted["decoder.seg_layers.0.weight"]["status"] == "segmentation"
    unique = {value.data_ptr(): value.numel() for value in build_network(network, 1, 3, 3).state_dict().values()}
    assert sum(each["values"] for each in report["tensors"] if each["status"] != "dropped") == sum(unique.values())


def test_hybrid_weights_fit_the_plain_network_and_back(tmp_path, folders):
    for source, target, dropped, missing in [("hybrid", "plain", True, False), ("plain", "hybrid", False, True)]:
        weights = write_source(tmp_path / "a.pth", unet(source, 3), 3, ["CT"])
        path = write_plans(tmp_path / "user", plans(unet(target, 3), 3, 1), ["CT"])
        done = export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "out.pth"), folders)
        written = torch.load(done.path, weights_only=True)["network_weights"]
        shared = [name for name in written if name in weights and ".seg_layers." not in name]
        assert all(torch.equal(written[name], weights[name]) for name in shared)
        assert any(each.status == "dropped" and "transformer" in each.name for each in done.report.tensors) == dropped
        assert any(each.status == "random" and "transformer" in each.name for each in done.report.tensors) == missing


def fitted(
    tmp_path, source_network, network, dim=3, source_dim=3, channels=(1, 1), source=None, target=None, **options
):
    """Weights of one network in another, without files of plans between them."""
    write_source(
        tmp_path / "a.pth", source_network, source_dim, [f"c{n}" for n in range(channels[0])], **(source or {})
    )
    names = [f"c{n}" for n in range(channels[1])]
    content = plans(network, dim, channels[1], **(target or {}))
    built = build_target(content, next(iter(content["configurations"])), dataset_json(names), "target")
    report = fit_weights(open_checkpoint(tmp_path / "a.pth"), built, **options)
    return built.network, report


def status(report, name):
    return next(each for each in report.tensors if each.name == name)


def test_a_deeper_decoder_meets_stages_of_its_own_resolution(tmp_path):
    """The decoder counts its stages from the bottom: with one stage more, each has another number."""
    deep = unet("plain", 3, n_stages=4, features_per_stage=[4, 6, 8, 8], kernel_sizes=[[3] * 3] * 4,
                strides=[[1] * 3, [1, 2, 2], [2] * 3, [1, 1, 2]], n_conv_per_stage=[2] * 4,
                n_conv_per_stage_decoder=[1] * 3)  # fmt: skip
    network, report = fitted(tmp_path, unet("plain", 3, kernel_sizes=[[3] * 3] * 3), deep)
    weights = torch.load(tmp_path / "a.pth", weights_only=True)["network_weights"]
    state = network.state_dict()
    for stage in (0, 1):
        name = f"decoder.stages.{stage}.convs.0.conv.weight"
        assert torch.equal(state[f"decoder.stages.{stage + 1}.convs.0.conv.weight"], weights[name])
    assert status(report, "decoder.stages.0.convs.0.conv.weight").status == "random"
    assert status(report, "encoder.stages.3.0.convs.0.conv.weight").status == "random"
    assert torch.equal(
        state["encoder.stages.2.0.convs.0.conv.weight"], weights["encoder.stages.2.0.convs.0.conv.weight"]
    )


def test_one_more_residual_block_changes_nothing_at_first(tmp_path, monkeypatch):
    deep = unet("residual", 3, n_blocks_per_stage=[1, 2, 3])
    build = build_target

    def build_perturbed(*arguments):  # nnU-Net's own start has zeros there too
        built = build(*arguments)
        with torch.no_grad():
            for parameter in built.network.parameters():
                parameter.add_(0.1)
        return built

    monkeypatch.setattr("tests.nnssl.weights.test_export.build_target", build_perturbed)
    network, report = fitted(tmp_path, unet("residual", 3), deep)
    same, _ = fitted(tmp_path, unet("residual", 3), unet("residual", 3))
    volume = torch.randn(1, 1, 8, 24, 16, generator=torch.Generator().manual_seed(0))
    shallow, deeper = same.encoder(volume)[-1], network.encoder(volume)[-1]
    # the block's activation passes over what is positive and takes a hundredth of the rest once more
    torch.testing.assert_close(deeper, torch.nn.functional.leaky_relu(shallow))
    assert "changing nothing" in status(report, "encoder.stages.2.blocks.2.conv2.norm.weight").reason


def test_one_more_block_of_primus_changes_nothing_at_first(tmp_path):
    network, _ = fitted(tmp_path, primus(), primus(eva_depth=3))
    same, _ = fitted(tmp_path, primus(), primus())
    volume = torch.randn(1, 1, 8, 24, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.eval().encode(volume), same.eval().encode(volume))


def test_positions_of_another_patch_are_resampled(tmp_path):
    """A ramp along one axis stays a ramp; also where two grids have as many tokens."""
    shape = [8, 16, 24]  # tokens 4 x 2 x 3 in place of 4 x 3 x 2
    network, report = fitted(tmp_path, primus(), primus(input_shape=shape), target={"patch_size": shape})
    old = torch.load(tmp_path / "a.pth", weights_only=True)["network_weights"]["eva.pos_embed"].view(4, 3, 2, 36)
    new = network.eva.pos_embed.detach().view(4, 2, 3, 36)
    # centres of two tokens lie a quarter in from the ends of three, linearly: (3/4, 1/4, 0) and (0, 1/4, 3/4)
    rows = torch.stack([0.75 * old[:, 0] + 0.25 * old[:, 1], 0.25 * old[:, 1] + 0.75 * old[:, 2]], dim=1)
    columns = torch.stack([rows[:, :, 0], (rows[:, :, 0] + rows[:, :, 1]) / 2, rows[:, :, 1]], dim=2)
    torch.testing.assert_close(new, columns)
    assert status(report, "eva.pos_embed").status == "adapted"
    assert status(report, "eva.blocks.0.attn.q_proj.weight").status == "transferred"


def test_tokens_of_another_size_stay_random(tmp_path):
    network = primus(patch_embed_size=[4, 8, 8], strides=[[1, 1, 1], [4, 8, 8]])
    report = fitted(tmp_path, primus(), network)[1]
    assert status(report, "down_projection.proj.weight").status == "random"
    assert "no faithful way" in status(report, "down_projection.proj.weight").reason
    assert status(report, "down_projection.proj.bias").status == "transferred"
    assert "2 x 3 x 2" in status(report, "eva.pos_embed").reason
    assert report.share(encoder=True) > 0.5
    with pytest.raises(UserError, match=r"layer that sees the images \(down_projection.proj\) stays random"):
        refuse_below(report, 0.5, "a.pth")
    refuse_below(report, 0.0, "a.pth")


def test_a_volume_that_does_not_change_along_z_is_answered_like_its_slice(tmp_path):
    """2D weights in a 3D network whose kernels are one voxel thick, and 3D weights in a 2D network."""
    flat = unet("plain", 3, kernel_sizes=[[3, 3, 3]] * 3, strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2]])
    image = torch.randn(1, 1, 24, 16, generator=torch.Generator().manual_seed(0))
    volume = image[:, :, None].expand(-1, -1, 7, -1, -1).contiguous()
    inflated, report = fitted(tmp_path, unet("plain", 2), flat, source_dim=2)
    slices, _ = fitted(tmp_path, unet("plain", 2), unet("plain", 2), dim=2, source_dim=2)
    for answer, expected in zip(inflated.encoder(volume), slices.encoder(image), strict=True):
        torch.testing.assert_close(answer, expected[:, :, None].expand_as(answer), rtol=1e-4, atol=1e-5)
    assert report.share(encoder=True) == 1.0
    assert "kernel 3 x 3 to 3 x 3 x 3" in status(report, "encoder.stages.0.0.convs.0.conv.weight").reason
    deflated, _ = fitted(tmp_path, flat, unet("plain", 2), dim=2)
    solid, _ = fitted(tmp_path, flat, flat)
    # away from the ends of the volume, where zeros are padded, a first layer sees no change along z
    first = solid.encoder.stages[0][0].convs[0].conv(volume)[:, :, 3]
    torch.testing.assert_close(deflated.encoder.stages[0][0].convs[0].conv(image), first, rtol=1e-4, atol=1e-5)


def test_a_transformer_that_does_not_come_whole_begins_by_changing_nothing(tmp_path):
    """The gate alone has the same shape in all hybrids, and pretraining opens it."""
    write_source(tmp_path / "a.pth", unet("hybrid", 3), 3, ["CT"])
    assert torch.load(tmp_path / "a.pth", weights_only=True)["network_weights"]["transformer.gate"] != 0
    volume = torch.randn(1, 1, 8, 24, 16, generator=torch.Generator().manual_seed(0))
    plain, _ = fitted(tmp_path, unet("hybrid", 3), unet("plain", 3))
    for change in ({"transformer_width": 24}, {"transformer_depth": 2}, {"token_stage": 1}):
        network, report = fitted(tmp_path, unet("hybrid", 3), unet("hybrid", 3, **change))
        assert status(report, "transformer.gate").status == "random"
        skips = network.encoder(volume)
        stage = change.get("token_stage", 2)
        assert torch.equal(network.transformer(skips[stage]), plain.encoder(volume)[stage]), change
    network, report = fitted(tmp_path, unet("hybrid", 3), unet("hybrid", 3))
    assert status(report, "transformer.gate").status == "transferred"
    assert network.transformer.gate != 0


def test_the_transformer_of_reprec_stays_open(tmp_path):
    """Its last layer is a seeded start in the checkpoint too, and the gate is set when the weights leave."""
    trained = ("encoder.", "transformer.embed.", "transformer.blocks.")
    hybrid = unet("hybrid", 3)
    network, report = fitted(tmp_path, hybrid, hybrid, source={"pretrained": trained})
    weights = torch.load(tmp_path / "a.pth", weights_only=True)["network_weights"]
    assert torch.equal(network.transformer.gate, weights["transformer.gate"])
    assert torch.equal(network.transformer.embed.weight, weights["transformer.embed.weight"])
    assert status(report, "transformer.project.weight").reason == "not pretrained in the source"
    network, _ = fitted(tmp_path, hybrid, unet("hybrid", 3, transformer_depth=2), source={"pretrained": trained})
    assert network.transformer.gate == 0


def test_labels_that_a_cascade_puts_behind_the_images_begin_at_zero(tmp_path, folders):
    network = unet("plain", 3)
    weights = write_source(tmp_path / "a.pth", network, 3, ["CT"])
    content = plans(network, 3, 1)
    content["configurations"]["3d_lowres"] = dict(content["configurations"]["3d_fullres"])
    content["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path = write_plans(tmp_path / "user", content, ["CT"], classes=4)
    options = {"for_plans": str(path), "configuration": "3d_cascade_fullres", "out": tmp_path / "o.pth"}
    done = export(tmp_path / "a.pth", ExportSettings(**options), folders)
    first = "encoder.stages.0.0.convs.0.conv.weight"
    found = torch.load(done.path, weights_only=True)["network_weights"][first]
    assert torch.equal(found[:, :1], weights[first])
    assert found.shape[1] == 4
    assert not found[:, 1:].any()
    assert status(done.report, first).reason == "3 inputs of the stage before begin at 0"


def test_primus_without_layer_scale_keeps_its_blocks(tmp_path):
    write_source(tmp_path / "a.pth", primus(), 3, ["c0"])
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    for name in [name for name in content["network_weights"] if ".gamma_" in name]:
        del content["network_weights"][name]
    torch.save(content, tmp_path / "a.pth")
    built = build_target(plans(primus(), 3, 1), "3d_fullres", dataset_json(["c0"]), "target")
    report = fit_weights(open_checkpoint(tmp_path / "a.pth"), built)
    assert status(report, "eva.blocks.1.gamma_2").status == "adapted"
    assert torch.equal(built.network.eva.blocks[1].gamma_2, torch.ones(36))


def test_names_that_were_copied_apart_are_still_one_tensor(tmp_path):
    """As a conversion to float16 does, in whatever order the names are written."""
    write_source(tmp_path / "a.pth", unet("residual", 3), 3, ["c0"])
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    halves = {name: value.half() for name, value in content["network_weights"].items()}
    content["network_weights"] = halves
    torch.save(content, tmp_path / "b.pth")
    content["network_weights"] = dict(sorted(halves.items()))
    torch.save(content, tmp_path / "sorted.pth")
    built = build_target(plans(unet("residual", 3), 3, 1), "3d_fullres", dataset_json(["c0"]), "target")
    whole, halved = (fit_weights(open_checkpoint(tmp_path / name), built) for name in ("a.pth", "b.pth"))
    assert whole == halved
    from_sorted = fit_weights(open_checkpoint(tmp_path / "sorted.pth"), built)
    assert set(from_sorted.tensors) == set(whole.tensors)
    counts = {count_values(open_checkpoint(tmp_path / name).tensors) for name in ("a.pth", "b.pth", "sorted.pth")}
    assert len(counts) == 1


def test_named_channels(tmp_path, folders):
    network = unet("plain", 3)
    weights = write_source(tmp_path / "a.pth", network, 3, ["T1", "T2", "FLAIR"])
    first = "encoder.stages.0.0.convs.0.conv.weight"

    def exported(names, policy=None):
        path = write_plans(tmp_path / "user", plans(network, 3, len(names)), names)
        out = export(
            tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "o.pth", policy=policy), folders
        ).path
        return torch.load(out, weights_only=True)["network_weights"][first]

    zeros = torch.zeros_like(weights[first][:, 0])
    # as many channels under the same names: another order is seen without being asked for
    assert torch.equal(exported(["FLAIR", "T1", "T2"]), weights[first][:, [2, 0, 1]])
    found = exported(["t2", "DWI"], "named")
    assert torch.equal(found, torch.stack([weights[first][:, 1], zeros], dim=1))
    # names in common are enough, upper and lower case aside
    assert torch.equal(exported(["t2", "t1", "flair"]), weights[first][:, [1, 0, 2]])
    assert torch.equal(
        exported(["T2", "DWI", "T1"]), torch.stack([weights[first][:, 1], zeros, weights[first][:, 0]], 1)
    )
    # other names, as many: nothing tells which is which, so they are taken as they are
    assert torch.equal(exported(["a", "b", "c"]), weights[first])
    with pytest.raises(UserError, match=r"no channel of one has the name .*source: T1, T2, FLAIR; target: CT"):
        exported(["CT"], "named")


def test_too_little_is_refused_and_nothing_is_written(tmp_path, folders):
    write_source(tmp_path / "a.pth", unet("plain", 3), 3, ["CT"])
    path = write_plans(tmp_path / "user", plans(unet("residual", 3), 3, 1), ["CT"])
    lines = []
    with (
        pytest.raises(UserError, match=r"only 0.0% of the encoder's parameters .* less than 50%"),
        lines_to(lines.append),
    ):
        export(tmp_path / "a.pth", ExportSettings(for_plans=str(path), out=tmp_path / "out.pth"), folders)
    assert any("the source has none" in line for line in lines)
    assert not (tmp_path / "out.pth").exists()
    wide = write_plans(tmp_path / "wide", plans(unet("plain", 3, features_per_stage=[4, 6, 10]), 3, 1), ["CT"])
    done = export(
        tmp_path / "a.pth", ExportSettings(for_plans=str(wide), out=tmp_path / "out.pth", least_share=0.1), folders
    )
    assert 0.1 < done.report.share(encoder=True) < 0.5
    assert (
        status(done.report, "encoder.stages.2.0.convs.0.conv.weight").reason
        == "8 x 6 x 3 x 3 x 3 in the source, 10 x 6 x 3 x 3 x 3 here"
    )


def test_stock_trainers_of_primus(tmp_path, folders):
    """Their networks hold numbers of classes in the shape of their decoder; the encoder is the same."""
    stock_size = {"embed_dim": 396, "eva_depth": 1, "eva_numheads": 6, "patch_embed_size": [8, 8, 8]}
    network = primus(**stock_size, input_shape=[16, 16, 8], strides=[[1] * 3, [8] * 3])
    weights = write_source(tmp_path / "a.pth", network, 3, ["CT"], patch_size=[16, 16, 8])
    path = write_plans(tmp_path / "user", plans(unet("plain", 3), 3, 1, patch_size=[16, 24, 16]), ["CT"], classes=5)
    name = "nnUNet_Primus_S_Trainer"
    done = export(
        tmp_path / "a.pth",
        ExportSettings(for_plans=str(path), out=tmp_path / "o.pth", trainer=name, least_share=0.05),
        folders,
    )
    written = torch.load(done.path, weights_only=True)
    assert "nnssl_adaptation_plan" not in written
    assert "nnssl" not in written  # its plan is not that of this network
    assert any(name in line for line in explain_checkpoint(done.path))
    with pytest.raises(UserError, match=f"was exported for nnU-Net's {name}"):
        open_checkpoint(done.path).check_tensors()
    (tmp_path / "user" / "dataset.json").unlink()
    with pytest.raises(UserError, match="decide the shape of this trainer's network"):
        export(
            tmp_path / "a.pth",
            ExportSettings(for_plans=str(path), channels=["CT"], trainer=name, out=tmp_path / "p.pth"),
            folders,
        )
    state = written["network_weights"]
    assert torch.equal(state["eva.blocks.0.mlp.fc2.weight"], weights["eva.blocks.0.mlp.fc2.weight"])
    assert state["eva.pos_embed"].shape == (1, 12, 396)
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(json.loads(path.read_text()))
    arguments = manager, manager.get_configuration("3d_fullres"), 1, 5, False
    target = nnUNet_Primus_S_Trainer.build_network_architecture(*arguments)
    load_pretrained_weights(target, str(done.path), verbose=False)
    assert torch.equal(target.eva.blocks[0].mlp.fc2.weight, weights["eva.blocks.0.mlp.fc2.weight"])
