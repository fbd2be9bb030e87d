import copy
import math

import pytest
import torch

from nnssl.networks.backbone import build_network, encoder_strides
from nnssl.networks.heads import PooledProjection, TokenDecoder
from nnssl.networks.tokens import map_to_tokens, sine_cosine_positions, tokens_to_map

UNET = "dynamic_network_architectures.architectures.unet"


def architecture(dim: int, residual: bool, hybrid: bool) -> dict:
    """A tiny U-Net with anisotropic strides and kernels, as a plan writes it."""
    stages = {2: ([1, 1], [2, 2], [2, 1]), 3: ([1, 1, 1], [1, 2, 2], [2, 2, 2])}[dim]
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[1] + [3] * (dim - 1), [3] * dim, [3] * dim],
        "strides": [list(s) for s in stages],
        blocks: [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = f"{UNET}.{'ResidualEncoderUNet' if residual else 'PlainConvUNet'}"
    if hybrid:
        name = f"nnssl.networks.hybrid.{'HybridResidualEncoderUNet' if residual else 'HybridUNet'}"
        kwargs |= {"token_stage": 1, "transformer_width": 16, "transformer_depth": 2, "transformer_heads": 2}
    return {
        "network_class_name": name,
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


PATCHES = {2: (12, 20), 3: (4, 12, 20)}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_closed_gate_is_the_stock_unet(dim, residual):
    """With the gate at 0 the network computes exactly what the stock U-Net with the same weights computes."""
    hybrid = build_network(architecture(dim, residual, True), 2, 3, seed=1)
    stock = build_network(architecture(dim, residual, False), 2, 3, seed=2)
    stock.load_state_dict({k: v for k, v in hybrid.state_dict().items() if not k.startswith("transformer.")})
    volumes = torch.randn(2, 2, *PATCHES[dim])
    for mine, theirs in zip(hybrid(volumes), stock(volumes), strict=True):
        assert torch.equal(mine, theirs)
    hybrid.transformer.gate.data.fill_(1.0)
    assert not torch.allclose(hybrid(volumes)[0], stock(volumes)[0])


@pytest.mark.parametrize("residual", [False, True])
def test_all_that_follows_the_transformer_reads_its_output(residual):
    hybrid = build_network(architecture(3, residual, True), 2, 3, seed=1)
    hybrid.transformer.gate.data.fill_(1.0)
    volumes = torch.randn(2, 2, *PATCHES[3])
    plain, maps = hybrid.encoder(volumes), hybrid.transformed_maps(volumes)
    assert hybrid.token_stage == 1
    assert torch.equal(maps[0], plain[0])
    torch.testing.assert_close(maps[1], hybrid.transformer(plain[1]))
    torch.testing.assert_close(maps[2], hybrid.encoder.stages[2](maps[1]))
    assert not torch.allclose(maps[2], plain[2])
    for mine, theirs in zip(hybrid(volumes), hybrid.decoder(maps), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dim", [2, 3])
def test_gradient_reaches_every_parameter_once_the_gate_is_open(dim):
    network = build_network(architecture(dim, False, True), 1, 2, seed=0)
    network.transformer.gate.data.fill_(1.0)
    sum(output.square().mean() for output in network(torch.randn(2, 1, *PATCHES[dim]))).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias before an instance norm is subtracted again
    assert [name for name in without if not name.endswith("conv.bias")] == []


def test_seed_decides_the_weights_and_nothing_else_does():
    torch.manual_seed(0)
    first = build_network(architecture(3, False, True), 1, 2, seed=5).state_dict()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = build_network(architecture(3, False, True), 1, 2, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = build_network(architecture(3, False, True), 1, 2, seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["transformer.embed.weight"], other["transformer.embed.weight"])


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 5)])
def test_tokens_round_trip_and_order(grid):
    feature_map = torch.arange(2 * 4 * math.prod(grid), dtype=torch.float32).reshape(2, 4, *grid)
    tokens = map_to_tokens(feature_map)
    assert torch.equal(tokens_to_map(tokens, grid), feature_map)
    place = tuple(n - 2 for n in grid)
    index = 0
    for n, i in zip(grid, place, strict=True):
        index = index * n + i
    assert torch.equal(tokens[1, index], feature_map[(1, slice(None), *place)])


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 5)])
def test_positions_match_the_formula(grid):
    """Vaswani et al. 2017: sin and cos of position / 10000^(i / frequencies), an equal share of channels per axis."""
    width = 8 * len(grid) + 2
    positions = sine_cosine_positions(grid, width)
    frequencies = width // (2 * len(grid))
    for token, place in enumerate(torch.cartesian_prod(*(torch.arange(n) for n in grid)).tolist()):
        expected = []
        for coordinate in place:
            angles = [coordinate / 10_000 ** (i / frequencies) for i in range(frequencies)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected += [0.0] * (width - len(expected))
        assert positions[token].tolist() == pytest.approx(expected, abs=1e-5)
    assert len(positions.unique(dim=0)) == len(positions)


def test_encoding_a_subset_ignores_the_rest():
    network = build_network(architecture(3, False, True), 1, 2, seed=0)
    features = torch.randn(2, 10, 8)
    positions = torch.randn(1, 10, 16)
    kept = [0, 3, 7]
    before = network.transformer.encode(features[:, kept], positions[:, kept])
    features[:, [1, 2, 4, 5, 6, 8, 9]] = 1e6
    assert torch.equal(network.transformer.encode(features[:, kept], positions[:, kept]), before)


def test_token_decoder_puts_tokens_where_they_belong():
    """Permuting the visible tokens together with their places changes nothing; masked places see only the mask token."""
    torch.manual_seed(0)
    decoder = TokenDecoder(width=8, depth=1, heads=2, channels=3)
    positions = torch.randn(7, 8)
    encoded = torch.randn(2, 3, 8)
    visible = torch.tensor([[0, 4, 6], [1, 2, 5]])
    order = [2, 0, 1]
    output = decoder(encoded, visible, positions)
    assert torch.allclose(decoder(encoded[:, order], visible[:, order], positions), output, atol=1e-6)
    # without blocks, a masked place depends on its position only
    decoder.blocks = torch.nn.Identity()
    plain = decoder(encoded, visible, positions)
    expected = decoder.predict(decoder.mask_token[0] + positions[3])
    assert torch.allclose(plain[0, 3], expected[0], atol=1e-6)
    assert torch.allclose(plain[1, 2], decoder.predict(decoder.embed(encoded[1, 1]) + positions[2]), atol=1e-6)


def test_pooled_projection_is_on_the_unit_sphere_and_float32():
    head = PooledProjection(6, 6, 4, 3, "none")
    feature_map = torch.randn(3, 6, 2, 3, 4)
    embedding = head(feature_map)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(feature_map).dtype == torch.float32
    # pooling: a permutation of the positions changes nothing
    assert torch.allclose(head(feature_map.flip(2, 4)), embedding, atol=1e-6)
    # two maps with equal means per channel, one with channels that occur together and one without, are told apart
    together = torch.zeros(2, 6, 1, 2, 2)
    together[0, :2, 0, 0] = 1.0
    together[1, 0, 0, 0] = together[1, 1, 0, 1] = 1.0
    assert torch.equal(together.mean(dim=(2, 3, 4))[0], together.mean(dim=(2, 3, 4))[1])
    assert not torch.allclose(head(together)[0], head(together)[1])


def test_memory_measure_counts_the_transformer():
    hybrid = build_network(architecture(3, False, True), 1, 2, seed=0)
    stock = build_network(architecture(3, False, False), 1, 2, seed=0)
    patch = PATCHES[3]
    tokens = 4 * 6 * 10
    per_token = 2 * 16 + 2 * 9 * 16
    assert (
        hybrid.compute_conv_feature_map_size(patch) - stock.compute_conv_feature_map_size(patch) == tokens * per_token
    )


def test_unknown_token_stage_is_an_error():
    wrong = copy.deepcopy(architecture(3, False, True))
    wrong["arch_kwargs"]["token_stage"] = 3
    with pytest.raises(ValueError, match="token_stage must be from 0 to 2, got 3"):
        build_network(wrong, 1, 2, seed=0)


def test_encoder_strides_are_per_axis():
    plan = architecture(3, False, False)
    assert encoder_strides(plan) == [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    plan["arch_kwargs"]["strides"] = [1, 2, 2]
    assert encoder_strides(plan) == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
