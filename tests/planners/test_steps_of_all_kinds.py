"""Patch and batch of every stage for many kinds of data and all presets, without weights and without images."""

import json
import math
from functools import lru_cache

import pytest

from nnssl.methods import find_stage
from nnssl.plan import Plan
from nnssl.views.turns import planes_of_turns
from planners.presets import PRESETS
from tools.synthetic_fingerprints import KINDS
from tools.table_of_steps import plan_of

FAST = ("BTCV",)
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.nightly) for kind in KINDS]
)


WITHOUT_ROOM = {"x-ray": (("8gb", "2d"),)}
"""Presets and configurations in which not even the least patch of equal sides fits."""


@lru_cache
def plans(kind: str) -> dict[str, Plan]:
    """Return the plans of a kind by preset; made once."""
    return {preset: plan_of(kind, preset) for preset in PRESETS}


@kinds
def test_every_stage_has_its_useful_batch_within_the_memory_target(kind):
    for preset, plan in plans(kind).items():
        target = PRESETS[preset].pretext_memory_gb
        for configuration in plan.pretext.configurations.values():
            assert configuration.stages
            for name, stage in configuration.stages.items():
                assert stage.cost.memory_gb <= target
                assert stage.schedule.batch_size >= find_stage(name)[1].needs.useful_batch
                assert stage.schedule.batch_size % stage.schedule.pieces == 0
        assert "WARNING" not in str(plan.pretext.decisions)


@kinds
def test_no_stage_is_left_out_from_24gb_on(kind):
    """A stage of a configuration that smaller presets have is also in the larger ones."""
    for preset in ("24gb", "40gb", "80gb"):
        plan = plans(kind)[preset]
        left_out = [d for d in plan.pretext.decisions if d.value == "left out"]
        # Primus has no token of a suitable size for every patch
        assert not left_out, left_out


@kinds
def test_more_memory_never_means_a_smaller_batch_or_fewer_voxels(kind):
    presets = list(PRESETS)
    for smaller, larger in zip(presets, presets[1:], strict=False):
        for name, configuration in plans(kind)[smaller].pretext.configurations.items():
            if name not in plans(kind)[larger].pretext.configurations:
                continue
            other = plans(kind)[larger].configuration(name).stages
            for stage, planned in configuration.stages.items():
                few, many = planned.schedule, other[stage].schedule
                assert few.batch_size <= many.batch_size, (smaller, larger, name, stage)
                voxels = [step.batch_size * math.prod(step.patch_size) for step in (few, many)]
                if smaller != "cpu":  # its spacing may be another
                    assert voxels[0] <= voxels[1], (smaller, larger, name, stage)


@pytest.mark.parametrize(
    "kind", ["BTCV", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS if kind != "BTCV")]
)
def test_a_code_may_ask_for_quarter_turns_wherever_spacings_agree(kind):
    for preset, plan in plans(kind).items():
        for name in ("2d", "3d_fullres"):
            if name not in plan.pretext.configurations:
                continue
            configuration = plan.configuration(name).for_stage("pcrl.contexts")
            said = {(each.configuration, each.what): each.reason for each in plan.pretext.decisions}
            reason = said[name, "patch (pcrl.contexts)"]
            if not planes_of_turns(configuration.spacing_mm, configuration.thick_axis):
                assert not configuration.context.quarter_turns, (preset, name)
                assert "the sides along" not in reason
                continue
            # the smallest preset of a kind may have no room for the least patch of equal sides
            assert configuration.context.quarter_turns or "differ, because not even" in reason, (preset, name)
            assert configuration.context.quarter_turns or (preset, name) in WITHOUT_ROOM.get(kind, ()), (preset, name)


def test_slices_of_acdc_get_quarter_turns():
    plan = plan_of("ACDC", "8gb")
    configuration = plan.configuration("2d").for_stage("pcrl.contexts")
    assert configuration.patch_size == (224, 224)
    assert configuration.context.quarter_turns
    # stages that do not turn keep the whole slice
    assert plan.configuration("2d").for_stage("pix2rep.dense").patch_size == (256, 224)


def test_a_plan_for_x_rays_mentions_no_coil_sensitivity_and_no_thick_slices():
    plan = plans("x-ray")["cpu"]
    assert plan.pretext.modalities == ("X-ray",)
    text = json.dumps([[each.what, each.value, each.reason] for each in plan.pretext.decisions])
    assert "coil sensitivity" not in text
    assert "thick" not in text
    said = {(each.configuration, each.what): each for each in plan.pretext.decisions}
    assert said["data set", "slice axis"].value == "none"
    assert said["2d", "intensity views"].reason.startswith("X-ray: ")
    views = plan.configuration("2d").intensity_views
    assert "inversion" in views
    assert "bias_field" not in views
