"""Features and points of dense methods, and the two arguments that override the planner's network."""

import json
import math
from pathlib import Path

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.errors import ArgumentError
from nnssl.log import lines_to
from nnssl.networks.backbone import build_network
from nnssl.plan import DenseSampling
from nnssl.sizes import in_bytes
from planners.dense_rules import CORRELATION_POINTS, bytes_of_points, decide_dense
from planners.presets import PRESETS
from tests.planners.test_pretrain_planner import make_plan

FEATURES = [16, 32, 64, 128, 128]
NOT_WITH_LIKE = r"^spacing_mm and dense_width cannot be combined with like, because the plan x/nnUNetPlans.json"


def test_narrow_last_stage_takes_the_pyramid_and_says_what_it_costs():
    sampling, decisions = decide_dense(FEATURES, (128, 112), 8, 0.5, 0.5)
    assert sampling == DenseSampling("pyramid", 368, 125, 512)
    reasons = {what: reason for what, _, reason in decisions}
    # 2 sides x 1000 points x 352 more channels x 4 bytes; 128 x 112 x 1024 x 4 bytes
    assert "add 2.8 MB for 1,000 pairs" in reasons["dense features"]
    assert "59 MB per patch" in reasons["dense features"]
    assert "Dice was 73.4 with 1,024 channels and 51.2 with 64" in reasons["dense features"]
    assert "of 8 images take 48 MB" in reasons["points per image (contrast)"]  # 3 x 2000 x 2000 x 4 bytes


def test_only_a_last_stage_of_the_papers_width_is_read_alone():
    for width in (16, 64, 96, 512, 1023):
        assert decide_dense([width, *FEATURES[1:]], (128, 112), 8, 0.5, 0.5)[0].features == "pyramid"
    sampling, decisions = decide_dense([1024, *FEATURES[1:]], (128, 112), 8, 0.5, 0.5)
    assert (sampling.features, sampling.channels) == ("single", 1024)
    assert "as wide as Pix2Rep's, in whose ablation Dice was 73.4 with 1,024" in decisions[0][2]


@pytest.mark.parametrize("features", [FEATURES, [32, 64, 128, 256, 320, 320]])
def test_widening_never_takes_features_away(features):
    """A wider last stage keeps the other stages beside it, until it is the one that the paper found to suffice alone."""
    before = decide_dense(features, (64, 64), 8, 8.0, 8.0)[0].channels
    for width in (*range(features[0] + 1, 1024, 31), 1024, 2048):
        after = decide_dense([width, *features[1:]], (64, 64), 8, 8.0, 8.0)[0]
        more = width - features[0] if after.features == "pyramid" else width - before
        assert after.channels == before + more
        assert after.features == "single" or more > 0
        assert after.features == "pyramid" or width >= 1024


def test_points_grow_with_memory_and_stay_within_it():
    sizes = [decide_dense(FEATURES, (64, 64, 64), 8, memory, memory)[0] for memory in (0.5, 8.0, 80.0)]
    assert [s.contrast_points_per_image for s in sizes] == [125, 256, 512]
    correlation = [s.correlation_points_per_image for s in sizes]
    assert correlation[0] < correlation[1] <= correlation[2]
    for sampling, target in zip(sizes[1:], (8e9, 80e9), strict=True):
        assert 3 * (2 * 8 * sampling.contrast_points_per_image) ** 2 * 4 <= 0.1 * target
        assert sampling.correlation_points_per_image in CORRELATION_POINTS


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("batch", [4, 8, 256])
@pytest.mark.parametrize("features", [FEATURES, [96, 200, 320, 320]])
def test_most_points_that_fit_into_their_share_of_memory(preset, batch, features):
    """Values of four bytes: three per pair of points; features and head on two sides, each with its gradient."""
    gb = PRESETS[preset].memory_gb
    sampling, decisions = decide_dense(features, (64, 80, 48), batch, gb, gb)
    memory = gb * 1e9
    wanted = [n for n in (125, 256, 512) if 3 * (2 * batch * n) * (2 * batch * n) * 4 <= 0.1 * memory]
    assert sampling.contrast_points_per_image == max(wanted, default=125)
    point = 4 * (sampling.channels + 256 + 256 + 256 + 256)
    wanted = [n for n in (512, 2048, 8192) if 2 * 2 * batch * n * point <= 0.25 * memory]
    assert sampling.correlation_points_per_image == max(wanted, default=512)
    expected = in_bytes(4 * batch * sampling.correlation_points_per_image * point)
    assert f"embeddings of {batch} images take {expected} (" in decisions[2][2]


