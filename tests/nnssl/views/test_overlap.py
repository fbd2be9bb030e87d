"""Two crops of one patch: what they have in common counted point by point, and what both show read off warped voxels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl.views import overlap
from nnssl.views.boxes import contains
from nnssl.views.overlap import common_share, crop_boxes, crop_iou, draw_overlapping, map_across, shown_by_both
from nnssl.views.points import interpolate_at
from nnssl.views.spatial import AffineParams, apply_affine, draw_affine, map_points, pick
from tests.nnssl.views.test_spatial import CASES, generators, make_params, ranges


def test_common_share_of_straight_crops_counts_points_in_both():
    shape, spacing_mm = (20, 30), (2.0, 1.0)
    first = make_params(shape, spacing_mm, 0.5, (0.0,), (-1, 1), (-8.0, 2.0))
    second = make_params(shape, spacing_mm, 0.8, (0.0,), (1, 1), (0.0, 0.0))
    # along y [-18, 2] and [-16, 16] mm share 18 of 20; along x all of the smaller one
    assert common_share(first, second).item() == pytest.approx(0.9)
    assert common_share(second, first).item() == pytest.approx(0.9)
    apart = replace(second, linear=second.linear / 8, centre_mm=torch.tensor([[15.0, 0.0]], dtype=torch.float64))
    assert common_share(first, apart).item() == 0


def test_common_share_of_turned_crops_is_close_to_what_random_points_say():
    shape, spacing_mm = (10, 24, 20), (3.0, 1.0, 1.2)
    first = draw_affine(generators(6), ranges((40.0, 10.0, 20.0), 3), shape, spacing_mm)
    second = draw_affine(generators(6, step=1), ranges((40.0, 10.0, 20.0), 3), shape, spacing_mm)
    share = common_share(first, second)
    points = torch.rand(6, 40_000, 3, dtype=torch.float64) * 2 - 0.5  # box of twice the patch around it
    points = points * torch.tensor(shape) - 0.5

    def covered(params: AffineParams) -> torch.Tensor:
        inner = map_points(points, params, "to_output")
        return ((inner >= -0.5) & (inner < torch.tensor(shape) - 0.5)).all(-1)

    in_first, in_second = covered(first), covered(second)
    counted = (in_first & in_second).sum(1) / torch.minimum(in_first.sum(1), in_second.sum(1))
    torch.testing.assert_close(share, counted.double(), atol=0.04, rtol=0)
    assert share.max() - share.min() > 0.1


def test_box_of_a_turned_crop_holds_all_its_voxels():
    params = draw_affine(generators(), ranges((40.0, 10.0, 20.0), 3), (10, 24, 20), (3.0, 1.0, 1.2))
    corners = torch.cartesian_prod(*(torch.tensor([-0.49, n - 0.51]) for n in (10, 24, 20))).expand(4, -1, -1)
    inside = map_points(corners, params, "to_input").double()
    assert contains(crop_boxes(params), inside).all()
    box = crop_boxes(params)
    torch.testing.assert_close(inside.amin(1), box.lower, atol=0.05, rtol=0)


def test_iou_of_straight_crops_counts_what_either_covers():
    shape, spacing_mm = (20, 30), (2.0, 1.0)
    first = make_params(shape, spacing_mm, 0.5, (0.0,), (-1, 1), (-8.0, 2.0))
    second = make_params(shape, spacing_mm, 0.8, (0.0,), (1, 1), (0.0, 0.0))
    # 20 x 15 and 32 x 24 mm share 18 x 15
    assert crop_iou(first, second).item() == pytest.approx(270 / (300 + 768 - 270))
    assert crop_iou(second, first).item() == pytest.approx(270 / (300 + 768 - 270))


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
@pytest.mark.parametrize(("measure", "least"), [("share", 0.9), ("iou", 0.62), ("share", 1.1), ("iou", 1.1)])
def test_the_first_crop_that_overlaps_enough_is_taken(shape, spacing_mm, rotation_deg, measure, least, monkeypatch):
    """Against a loop over eight tries of each sample; where none does, the last one is moved to the first crop."""
    monkeypatch.setattr(overlap, "LATTICE_POINTS", 6)
    wanted, count = replace(ranges(rotation_deg, len(shape)), crop_fraction=(0.5, 0.9)), 3 if least > 1 else 12
    first, second = draw_overlapping(generators(count), wanted, shape, spacing_mm, least, measure)
    replayed = generators(count)
    drawn = [draw_affine(replayed, wanted, shape, spacing_mm) for _ in range(9)]
    assert torch.equal(first.linear, drawn[0].linear)
    assert torch.equal(first.centre_mm, drawn[0].centre_mm)
    reach_mm = (np.array(shape) - 1) / 2 * np.array(spacing_mm)
    places = []
    for sample in range(count):
        one = pick(first, torch.tensor([sample]))
        found = pick(second, torch.tensor([sample]))
        for place, each in enumerate(drawn[1:]):
            other = pick(each, torch.tensor([sample]))
            found_share = common_share(one, other) if measure == "share" else crop_iou(one, other)
            if found_share.item() >= least:
                assert torch.equal(found.linear, other.linear)
                assert torch.equal(found.centre_mm, other.centre_mm)
                places.append(place)
                break
        else:
            places.append(None)
            linear = other.linear[0].numpy()
            if measure == "iou":
                linear = linear * abs(np.linalg.det(one.linear[0]) / np.linalg.det(linear)) ** (1 / len(shape))
            room = np.clip(reach_mm - np.abs(linear) @ reach_mm, 0, None)
            assert found.linear[0].numpy() == pytest.approx(linear)
            assert found.centre_mm[0].numpy() == pytest.approx(np.clip(one.centre_mm[0].numpy(), -room, room))
    assert (set(places) == {None}) == (least > 1)


def test_a_right_angle_is_no_turn_for_the_common_share():
    """Boxes tell it exactly; counted on a lattice it would be off by a part of a lattice's cell."""
    shape, spacing_mm = (20, 30), (1.5, 1.0)
    first = make_params(shape, spacing_mm, 0.61, (90.0,), (1, 1), (0.77, -0.31))
    second = make_params(shape, spacing_mm, 0.37, (0.0,), (1, 1), (6.13, 3.71))
    # turned, 30 mm along y and 30 along x stay that: 18.3 x 18.3 mm about (0.77, -0.31), and 11.1 x 11.1 about (6.13, 3.71)
    along_y, along_x = (0.77 + 9.15) - (6.13 - 5.55), (-0.31 + 9.15) - (3.71 - 5.55)
    assert common_share(first, second).item() == pytest.approx(along_y * along_x / 11.1**2, abs=1e-9)


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
def test_what_both_show_has_the_same_places(shape, spacing_mm, rotation_deg):
    """Crops of an image of its own coordinates: where both show a place, reading the other crop there gives the place."""
    first, second = draw_overlapping(generators(), ranges(rotation_deg, len(shape)), shape, spacing_mm, 0.4)
    image = torch.stack(torch.meshgrid(*(torch.arange(n).float() + 1 for n in shape), indexing="ij")).expand(
        4, -1, *shape
    )
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"), dim=-1).flatten(
        0, -2
    )
    places, there = map_across(voxels.expand(4, *voxels.shape), first, second)
    torch.testing.assert_close(map_points(there, second, "to_input"), places, atol=1e-3, rtol=0)
    shown = shown_by_both(first, second, shape, torch.device("cpu")).flatten(1)
    assert 0.1 < shown.float().mean() < 0.95
    seen = interpolate_at(apply_affine(image, second), there, shape)
    torch.testing.assert_close(seen[shown], places[shown] + 1, atol=5e-3, rtol=0)
    last = torch.tensor(shape) - 1
    outside = ((there < -0.01) | (there > last + 0.01) | (places < -0.01) | (places > last + 0.01)).any(dim=2)
    assert not (shown & outside).any()
