"""Encoder stages of anatomical embeddings, and the pairing of scans."""

import pytest

from planners.anatomy_rules import decide_anatomy


def architecture(strides):
    kernels = [[3] * len(strides[0])] * len(strides)
    return {"arch_kwargs": {"strides": strides, "kernel_sizes": kernels}}


@pytest.mark.parametrize(
    ("strides", "shape", "fine", "coarse"),
    [
        ([[1, 1, 1]] + [[2, 2, 2]] * 4, (96, 96, 96), 1, 4),  # 6 x 6 x 6 cells of 16 voxels
        ([[1, 1, 1]] + [[2, 2, 2]] * 5, (128, 128, 128), 1, 4),  # 32 voxels would be too long
        ([[1, 1, 1]] + [[2, 2, 2]] * 4, (32, 64, 64), 1, 4),  # 2 x 4 x 4 = 32 cells
        ([[1, 1, 1]] + [[2, 2, 2]] * 4, (48, 48, 48), 1, 4),  # 3 x 3 x 3 = 27 cells are just enough
        ([[1, 1, 1]] + [[2, 2, 2]] * 4, (32, 48, 48), 1, 3),  # 2 x 3 x 3 = 18 cells are too few
        ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]], (16, 96, 96), 1, 3),
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2]], (24, 36, 24), 1, 2),
        ([[1, 1, 1], [4, 4, 4], [2, 2, 2]], (48, 48, 48), 0, 2),  # no stage of half the resolution
        ([[1, 1, 1], [2, 2, 2]], (4, 4, 4), 0, 1),  # too few cells everywhere: the next stage
        ([[1, 1]] + [[2, 2]] * 5, (128, 112), 1, 4),
    ],
)
def test_half_and_a_sixteenth_of_the_resolution(strides, shape, fine, coarse):
    chosen, decisions = decide_anatomy(architecture(strides), shape, (2.0,) * len(shape))
    assert (chosen.fine_stage, chosen.coarse_stage) == (fine, coarse)
    assert f"fine at stage {fine}" in decisions[0][1]
    assert f"coarse at stage {coarse}" in decisions[0][1]


def test_cells_are_told_in_mm():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    _, decisions = decide_anatomy(architecture(strides), (10, 64, 64), (5.0, 1.5, 1.5))
    assert "cells of 5 x 3 x 3 mm; coarse at stage 2, cells of 10 x 6 x 6 mm" in decisions[0][1]
    assert "has 1,280" in decisions[0][2]


@pytest.mark.parametrize(("scan_mm", "partners"), [((96, 60, 60), "sam"), ((95, 60, 60), "body_box"), (None, "sam")])
def test_embeddings_are_for_scans_longer_than_a_patch(scan_mm, partners):
    strides = [[1, 1, 1]] + [[2, 2, 2]] * 4
    chosen, decisions = decide_anatomy(architecture(strides), (32, 32, 32), (2.0, 2.0, 2.0), scan_mm)
    assert chosen.partners == partners
    assert ("body's box" in decisions[1][1]) == (partners == "body_box")
