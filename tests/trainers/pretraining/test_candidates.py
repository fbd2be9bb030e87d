"""Which methods are compared, why others are not, and how long their short runs are."""

import json
from dataclasses import replace

import pytest

from nnssl.errors import UserError
from nnssl.methods import METHODS, find_method
from nnssl.plan import Decision, read_plan
from tests.trainers.conftest import NAME
from trainers.pretraining.candidates import (
    EPOCHS,
    check_lengths,
    configuration_to_probe,
    find_candidates,
    share_of_run,
    shorten,
)
from trainers.pretraining.pretrain import needed_runs


@pytest.fixture
def plan(toy):
    return read_plan(toy.preprocessed / NAME / "nnsslPlans.json")


def without(plan, configuration: str, stage: str | None = None):
    """The plan without a configuration, or without one of its stages."""
    configurations = dict(plan.pretext.configurations)
    if stage is None:
        del configurations[configuration]
    else:
        stages = {name: each for name, each in configurations[configuration].stages.items() if name != stage}
        configurations[configuration] = replace(configurations[configuration], stages=stages)
    return replace(plan, pretext=replace(plan.pretext, configurations=configurations))


def test_all_methods_of_the_unet_are_candidates(plan):
    assert configuration_to_probe(plan, None) == "3d_fullres"
    found, left_out = find_candidates(plan, "3d_fullres", ())
    assert [method.name for method in found] == [
        name for name, method in METHODS.items() if "3d_fullres" in method.configurations
    ]
    assert set(left_out) == set(METHODS) - {method.name for method in found} == {"reprec"}
    assert left_out["reprec"].startswith("needs a convolutional U-Net with a transformer (hybrid)")


def test_slices_have_other_candidates(plan):
    found, left_out = find_candidates(plan, "2d", ())
    assert not {"sam", "alice", "reprec"} & {method.name for method in found}
    assert left_out["sam"] == "needs a convolutional U-Net for volumes (3d_fullres)"
    assert "Primus, or a convolutional U-Net for volumes" in left_out["alice"]
    assert configuration_to_probe(without(plan, "3d_fullres"), None) == "2d"
    assert configuration_to_probe(plan, "2d") == "2d"


def test_a_stage_that_the_planner_left_out_excludes_its_method_with_the_planners_reason(plan):
    decision = Decision("3d_fullres", "simclr.contrast", "left out", "a batch of 16 does not fit into memory")
    other = Decision("2d", "simclr.contrast", "left out", "another one")
    short = without(plan, "3d_fullres", "simclr.contrast")
    short = replace(short, pretext=replace(short.pretext, decisions=(other, decision)))
    found, left_out = find_candidates(short, "3d_fullres", ())
    assert "simclr" not in [method.name for method in found]
    assert left_out["simclr"] == (
        "the planner left out its stage simclr.contrast: a batch of 16 does not fit into memory"
    )
    # Alice needs SAM's stage, which always runs in 3d_fullres
    found, left_out = find_candidates(without(plan, "3d_fullres", "sam.embedding"), "3d_fullres", ())
    assert {"sam", "alice"} <= set(left_out)
    assert "the plan is older than it" in left_out["alice"]
    if "3d_fullres_primus" in plan.pretext.configurations:
        with pytest.raises(UserError, match="candidates must be at least two"):
            find_candidates(without(plan, "3d_fullres"), "3d_fullres_primus", ())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("mae", "nope"), "candidates must be methods .*, got nope"),
        (("mae", "mae"), "candidates must be different methods, got mae more than once"),
        (
            ("mae", "reprec"),
            "candidates must be methods that the plan allows, got reprec: needs a convolutional U-Net with",
        ),
        (("mae",), "candidates must be at least two methods for 3d_fullres of plan nnsslPlans, got mae"),
    ],
)
def test_candidates_that_make_no_sense_are_refused(plan, wanted, message):
    with pytest.raises(UserError, match=message):
        find_candidates(plan, "3d_fullres", wanted)


