"""Patch and batch of a stage: the chain of steps, the last one that fits, and false negatives."""

import math
from dataclasses import replace

import numpy as np
import pytest

from nnssl.methods import METHODS, Stage, find_stage
from nnssl.plan import StageCost
from planners.patch_rules import (
    CROP_TOLERANCE,
    FALSE_NEGATIVES,
    LEAST_POSITIONS,
    chain_of_steps,
    choose_step,
    edge_mm,
    explain_step,
    false_negatives,
    patches_of_scan,
    plane_of_equal_sides,
    share_of_same_places,
)

STAGES = list(dict.fromkeys(stage for method in METHODS.values() for stage in method.stages))
SCANS = [
    # scan in mm, spacing in mm, total stride, largest patch
    ((400.0, 350.0, 350.0), (3.0, 0.8, 0.8), (16, 32, 32), (80, 192, 160)),
    ((90.0, 340.0, 300.0), (10.0, 1.5, 1.5), (2, 32, 32), (10, 256, 224)),
    ((36.0, 50.0, 35.0), (1.0, 1.0, 1.0), (8, 8, 8), (40, 56, 40)),
    ((1.0, 420.0, 350.0), (0.14, 0.14), (128, 128), (3072, 2560)),
]


@pytest.mark.parametrize(("scan", "spacing", "multiple", "largest"), SCANS)
def test_patches_have_the_aspect_of_the_scan_and_grow_up_to_the_largest(scan, spacing, multiple, largest):
    scan = scan[-len(spacing) :]
    patches = patches_of_scan(scan, spacing, multiple, largest)
    assert patches[-1] == largest
    for smaller, larger in zip(patches, patches[1:], strict=False):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
        assert smaller != larger
    for patch in patches:
        positions = [n / m for n, m in zip(patch, multiple, strict=True)]
        assert all(n == int(n) for n in positions[:1]) or patch == largest
        assert math.prod(positions) >= LEAST_POSITIONS
        # one edge explains all sides, each within a multiple of it; sides at a limit may be cut or lengthened
        aspect = np.divide(scan, edge_mm(scan, [1.0] * len(scan)))
        low = [(n - m) * mm / a for n, m, mm, a in zip(patch, multiple, spacing, aspect, strict=True)]
        high = [(n + m) * mm / a for n, m, mm, a in zip(patch, multiple, spacing, aspect, strict=True)]
        at_least = [n == first for n, first in zip(patch, patches[0], strict=True)]
        at_most = [n == last for n, last in zip(patch, largest, strict=True)]
        lowest = max((mm for mm, limited in zip(low, at_least, strict=True) if not limited), default=0.0)
        highest = min((mm for mm, limited in zip(high, at_most, strict=True) if not limited), default=np.inf)
        assert lowest <= highest * (1 + 1e-9)


@pytest.mark.parametrize(
    ("scan", "spacing", "multiple", "largest", "thick", "plane", "square"),
    [
        ((450.0, 334.0, 334.0), (3.0, 1.3, 1.3), (16, 32, 32), (144, 256, 256), None, (1, 2), (144, 256, 256)),
        ((90.0, 340.0, 300.0), (10.0, 1.5, 1.5), (2, 32, 32), (10, 256, 224), 0, (1, 2), (10, 224, 224)),
        ((340.0, 300.0), (1.5, 1.5), (32, 32), (256, 224), None, (0, 1), (224, 224)),
        # of three planes, the one that leaves the largest patch, and the first of equal ones
        ((36.0, 50.0, 35.0), (1.0, 1.0, 1.0), (8, 8, 8), (40, 56, 40), None, (0, 2), (40, 56, 40)),
        ((60.0, 60.0, 60.0), (1.0, 1.0, 1.0), (8, 8, 8), (64, 64, 64), None, (1, 2), (64, 64, 64)),
        # strides that differ, so that the sides are multiples of both
        ((320.0, 220.0), (1.0, 1.0), (16, 24), (320, 216), None, (0, 1), (192, 192)),
    ],
)
def test_patches_of_equal_sides_are_square_in_the_plane_of_turns(
    scan, spacing, multiple, largest, thick, plane, square
):
    assert plane_of_equal_sides(spacing, multiple, largest, thick) == plane
    patches = patches_of_scan(scan, spacing, multiple, largest, plane)
    assert patches[-1] == square
    assert len(patches) > 1
    for smaller, larger in zip(patches, patches[1:], strict=False):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
        assert smaller != larger
    for patch in patches:
        assert patch[plane[0]] == patch[plane[1]] <= min(largest[axis] for axis in plane)
        assert all(patch[axis] % multiple[axis] == 0 for axis in plane)
        assert math.prod(n / m for n, m in zip(patch, multiple, strict=True)) >= LEAST_POSITIONS or patch == square


