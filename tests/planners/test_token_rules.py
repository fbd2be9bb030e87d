"""The feature map that becomes tokens, the mask block, and the size of the transformer."""

import math
from dataclasses import replace

import pytest

from nnssl.plan import TokenGrid
from planners.presets import PRESETS, VIT_SIZES
from planners.token_rules import decide_tokens, decide_transformer, hybrid_architecture


def architecture(strides, features=None):
    kwargs = {
        "strides": strides,
        "kernel_sizes": [[3] * len(strides[0])] * len(strides),
        "features_per_stage": features or [4 + stage for stage in range(len(strides))],
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": ["conv_op"]}


@pytest.mark.parametrize(
    ("strides", "patch", "spacing_mm", "stage", "grid", "block"),
    [
        # 512 positions are 2.6 times RepRec's 196, 64 are a third of them: the ratio counts, not the difference
        ([[1] * 3] + [[2] * 3] * 4, (64, 64, 64), (1.0, 1.0, 1.0), 3, (8, 8, 8), (2, 2, 2)),
        # 12800, 1600 and 400; tokens of 20 x 12.8 x 12.8 mm, of which 25.6 mm are 1.3 and 2
        (
            [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
            (20, 160, 128),
            (5.0, 0.8, 0.8),
            4,
            (5, 10, 8),
            (1, 2, 2),
        ),
        # sides are rounded up; two of three tokens would be more than half of the grid, half a token is one
        ([[1, 1, 1], [2, 4, 4]], (6, 26, 24), (1.0, 2.0, 0.5), 1, (3, 7, 6), (1, 1, 2)),
        ([[1, 1], [4, 4], [2, 2]], (100, 60), (0.7, 1.3), 2, (13, 8), (3, 2)),
        # 120 positions at full resolution are no tokens, and 30 are too few
        ([[1, 1], [2, 2]], (10, 12), (1.0, 1.0), None, None, None),
        # 2001 are too many, 23 and 63 too few
        ([[1, 1], [2, 2], [3, 30]], (6, 1334), (1.0, 1.0), None, None, None),
        ([[1, 1], [2, 2]], (18, 14), (1.0, 1.0), None, None, None),
        ([[1, 1], [2, 2]], (16, 16), (1.0, 1.0), 1, (8, 8), (2, 2)),
        ([[1, 1], [2, 2]], (80, 100), (1.0, 1.0), 1, (40, 50), (2, 2)),
    ],
)
def test_stage_and_block(strides, patch, spacing_mm, stage, grid, block):
    tokens, reasons = decide_tokens(architecture(strides), patch, spacing_mm)
    if stage is None:
        assert tokens is None
        assert reasons[0][0] == "left out"
        return
    total = [math.prod(stride[axis] for stride in strides[: stage + 1]) for axis in range(len(patch))]
    assert (tokens.stage, tokens.grid, tokens.mask_block) == (stage, grid, block)
    assert tokens.size_vox == tuple(total)
    assert tokens.size_mm == pytest.approx([n * mm for n, mm in zip(total, spacing_mm, strict=True)])
    assert tokens.width == 4 + stage
    assert f"= {math.prod(grid):,} at stage {stage}" in reasons[0][1]


GRID = TokenGrid(stage=2, grid=(4, 8, 4), size_vox=(2, 4, 4), size_mm=(6.0, 4.0, 4.0), width=9, mask_block=(1, 2, 2))


def test_few_tokens_take_the_next_smaller_transformer():
    """Fewer than 128 tokens reduce the size by one step, except for the smallest transformer."""
    fewer = replace(GRID, grid=(127, 1, 1))
    for preset in PRESETS.values():
        place = VIT_SIZES.index(preset.transformer)
        size, reasons = decide_transformer(GRID, preset)
        assert size == preset.transformer
        assert "smaller" not in reasons[0][2]
        assert ("as in the paper" in reasons[0][2]) == (place == 3)
        size, reasons = decide_transformer(fewer, preset)
        assert size == VIT_SIZES[max(0, place - 1)]
        assert ("one size smaller because of only 127 tokens" in reasons[0][2]) == (place > 0)
    assert PRESETS["24gb"].transformer == VIT_SIZES[3]


@pytest.mark.parametrize(
    ("stock", "hybrid"),
    [("PlainConvUNet", "HybridUNet"), ("ResidualEncoderUNet", "HybridResidualEncoderUNet")],
)
def test_a_hybrid_is_the_u_net_with_a_transformer_of_that_size_on_that_stage(stock, hybrid):
    unet = architecture([[1] * 3, [1, 2, 2], [2, 2, 2]])
    unet["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{stock}"
    size = PRESETS["8gb"].transformer
    made = hybrid_architecture(unet, GRID, size)
    assert made["network_class_name"] == f"nnssl.networks.hybrid.{hybrid}"
    assert made["_kw_requires_import"] == unet["_kw_requires_import"]
    own = {
        "token_stage": 2, "transformer_width": size.width, "transformer_depth": size.depth,
        "transformer_heads": size.heads,
    }  # fmt: skip
    assert made["arch_kwargs"] == {**unet["arch_kwargs"], **own}
    assert len({size.width, size.depth, size.heads, 2}) == 4