def test_named_candidates_have_the_order_of_the_methods_and_nothing_to_excuse(plan):
    found, left_out = find_candidates(plan, "3d_fullres", ("mae", "pix2rep"))
    assert [method.name for method in found] == ["pix2rep", "mae"]
    assert left_out == {}


def test_a_plan_without_a_unet_needs_a_configuration(plan):
    only = without(without(plan, "3d_fullres"), "2d")
    with pytest.raises(UserError, match="configuration must be given for the method auto: .* has no U-Net, only"):
        configuration_to_probe(only, None)
    with pytest.raises(UserError, match="has no configuration"):
        configuration_to_probe(only, "3d_fullres")


def test_epochs_must_not_depend_on_the_number_of_stages():
    check_lengths(None)
    check_lengths(3)
    check_lengths([3])
    with pytest.raises(UserError, match="epochs must be one number for the method auto"):
        check_lengths([3, 4])


def long_runs(plan, method: str, *overrides: str):
    return needed_runs(find_method(method), plan, "3d_fullres", None, overrides, 0)


def test_short_runs_take_their_share_of_the_time(plan):
    runs = long_runs(plan, "alice", "epochs=200", "iterations_per_epoch=50", "alignment.iterations_per_epoch=20")
    total = [run.settings.training.total_steps for run in runs]
    assert total[-1] == 4000
    seconds = [3.0, 0.5][-len(runs) :]
    for budget in (100.0, 1234.0):
        share = share_of_run(budget, runs, seconds)
        lengths = [shorten(run, share, each) for run, each in zip(runs, seconds, strict=True)]
        spent = sum(each.steps * each.seconds_per_step for each in lengths)
        slack = sum(EPOCHS * each for each in seconds)  # epochs have whole numbers of steps
        assert budget - slack <= spent <= budget
        # all stages are shortened alike
        shares = [each.steps / whole for each, whole in zip(lengths, total, strict=True)]
        assert max(shares) - min(shares) <= 0.01
    assert share_of_run(1e9, runs, seconds) == 1.0
    full = shorten(runs[-1], 1.0, 0.5)
    assert (full.epochs, full.iterations_per_epoch) == (200, 20)


def test_the_least_run_is_one_step_and_the_warm_up_keeps_its_share(plan):
    (run,) = long_runs(plan, "mae", "epochs=200", "iterations_per_epoch=50")
    assert (shorten(run, 1e-9, 1.0).epochs, shorten(run, 1e-9, 1.0).iterations_per_epoch) == (1, 1)
    assert shorten(run, 7.9 / 10_000, 1.0).steps == 7
    # 20 epochs of 38 steps would leave 18 of them over
    for steps, epochs, used in ((38, 19, 38), (59, 19, 57), (23, 11, 22), (101, 20, 100), (4_321, 20, 4_320)):
        length = shorten(run, (steps + 0.5) / 10_000, 1.0)
        assert (length.epochs, length.steps) == (epochs, used)
    content = plan.nnunet["pretext"]["configurations"]["3d_fullres"]["stages"]["mae.recovery"]["schedule"]
    assert json.loads(json.dumps(content))["warmup_epochs"] == 0
    schedule = replace(
        plan.pretext.configurations["3d_fullres"].stages["mae.recovery"].schedule, epochs=200, warmup_epochs=20
    )
    stages = dict(plan.pretext.configurations["3d_fullres"].stages)
    stages["mae.recovery"] = replace(stages["mae.recovery"], schedule=schedule)
    configuration = replace(plan.pretext.configurations["3d_fullres"], stages=stages)
    warm = replace(plan, pretext=replace(plan.pretext, configurations={"3d_fullres": configuration}))
    length = shorten(long_runs(warm, "mae", "iterations_per_epoch=50")[0], 0.02, 1.0)
    assert (length.epochs, length.iterations_per_epoch) == (20, 10)
    training = long_runs(warm, "mae", *length.overrides)[0].settings.training
    assert (training.total_steps, training.warmup_epochs) == (200, 2)
