"""Encoder stages of anatomical embeddings, and the pairing of scans."""

from dataclasses import replace

import numpy as np
import pytest

from nnssl.methods import find_stage
from nnssl.plan import TokenGrid, TransformerSize
from planners.anatomy_rules import decide_anatomy
from planners.presets import PRESETS
from planners.stage_rules import Frame, StageRules
from planners.step_rules import NetworkCost


def architecture(strides):
    kernels = [[3] * len(strides[0])] * len(strides)
    features = [8 * 2**stage for stage in range(len(strides))]
    arguments = {"strides": strides, "kernel_sizes": kernels, "features_per_stage": features}
    return {"arch_kwargs": {**arguments, "conv_op": "torch.nn.modules.conv.Conv3d"}}


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
    chosen, decisions = decide_anatomy(architecture(strides), shape, (2.0,) * len(shape), (300.0,) * len(shape))
    assert (chosen.fine_stage, chosen.coarse_stage) == (fine, coarse)
    assert f"fine at stage {fine}" in decisions[0][1]
    assert f"coarse at stage {coarse}" in decisions[0][1]


def test_cells_are_told_in_mm():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    _, decisions = decide_anatomy(architecture(strides), (10, 64, 64), (5.0, 1.5, 1.5), (90.0, 200.0, 200.0))
    assert "cells of 5 x 3 x 3 mm; coarse at stage 2, cells of 10 x 6 x 6 mm" in decisions[0][1]
    assert "has 1,280" in decisions[0][2]


@pytest.mark.parametrize(
    ("scan_mm", "partners"), [((96, 60, 60), "sam"), ((95, 60, 60), "body_box"), ((60, 60, 97), "sam")]
)
def test_embeddings_are_for_scans_longer_than_a_patch(scan_mm, partners):
    strides = [[1, 1, 1]] + [[2, 2, 2]] * 4
    chosen, decisions = decide_anatomy(architecture(strides), (32, 32, 32), (2.0, 2.0, 2.0), scan_mm)
    assert chosen.partners == partners
    assert ("body's box" in decisions[1][1]) == (partners == "body_box")


SPACING = (3.0, 1.3, 1.3)
SCANS_VOX = (151, 252, 252)


def rules(configuration: str, patch: tuple[int, ...]) -> StageRules:
    """Return the rules of a configuration whose stages have a patch, for scans of 151 x 252 x 252 voxels."""
    primus = configuration.endswith("primus")
    token, grid = (8, 12, 12), tuple(n // size for n, size in zip(patch, (8, 12, 12), strict=True))
    size_mm = tuple(n * mm for n, mm in zip(token, SPACING, strict=True))
    tokens = TokenGrid(stage=None, grid=grid, size_vox=token, size_mm=size_mm, width=36, mask_block=(1, 1, 1))
    cost = NetworkCost(1.0, 0.0, 10.0, 0.0, 0, 1000, 1)
    unet = architecture([[1, 1, 1]] + [[2, 2, 2]] * 5)
    frame = Frame(unet, patch, SPACING, cost, tokens if primus else None)
    shared = {
        "case_folder": "cases",
        "spacing_mm": SPACING,
        "thick_axis": None,
        "rotation_deg": (30.0, 30.0, 30.0),
        "flip_axes": (1, 2),
        "intensity_views": ("contrast",),
    }
    shapes, spacings = np.array([SCANS_VOX] * 12), np.array([SPACING] * 12)
    size = TransformerSize(width=36, depth=2, heads=6, decoder_depth=2) if primus else None
    found = StageRules(configuration, frame, shared, size, PRESETS["80gb"], shapes, spacings, "full")
    found.patches = [patch]
    return found


@pytest.mark.parametrize(
    ("configuration", "patch", "partners", "patches"),
    [
        ("3d_fullres_primus", (72, 168, 168), "sam", "2.1 x 1.5 x 1.5"),
        ("3d_fullres", (128, 256, 256), "body_box", "1.2 x 1.0 x 1.0"),
        ("3d_fullres", (72, 168, 168), "sam", "2.1 x 1.5 x 1.5"),
        ("3d_fullres_primus", (128, 252, 252), "body_box", "1.2 x 1.0 x 1.0"),
    ],
)
def test_the_patch_of_the_stage_that_is_run_decides(configuration, patch, partners, patches):
    """Primus's patch for a run on Primus, whatever that of ``3d_fullres`` is."""
    stage = find_stage("alice.alignment")[1]
    plan, reasons = rules(configuration, patch).decide(stage)
    assert plan is not None
    assert plan.schedule.patch_size == patch
    assert plan.anatomy.partners == partners
    (reason,) = [why for what, _, why in reasons if what == "places in other scans (alice.alignment)"]
    sides = "x".join(map(str, patch))
    assert f"the median scan is {patches} patches of {sides} voxels long" in reason


def test_a_patch_that_the_user_chooses_decides_again():
    strides = [[1, 1, 1]] + [[2, 2, 2]] * 4
    scan_mm = tuple(n * mm for n, mm in zip(SCANS_VOX, SPACING, strict=True))
    planned, _ = decide_anatomy(architecture(strides), (128, 256, 256), SPACING, scan_mm)
    assert planned.partners == "body_box"
    assert planned.of_patch((72, 168, 168), SPACING) == replace(planned, partners="sam")
    assert planned.of_patch((128, 248, 248), SPACING) == planned