def test_the_least_patch_of_equal_sides_is_no_larger_than_four_positions_need():
    """With sides of 64, there are 2 positions; twice the z axis has 4, twice both others 8."""
    scan, spacing, most = (1200.0, 525.0, 525.0), (1.75, 1.075, 1.075), (640, 448, 448)
    assert patches_of_scan(scan, spacing, (64, 64, 32), most, (1, 2))[0] == (128, 64, 64)
    # the scan is hardly longer than wide, so that twice the z axis would be further from its proportions
    cube = ((448.0, 296.0, 296.0), (4.0, 1.15, 1.15), (32, 64, 32), (96, 256, 256))
    assert patches_of_scan(*cube, (1, 2))[0] == (32, 128, 128)
    # with one position, twice the z axis is not enough
    assert patches_of_scan(scan, spacing, (64, 64, 64), most, (1, 2))[0] == (64, 128, 128)


@pytest.mark.parametrize(
    ("spacing", "multiple", "largest", "thick"),
    [
        ((2.5, 1.5, 1.7), (8, 8, 8), (32, 56, 48), None),  # no two spacings are equal
        ((1.0, 1.0), (16, 24), (160, 24), None),  # the shorter side has no room for a multiple of both strides
        ((10.0, 10.0, 1.5), (2, 32, 32), (10, 256, 224), 0),  # the only plane has the thick axis
    ],
)
def test_sides_that_cannot_be_equal_stay_as_they_are(spacing, multiple, largest, thick):
    assert plane_of_equal_sides(spacing, multiple, largest, thick) is None


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
@pytest.mark.parametrize(("scan", "spacing", "multiple", "largest"), SCANS)
def test_the_chain_grows_from_the_useful_batch_to_the_largest_patch(stage, scan, spacing, multiple, largest):
    plane = plane_of_equal_sides(spacing, multiple, largest, None) if stage.needs.equal_sides else None
    patches = patches_of_scan(scan[-len(spacing) :], spacing, multiple, largest, plane)
    largest = patches[-1]
    steps = chain_of_steps(stage, patches, spacing, scan, 40)
    assert steps[0].batch == -(-stage.needs.useful_batch // stage.batch_multiple) * stage.batch_multiple
    assert steps[-1].patch == largest
    axis = 0 if len(spacing) == 2 else 1
    of_scan = 0.6 * math.prod(scan[-len(spacing) :]) ** (1 / len(spacing))
    assert edge_mm(steps[0].patch, spacing) >= min(stage.needs.least_mm[axis], of_scan) or steps[0].patch == largest
    for one, other in zip(steps, steps[1:], strict=False):
        assert one.batch <= other.batch <= max(stage.needs.paper_batch, steps[0].batch)
        assert other.batch % stage.batch_multiple == 0
        assert math.prod(one.patch) * one.batch < math.prod(other.patch) * other.batch
        # the batch grows only at the paper's crop
        if one.batch < other.batch:
            assert one.patch == other.patch
            at_crop = edge_mm(one.patch, spacing) <= CROP_TOLERANCE * stage.needs.crop_mm[axis]
            assert at_crop or one.patch == steps[0].patch
            following = next((patch for patch in patches if math.prod(patch) > math.prod(one.patch)), None)
            assert following is None or edge_mm(following, spacing) > CROP_TOLERANCE * stage.needs.crop_mm[axis]


def test_the_last_step_that_fits_is_taken():
    stage = find_stage("pix2rep.dense")[1]
    scan, spacing, multiple, largest = SCANS[0]
    steps = chain_of_steps(stage, patches_of_scan(scan, spacing, multiple, largest), spacing, scan, 40)

    def cost(step, pieces, checkpointing):
        voxels = math.prod(step.patch) * math.ceil(step.batch / pieces) * (0.5 if checkpointing else 1.0)
        return StageCost(voxels / 1e6, math.prod(step.patch) * step.batch)

    sizes = [cost(step, 1, False).memory_gb for step in steps]
    for index in (0, 3, len(steps) - 2):
        chosen = choose_step(steps, cost, sizes[index], None)
        assert (chosen.step, chosen.pieces, chosen.checkpointing) == (steps[index], 1, False)
        assert chosen.limit == "the memory target"
        limited = choose_step(steps, cost, 1e9, sizes[index] * 1e6)
        assert (limited.step, limited.limit) == (steps[index], "the time of a step")
    assert choose_step(steps, cost, 1e9, None).step == steps[-1]
    # the first step comes in as few pieces as fit, and is computed again only if one patch at a time does not fit
    assert choose_step(steps, cost, sizes[0] / 2, None).pieces == 2
    last = choose_step(steps, cost, sizes[0] / stage.needs.useful_batch / 2, None)
    assert (last.pieces, last.checkpointing) == (stage.needs.useful_batch, True)
    assert choose_step(steps, cost, sizes[0] / 100, None) is None


def test_the_reason_says_why_sides_are_equal():
    stage = find_stage("pcrl.contexts")[1]
    patches = patches_of_scan((340.0, 300.0), (1.5, 1.5), (32, 32), (256, 224), (0, 1))
    steps = chain_of_steps(stage, patches, (1.5, 1.5), (90.0, 340.0, 300.0), 40)
    chosen = choose_step(steps, lambda *_: StageCost(1.0, 1.0), 8.0, None)
    (_, value, reason), _ = explain_step(stage, chosen, (1.5, 1.5), 8.0, (0, 1))
    assert value.startswith("224x224 ")
    assert "the sides along axes 0 and 1 are equal, so that quarter turns keep the voxel grid" in reason
    assert "quarter turns" not in explain_step(stage, chosen, (1.5, 1.5), 8.0)[0][2]
    chosen = replace(chosen, step=replace(chosen.step, patch=(64, 32)))
    assert "axes 0 and 1 differ, because not even" in explain_step(stage, chosen, (1.5, 1.5), 8.0, (0, 1))[0][2]


def test_false_negatives_are_counted_in_steps_as_the_loader_makes_them():
    """Simulate batches that take turns over the cases, with patches anywhere in their scan."""
    scan, spacing, patch, cases, batch = (120.0, 100.0, 80.0), (2.0, 1.0, 1.0), (32, 64, 64), 5, 20
    rng = np.random.default_rng(1)
    size = np.multiply(patch, spacing)
    shares = []
    for _ in range(300):
        starts = rng.uniform(size=(batch, 3)) * (np.array(scan) - size)
        case = np.arange(batch) % cases
        common = np.clip(1 - np.abs(starts[:, None] - starts[None]) / size, 0, None).prod(axis=2)
        same = (common > 0.5) & (case[:, None] == case[None])
        shares.append((same.sum(axis=1) - 1).mean() / (batch - 1))
    planned = false_negatives(batch, cases, share_of_same_places(patch, spacing, scan))
    assert planned == pytest.approx(np.mean(shares), rel=0.1)
    assert false_negatives(cases, cases, 1.0) == 0.0


def test_few_scans_limit_the_batch_of_contrast_but_of_nothing_else():
    scan, spacing, multiple, largest = SCANS[2]
    patches = patches_of_scan(scan, spacing, multiple, largest)
    stage = find_stage("simclr.contrast")[1]

    def batches(stage: Stage, cases: int) -> int:
        return chain_of_steps(stage, patches, spacing, scan, cases)[-1].batch

    assert batches(stage, 3) == stage.needs.useful_batch
    assert stage.needs.useful_batch < batches(stage, 15) < batches(stage, 3000)
    free = replace(stage, needs=replace(stage.needs, contrasts_patches=False))
    assert batches(free, 3) == stage.needs.paper_batch
    same = share_of_same_places(patches[-1], spacing, scan)
    assert false_negatives(batches(stage, 15), 15, same) <= FALSE_NEGATIVES
