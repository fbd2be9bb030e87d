"""The plane of PCRL's turns and the rank of its attention."""

import pytest

from planners.context_rules import decide_context

CONV = {2: "torch.nn.modules.conv.Conv2d", 3: "torch.nn.modules.conv.Conv3d"}


def architecture(features, kernels, dim=3):
    return {"arch_kwargs": {"features_per_stage": features, "kernel_sizes": kernels, "conv_op": CONV[dim]}}


@pytest.mark.parametrize(
    ("features", "kernel", "dim", "expected"),
    [
        (320, [3, 3, 3], 3, 64),  # 320 x 64^2 is 1.3 million, a convolution 2.8 million
        (64, [3, 3, 3], 3, 32),  # 64 x 32^2 = 65,536 and 64 x 64^2 = 262,144, a convolution 110,592
        (64, [1, 3, 3], 3, 16),  # 64 x 16^2 = 16,384 and 64 x 32^2 = 65,536, a convolution 36,864
        (128, [3, 3], 2, 32),
        (4, 3, 2, 8),
        (10, [3, 3, 3], 3, 8),  # 16 would fit, 10 x 16^2 = 2,560 of 2,700, and is more than there are channels
    ],
)
def test_attention_is_no_larger_than_a_convolution(features, kernel, dim, expected):
    chosen, decisions = decide_context(architecture([8, features], [3, kernel], dim), (32,) * dim, (1.0,) * dim, None)
    assert chosen.attention_rank == expected
    assert f"all {features} channels" in decisions[1][2]


def test_turns_keep_the_grid():
    plain = architecture([8, 64], [[3, 3, 3]] * 2)
    chosen, decisions = decide_context(plain, (24, 36, 24), (1.5, 1.5, 1.5), None)
    assert (chosen.turn_plane, chosen.quarter_turns) == ((0, 2), True)
    assert "24 voxels of 1.5 mm" in decisions[0][2]
    chosen, decisions = decide_context(plain, (10, 128, 112), (10.0, 1.5, 1.5), 0)
    assert (chosen.turn_plane, chosen.quarter_turns) == ((1, 2), False)
    assert "only half turns keep the grid" in decisions[0][2]