def test_points_take_no_more_than_patch_and_batch_leave():
    for free in (0.05, 0.5, 5.0):
        sampling, _ = decide_dense(FEATURES, (64, 64, 64), 8, 80.0, free)
        for setting, least in (("contrast", 125), ("correlation", 512)):
            points = getattr(sampling, f"{setting}_points_per_image")
            assert points == least or bytes_of_points(setting, sampling, 8) <= free * 1e9
    assert bytes_of_points(None, sampling, 8) == 0.0
    for batch in (1, 8, 64):
        pairs = batch * sampling.contrast_points_per_image
        assert bytes_of_points("contrast", sampling, batch) == 3 * (2 * pairs) ** 2 * 4
        pairs = batch * sampling.correlation_points_per_image
        assert bytes_of_points("correlation", sampling, batch) == 4 * pairs * (sampling.channels + 4 * 256) * 4


@pytest.mark.parametrize("kind", ["iso", "thick"])
def test_spacing_is_what_is_given(kind, nnunet_folders):
    plan = make_plan(kind, spacing_mm=(10.0, 3.0, 3.0))
    assert plan.configuration("3d_fullres").spacing_mm == (10.0, 3.0, 3.0)
    assert plan.configuration("2d").spacing_mm == (3.0, 3.0)
    # slices of the same distance give both configurations the same voxels, which they share
    shared = plan.configuration("2d").case_folder == plan.configuration("3d_fullres").case_folder
    assert shared == (kind == "thick")
    told = {d.what: d.reason for d in plan.pretext.decisions if d.configuration == "data set"}
    assert told["spacing"].startswith("set by the user; in the data: ")
    usual = make_plan(kind)
    assert math.prod(plan.configuration("2d").patch_size) < math.prod(usual.configuration("2d").patch_size)
    assert "set by the user" not in str(usual.pretext.decisions)


def test_width_is_what_is_given_and_stock_nnunet_builds_it(nnunet_folders):
    usual, wide = make_plan("thick", preset="8gb"), make_plan("thick", preset="8gb", dense_width=96)
    manager = PlansManager(json.loads(json.dumps(wide.nnunet)))
    for name in ("2d", "3d_fullres", "2d_hybrid"):
        configuration = manager.get_configuration(name)
        assert configuration.configuration["architecture"]["arch_kwargs"]["features_per_stage"][0] == 96
        network = build_network(configuration.configuration["architecture"], 1, 3, seed=0)
        assert network.decoder.seg_layers[-1].in_channels == 96
        narrow = usual.configuration(name).stages
        for key, stage in wide.configuration(name).stages.items():
            assert stage.dense.features == "pyramid"
            assert key not in narrow or stage.dense.channels > narrow[key].dense.channels
    for name in ("2d", "3d_fullres"):
        before, after = (p.nnunet["configurations"][name]["batch_size"] for p in (usual, wide))
        assert 2 <= after <= before
        stage = "pix2rep.dense"
        before, after = (p.configuration(name).stage(stage).schedule for p in (usual, wide))
        assert after.batch_size * math.prod(after.patch_size) <= before.batch_size * math.prod(before.patch_size)
    assert usual.configuration("2d").for_stage("pix2rep.dense").dense.features == "pyramid"


def test_the_papers_width_is_planned_where_memory_allows(nnunet_folders):
    """At 24 GB in 2D; volumes keep their width and their pyramid, which is said."""
    said = []
    with lines_to(said.append):
        plan = make_plan("thick", preset="24gb", dense_width=1024)
    flat, volumes = (plan.nnunet["configurations"][name] for name in ("2d", "3d_fullres"))
    assert flat["architecture"]["arch_kwargs"]["features_per_stage"][0] == 1024
    assert volumes["architecture"]["arch_kwargs"]["features_per_stage"][0] == 32
    assert plan.configuration("2d").for_stage("pix2rep.dense").dense.features == "single"
    assert plan.configuration("3d_fullres").for_stage("pix2rep.dense").dense.features == "pyramid"
    assert any(line.startswith("3d_fullres keeps 32 channels at full resolution: with 1,024,") for line in said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_width": 65536}, r"^dense_width must leave memory for two patches of .*, got 65536; "),
        ({"like": Path("x/nnUNetPlans.json"), "spacing_mm": (1.0, 1.0, 1.0)}, NOT_WITH_LIKE),
        ({"like": Path("x/nnUNetPlans.json"), "dense_width": 64}, NOT_WITH_LIKE),
        ({"spacing_mm": (1.0, 2.0)}, r"^spacing_mm must be three lengths above 0, got 1 2$"),
        ({"spacing_mm": (0.0, 2.0, 2.0)}, r"^spacing_mm must be three lengths above 0, got 0 2 2$"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, message, nnunet_folders):
    with pytest.raises(ArgumentError, match=message):
        make_plan("iso", **arguments)
