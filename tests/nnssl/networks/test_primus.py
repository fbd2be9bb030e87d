"""Primus as a plan's network: what nnU-Net builds and loads, visible tokens, what cannot be built."""

import math
import subprocess
import sys

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl.networks.backbone import build_network
from nnssl.networks.primus import PlannedPrimus, check_size
from nnssl.networks.primus_positions import resample_positions

SHAPE, TOKEN, GRID = (8, 24, 16), (2, 8, 8), (4, 3, 2)


def architecture(**changes) -> dict:
    arguments = {
        "embed_dim": 36,
        "eva_depth": 2,
        "eva_numheads": 3,
        "patch_embed_size": list(TOKEN),
        "input_shape": list(SHAPE),
        "decoder_features": 8,
        "strides": [[1, 1, 1], list(TOKEN), [1, 1, 1]],
    }
    return {
        "network_class_name": "nnssl.networks.primus.PlannedPrimus",
        "arch_kwargs": arguments | changes,
        "_kw_requires_import": [],
    }


def build(channels: int = 2, classes: int = 3, seed: int = 0, **changes) -> PlannedPrimus:
    return build_network(architecture(**changes), channels, classes, seed)


def volumes(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 2, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_logits_as_nnunet_wants_them():
    network = build()
    (logits,) = network(volumes())
    assert logits.shape == (3, 3, *SHAPE)
    network.decoder.deep_supervision = False
    assert torch.equal(network(volumes()), logits)


def test_weights_fit_any_number_of_classes(tmp_path):
    """By nnU-Net's own loader; all but the segmentation layer."""
    source, target = build(classes=3, seed=1), build(classes=7, seed=2)
    torch.save({"network_weights": source.state_dict()}, tmp_path / "a.pth")
    load_pretrained_weights(target, str(tmp_path / "a.pth"))
    for name, value in target.state_dict().items():
        assert ".seg_layers." in name or torch.equal(value, source.state_dict()[name]), name
    assert target.decoder.seg_layers[0].out_channels == 7


def test_the_encoder_is_that_of_stock_primus():
    network = build().eval()
    stock = Primus(2, 36, TOKEN, 4, 2, 3, SHAPE, init_values=0.1, scale_attn_inner=True).eval()
    encoder = {n: v for n, v in network.state_dict().items() if n.startswith(("eva.", "down_projection."))}
    missing = stock.load_state_dict(encoder, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("up_projection.", "mask_token")) for name in missing.missing_keys)
    tokens, _ = stock.eva(stock.down_projection(volumes()).flatten(2).transpose(1, 2))
    torch.testing.assert_close(network.encode(volumes()), tokens, atol=1e-5, rtol=1e-4)


def test_all_tokens_visible_in_any_order_are_the_tokens():
    network = build().eval()
    everything = network.encode(volumes())
    order = torch.stack([torch.randperm(math.prod(GRID), generator=torch.Generator().manual_seed(i)) for i in range(3)])
    found = network.encode(volumes(), order)
    expected = everything.gather(1, order[..., None].expand(-1, -1, 36))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [2, 3])
def test_visible_tokens_see_nothing_of_masked_ones(batch):
    """To the bit, also with as many patches as heads, where an axis left out would mix patches up."""
    network = build().eval()
    visible = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i))[:6] for i in range(batch)])
    original = volumes(batch)
    other = original.clone()
    for patch in range(batch):
        for token in set(range(24)) - set(visible[patch].tolist()):
            z, y, x = (int(i) for i in torch.unravel_index(torch.tensor(token), GRID))
            other[patch, :, 2 * z : 2 * z + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 99.0
    assert not torch.equal(original, other)
    found = network.encode(original, visible)
    assert torch.equal(found, network.encode(other, visible))
    alone = [network.encode(original[i : i + 1], visible[i : i + 1]) for i in range(batch)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_the_measure_of_memory_counts_what_layers_put_out():
    network = build().eval()
    sizes = []
    linear = [
        m for m in network.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d, torch.nn.ConvTranspose3d))
    ]
    hooks = [m.register_forward_hook(lambda _m, _i, out: sizes.append(out[0].numel())) for m in linear]
    network(volumes(1))
    for hook in hooks:
        hook.remove()
    assert network.compute_conv_feature_map_size(SHAPE) == sum(sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 40}, "multiple of six times the 3 heads, got 40"),
        ({"patch_embed_size": [2, 6, 8]}, "powers of two"),
        ({"patch_embed_size": [1, 1, 1]}, "powers of two"),
        ({"input_shape": [8, 20, 16]}, "input_shape must be a multiple"),
        ({"input_shape": [24, 16], "patch_embed_size": [8, 8]}, "must have 3 axes"),
    ],
)
def test_what_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_sizes_that_nnunet_has_can_be_built():
    for width, heads in ((396, 6), (792, 12), (864, 12), (1056, 16)):
        check_size(width, heads, (8, 8, 8), (64, 64, 64))


def test_positions_for_another_grid():
    """A linear ramp stays one away from the borders, and its own grid gives itself."""
    ramp = torch.stack(torch.meshgrid(*[torch.arange(n).float() for n in (4, 6, 4)], indexing="ij"), dim=-1)
    positions = ramp.reshape(1, -1, 3)
    assert resample_positions(positions, (4, 6, 4), (4, 6, 4)) is positions
    finer = resample_positions(positions, (4, 6, 4), (8, 6, 8)).view(8, 6, 8, 3)
    expected = (torch.arange(8).float() + 0.5) / 2 - 0.5
    torch.testing.assert_close(finer[1:-1, 2, 3, 0], expected[1:-1])
    torch.testing.assert_close(finer[3, :, 3, 1], torch.arange(6).float())


@pytest.mark.nightly
def test_commands_import_timm_and_torchvision_only_for_primus():
    modules = "sys, trainers.finetuning.finetune, trainers.pretraining.pretext, nnssl.methods.mae"
    code = f"import {modules}; assert not {{'timm', 'torchvision'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
