"""Token, patch and size of Primus, from patch, spacing and memory."""

import math
from dataclasses import replace

import pytest
import torch

from nnssl.networks.backbone import build_network
from nnssl.networks.primus import check_size
from planners import primus_rules
from planners.presets import PRESETS, PRIMUS_SIZES
from planners.primus_rules import decide_primus, fitted_patch, primus_architecture, token_vox

PLENTY = 1e15


@pytest.mark.parametrize(
    ("patch", "spacing", "token", "fitted"),
    [
        ((96, 96, 96), (1.0, 1.0, 1.0), (8, 8, 8), (96, 96, 96)),
        ((40, 80, 80), (3.0, 1.3, 1.3), (4, 8, 8), (40, 80, 80)),  # 3.5 voxels of 3 mm are nearer to 4
        ((10, 128, 112), (10.0, 3.0, 3.0), (2, 8, 8), (10, 128, 112)),
        ((7, 192, 160), (10.0, 1.5, 1.5), (1, 8, 8), (7, 192, 160)),
        ((24, 36, 24), (1.5, 1.5, 1.5), (4, 4, 4), (24, 36, 24)),  # 3 x 4 x 3 tokens of 8 voxels would be too few
        ((100, 100, 100), (1.0, 1.0, 1.0), (8, 8, 8), (96, 96, 96)),  # 12.5 tokens: the even neighbour
        ((3, 256, 256), (1.0, 1.0, 1.0), (2, 8, 8), (4, 256, 256)),  # no token longer than the patch
        ((192, 192, 192), (1.0, 1.0, 1.0), (8, 8, 8), (160, 160, 160)),  # 24 x 24 x 24 tokens would be too many
        ((20, 320, 256), (5.0, 0.8, 0.8), (1, 8, 8), (20, 160, 160)),  # 25,600; the longest axes in mm give first
        ((320, 320, 320), (1.0, 1.0, 1.0), (16, 16, 16), (320, 320, 320)),  # an eighth of the patch would be too little
    ],
)
def test_tokens_are_alike_in_mm_and_neither_few_nor_many(patch, spacing, token, fitted):
    chosen, decisions = decide_primus(patch, spacing, 1, PLENTY, 2, PRESETS["cpu"])
    assert chosen.tokens.size_vox == token
    assert chosen.patch == fitted
    assert chosen.tokens.grid == tuple(n // size for n, size in zip(fitted, token, strict=True))
    assert 64 <= math.prod(chosen.tokens.grid) <= 8000
    assert chosen.tokens.size_mm == tuple(n * mm for n, mm in zip(token, spacing, strict=True))
    assert chosen.tokens.stage is None
    assert {what for what, _, _ in decisions} >= {
        "patch (fine-tuning)",
        "tokens",
        "token size",
        "transformer",
        "backbone",
    }
    arch = chosen.architecture["arch_kwargs"]
    check_size(arch["embed_dim"], arch["eva_numheads"], arch["patch_embed_size"], arch["input_shape"])


@pytest.mark.parametrize("size", PRIMUS_SIZES)
def test_every_size_can_be_built_and_run(size):
    """This includes the tokens of thick slices; one block of each network is enough, because blocks are equal."""
    architecture = primus_architecture(size, (1, 8, 8), (3, 16, 24))
    architecture["arch_kwargs"]["eva_depth"] = 1
    network = build_network(architecture, 2, 3, seed=0)
    with torch.no_grad():
        assert network(torch.zeros(1, 2, 3, 16, 24))[0].shape == (1, 3, 3, 16, 24)


def test_less_memory_takes_a_smaller_transformer_and_then_a_smaller_patch():
    patch, spacing, preset = (64, 64, 64), (1.0, 1.0, 1.0), PRESETS["24gb"]
    largest, _ = decide_primus(patch, spacing, 1, PLENTY, 4, preset)
    assert largest.size == preset.primus
    smaller, _ = decide_primus(patch, spacing, 1, 2 * largest.values - 1, 4, preset)
    assert smaller.size == PRIMUS_SIZES[PRIMUS_SIZES.index(preset.primus) - 1]
    assert smaller.tokens == replace(largest.tokens, width=smaller.size.width)
    tiny, _ = decide_primus(patch, spacing, 1, PLENTY, 4, PRESETS["cpu"])
    thinner, _ = decide_primus(patch, spacing, 1, 2 * tiny.values - 1, 4, preset)
    assert (thinner.size, thinner.tokens.size_vox) == (tiny.size, (8, 8, 8))
    assert thinner.patch == (56, 64, 64)
    least = (32, 32, 32)  # an eighth
    assert decide_primus(patch, spacing, 1, 2 * tiny.values * math.prod(least) / math.prod(patch), 4, preset)[0] is None


def test_the_batch_is_what_fits_at_most_that_of_the_u_net():
    patch, spacing = (32, 32, 32), (1.0, 1.0, 1.0)
    chosen, _ = decide_primus(patch, spacing, 1, PLENTY, 7, PRESETS["cpu"])
    assert chosen.batch == 7
    assert decide_primus(patch, spacing, 1, 3.5 * chosen.values, 7, PRESETS["cpu"])[0].batch == 3


def test_nothing_that_fits_is_left_out_with_its_reasons():
    chosen, decisions = decide_primus((64, 64, 64), (1.0, 1.0, 1.0), 1, 10.0, 2, PRESETS["8gb"])
    assert chosen is None
    (what, _, reason), *others = decisions
    assert (what, others) == ("left out", [])
    assert "no suitable patch fits into memory with tokens of 8x8x8 or 16x16x16 voxels" in reason


def test_what_the_installed_libraries_cannot_run_is_left_out(monkeypatch):
    def fail(*_, **__):
        raise TypeError("unexpected argument 'scale_attn_inner'")

    primus_rules.what_cannot_run.cache_clear()
    monkeypatch.setattr(primus_rules, "build_network", fail)
    chosen, decisions = decide_primus((64, 64, 64), (1.0, 1.0, 1.0), 1, PLENTY, 2, PRESETS["8gb"])
    primus_rules.what_cannot_run.cache_clear()
    assert chosen is None
    assert "cannot run Primus: TypeError: unexpected argument 'scale_attn_inner'" in decisions[0][2]


@pytest.mark.parametrize(("size", "rate"), list(zip(PRIMUS_SIZES, (0.0, 0.2, 0.2, 0.2), strict=True)))
def test_architecture_says_size_token_and_patch(size, rate):
    """The sizes that nnU-Net trains use drop path; the strides end at the resolution of the tokens."""
    kwargs = primus_architecture(size, (2, 8, 8), (10, 24, 16))["arch_kwargs"]
    assert kwargs == {
        "embed_dim": size.width, "eva_depth": size.depth, "eva_numheads": size.heads, "patch_embed_size": [2, 8, 8],
        "input_shape": [10, 24, 16], "decoder_features": 32, "drop_path_rate": rate,
        "strides": [[1, 1, 1], [2, 8, 8], [1, 1, 1]],
    }  # fmt: skip


def test_sides_of_tokens_are_powers_of_two():
    assert token_vox(8, (64, 64, 64), (2.5, 0.8, 1.0)) == (2, 8, 8)
    assert token_vox(8, (64, 64, 64), (0.8, 6.4, 20.0)) == (8, 1, 1)
    assert fitted_patch((5, 20, 30), (4, 8, 8)) == (4, 16, 32)
