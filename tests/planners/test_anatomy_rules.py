"""Which stages anatomical embeddings have the resolution of."""

import json
from dataclasses import asdict

import pytest

from planners.anatomy_rules import decide_anatomy
from planners.plan import read_plan
from tests.planners.test_plan import NNUNET, make_pretext


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
    assert "has 1280" in decisions[0][2]


def test_a_plan_of_the_third_schema_is_read(tmp_path):
    """What is there is kept, what is missing follows from patch and network."""
    pretext = json.loads(json.dumps(asdict(make_pretext())))
    pretext["schema_version"] = 3
    (configuration,) = pretext["configurations"].values()
    del configuration["anatomy"]
    configuration["context"]["attention_rank"] = 5
    own = {"architecture": architecture([[1, 1, 1], [1, 2, 2], [2, 2, 2]])}
    own["architecture"]["arch_kwargs"] |= {"features_per_stage": [4, 8, 12], "conv_op": "torch.nn.modules.conv.Conv3d"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**NNUNET, "configurations": {"3d_fullres_hybrid": own}, "pretext": pretext}))
    read = read_plan(path).configuration("3d_fullres_hybrid")
    assert read.context.attention_rank == 5
    assert (read.anatomy.fine_stage, read.anatomy.coarse_stage) == (1, 2)


def test_a_plan_of_the_fourth_schema_is_read(tmp_path):
    """Partners are SAM's, and a token is as wide as the stage that it is a position of."""
    pretext = json.loads(json.dumps(asdict(make_pretext())))
    pretext["schema_version"] = 4
    (configuration,) = pretext["configurations"].values()
    del configuration["anatomy"]["partners"], configuration["tokens"]["width"]
    configuration["anatomy"]["coarse_stage"] = 7
    own = {"architecture": architecture([[1, 1, 1], [1, 2, 2], [2, 2, 2]])}
    own["architecture"]["arch_kwargs"] |= {"features_per_stage": [4, 9, 12], "conv_op": "torch.nn.modules.conv.Conv3d"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**NNUNET, "configurations": {"3d_fullres_hybrid": own}, "pretext": pretext}))
    read = read_plan(path).configuration("3d_fullres_hybrid")
    assert (read.anatomy.coarse_stage, read.anatomy.partners) == (7, "sam")
    assert (read.tokens.stage, read.tokens.width) == (1, 9)


@pytest.mark.parametrize(("scan_mm", "partners"), [((96, 60, 60), "sam"), ((95, 60, 60), "body_box"), (None, "sam")])
def test_embeddings_are_for_scans_longer_than_a_patch(scan_mm, partners):
    strides = [[1, 1, 1]] + [[2, 2, 2]] * 4
    chosen, decisions = decide_anatomy(architecture(strides), (32, 32, 32), (2.0, 2.0, 2.0), scan_mm)
    assert chosen.partners == partners
    assert ("body's box" in decisions[1][1]) == (partners == "body_box")
