"""Geometry of the views: a slow resampling by SciPy, a voxel that is moved, a sphere that stays one in mm."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from nnssl.draws import sample_generators
from nnssl.views.overlap import crop_boxes
from nnssl.views.spatial import (
    AffineParams,
    AffineRange,
    apply_affine,
    draw_affine,
    map_points,
    valid_mask,
)

CASES = [
    pytest.param((9, 22, 17), (5.0, 0.8, 1.1), (40.0, 0.0, 0.0), id="thick slices"),
    pytest.param((12, 18, 15), (1.5, 1.0, 1.2), (25.0, 35.0, 15.0), id="3d"),
    pytest.param((23, 14), (0.7, 1.3), (70.0,), id="2d"),
]
STILL = AffineRange((1.0, 1.0), (0.0, 0.0, 0.0), ())


def generators(count: int = 4, step: int = 0):
    return sample_generators(5, "spatial", step, range(count))


def volumes(shape, count: int = 4, channels: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, *shape, generator=torch.Generator().manual_seed(1))


def ranges(rotation_deg, dimensions: int) -> AffineRange:
    return AffineRange((0.3, 0.9), rotation_deg, tuple(range(dimensions)))


def slow_rotation(angles_deg, dimensions: int) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(angles_deg)), np.sin(np.deg2rad(angles_deg))
    if dimensions == 2:
        return np.array([[cos[0], -sin[0]], [sin[0], cos[0]]])
    about_z = np.array([[1, 0, 0], [0, cos[0], -sin[0]], [0, sin[0], cos[0]]])
    about_y = np.array([[cos[1], 0, -sin[1]], [0, 1, 0], [sin[1], 0, cos[1]]])
    about_x = np.array([[cos[2], -sin[2], 0], [sin[2], cos[2], 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def make_params(shape, spacing_mm, zoom, angles_deg, flips, centre_mm) -> AffineParams:
    """Build parameters by hand for one sample, independently of how they are drawn."""
    linear = zoom * slow_rotation(np.array(angles_deg), len(shape)) @ np.diag(np.array(flips, dtype=float))
    return AffineParams(shape, spacing_mm, torch.tensor(linear)[None], torch.tensor([centre_mm], dtype=torch.float64))


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
@pytest.mark.parametrize("order", [1, 0])
def test_resampling_equals_scipy(shape, spacing_mm, rotation_deg, order):
    given = volumes(shape)
    params = draw_affine(generators(), ranges(rotation_deg, len(shape)), shape, spacing_mm)
    views = apply_affine(given, params, "bilinear" if order else "nearest")
    to_mm = np.diag(spacing_mm)
    middle = (np.array(shape) - 1) / 2
    for sample in range(4):
        matrix = np.linalg.inv(to_mm) @ params.linear[sample].numpy() @ to_mm
        offset = middle + np.linalg.inv(to_mm) @ params.centre_mm[sample].numpy() - matrix @ middle
        for channel in range(2):
            volume = given[sample, channel].double().numpy()
            wanted = affine_transform(volume, matrix, offset, order=order, mode="grid-constant", cval=0.0)
            difference = np.abs(views[sample, channel].numpy() - wanted)
            if order:
                assert difference.max() < 2e-3
            else:  # halfway between two voxels rounding may choose either
                assert (difference > 1e-6).mean() < 0.01


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
def test_points_follow_the_voxels(shape, spacing_mm, rotation_deg):
    """A coordinate image, warped, says where every output voxel came from: the mapped points must say the same."""
    params = draw_affine(generators(), ranges(rotation_deg, len(shape)), shape, spacing_mm)
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"))
    warped = apply_affine(coordinates.expand(4, *coordinates.shape), params).flatten(2).mT
    points = coordinates.flatten(1).T.expand(4, -1, -1)
    inside = valid_mask(params, shape).flatten(1)
    assert inside.float().mean() > 0.8
    source = map_points(points, params, "to_input")
    torch.testing.assert_close(source[inside], warped[inside], atol=1e-3, rtol=0)
    torch.testing.assert_close(map_points(source, params, "to_output"), points, atol=1e-3, rtol=0)


def test_a_known_voxel_moves_where_geometry_says():
    """Quarter turn about z in a 2:1 plane: y of the view runs along x of the patch, and 2 mm are 2 mm."""
    shape, spacing_mm = (3, 9, 13), (4.0, 2.0, 1.0)
    params = make_params(shape, spacing_mm, 1.0, (90.0, 0.0, 0.0), (1, 1, 1), (0.0, 0.0, 0.0))
    volume = torch.zeros(1, 1, *shape)
    volume[0, 0, 1, 4, 8] = 1  # 2 mm from the centre along x
    view = apply_affine(volume, params)
    place = (view[0, 0] == view.max()).nonzero()[0].tolist()
    assert place == [1, 5, 6]  # 2 mm, one voxel, along y: x_input = R x_output turns +y into +x
    assert view[0, 0, 1, 5, 6].item() == pytest.approx(1, abs=1e-5)
    moved = map_points(torch.tensor([[[1.0, 4.0, 8.0]]]), params, "to_output")
    torch.testing.assert_close(moved, torch.tensor([[[1.0, 5.0, 6.0]]]), atol=1e-5, rtol=0)


def test_zoom_shift_and_flip_of_a_point():
    params = make_params((10, 20), (2.0, 1.0), 0.5, (0.0,), (1, -1), (1.0, -3.0))
    # output (9, 19) is (9, 9.5) mm from the centre; flipped (9, -9.5), halved (4.5, -4.75), shifted (5.5, -7.75)
    mapped = map_points(torch.tensor([[[9.0, 19.0]]]), params, "to_input")
    torch.testing.assert_close(mapped, torch.tensor([[[4.5 + 5.5 / 2, 9.5 - 7.75]]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "angles_deg"),
    [((36, 110, 60), (1.6, 0.8, 1.0), (50.0, 0.0, 0.0)), ((36, 64, 82), (1.6, 1.2, 0.8), (20.0, 35.0, -40.0))],
)
def test_a_sphere_stays_a_sphere_in_millimetres(shape, spacing_mm, angles_deg):
    spacing = torch.tensor(spacing_mm)
    mm = torch.stack(torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"), dim=-1) * spacing
    off_centre = torch.tensor([1.0, -3.0, 2.0])
    # variance of 25 mm^2: linear interpolation broadens by spacing^2 / 6, less than 2 % of it
    sphere = torch.exp(-0.5 * ((mm - off_centre) ** 2).sum(-1) / 25)
    params = make_params(shape, spacing_mm, 0.8, angles_deg, (1, -1, 1), (0.0, 0.0, 0.0))
    view = apply_affine(sphere[None, None], params)[0, 0]
    share = view / view.sum()
    mean = (share[..., None] * mm).sum((0, 1, 2))
    wanted = np.linalg.inv(params.linear[0].numpy()) @ off_centre.double().numpy()
    assert mean.numpy() == pytest.approx(wanted, abs=0.05)
    centred = mm - mean
    moments = torch.einsum("zyx,zyxi,zyxj->ij", share, centred, centred)
    spread = torch.linalg.eigvalsh(moments)
    assert spread.max() / spread.min() < 1.02
    assert spread.mean().item() == pytest.approx(25 / 0.8**2, rel=0.02)


@pytest.mark.parametrize("shape", [(3, 7, 5), (4, 5)])
def test_identity_and_flips_are_bit_exact(shape):
    dimensions = len(shape)
    given = volumes(shape, count=8)
    spacing_mm = (3.0, 0.7, 0.9)[-dimensions:]
    still = AffineRange((1.0, 1.0), (0.0,) if dimensions == 2 else (0.0, 0.0, 0.0), ())
    same = apply_affine(given, draw_affine(generators(8), still, shape, spacing_mm))
    assert torch.equal(same, given)
    flipping = replace(still, flip_axes=(0, dimensions - 1))
    params = draw_affine(generators(8), flipping, shape, spacing_mm)
    flipped = apply_affine(given, params)
    seen = set()
    for sample in range(8):
        axes = [axis for axis in range(dimensions) if params.linear[sample, axis, axis] < 0]
        seen.add(tuple(axes))
        assert torch.equal(flipped[sample], given[sample].flip([axis + 1 for axis in axes]))
    assert len(seen) > 2
    assert all(set(axes) <= {0, dimensions - 1} for axes in seen)


@pytest.mark.parametrize("axis", range(3))
def test_a_rotation_about_an_axis_leaves_it_where_it_is(axis):
    """Rotations are given about z, y and x: where slices are thick, about z alone."""
    rotation_deg = tuple(30.0 if each == axis else 0.0 for each in range(3))
    linear = draw_affine(generators(20), AffineRange((1.0, 1.0), rotation_deg), (5, 7, 9), (3.0, 1.0, 2.0)).linear
    still = torch.zeros(3, dtype=torch.float64)
    still[axis] = 1
    torch.testing.assert_close(linear[:, axis], still.expand(20, 3))
    torch.testing.assert_close(linear[:, :, axis], still.expand(20, 3))
    others = [each for each in range(3) if each != axis]
    assert (linear[:, others, others] < 1).all()


def test_a_turned_crop_that_does_not_fit_along_an_axis_is_centred_there():
    params = draw_affine(generators(50), AffineRange((1.0, 1.0), (45.0,)), (10, 40), (1.0, 1.0))
    needed_mm = params.linear.abs() @ torch.tensor([4.5, 19.5], dtype=torch.float64)
    assert (needed_mm[:, 0] > 4.5).sum() > 40
    assert (params.centre_mm[:, 0][needed_mm[:, 0] > 4.5] == 0).all()


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0.0, 0.0), (0.2, 0.1, 0.3), (1.0, 1.0, 1.0)])
def test_each_axis_is_flipped_with_its_probability(probability, least, most):
    ranges = AffineRange((1.0, 1.0), flip_axes=(0, 1), flip_probability=probability)
    params = draw_affine(generators(400), ranges, (5, 7), (1.0, 2.0))
    share = (torch.diagonal(params.linear, dim1=1, dim2=2) < 0).double().mean(dim=0)
    assert (least <= share).all()
    assert (share <= most).all()


def test_a_flipped_sample_stays_exact_among_others_that_are_warped():
    given = volumes((5, 7), count=2)
    flipped = make_params((5, 7), (1.0, 2.0), 1.0, (0.0,), (-1, 1), (0.0, 0.0))
    turned = make_params((5, 7), (1.0, 2.0), 0.9, (30.0,), (1, 1), (0.1, 0.0))
    both = replace(
        flipped,
        linear=torch.cat([turned.linear, flipped.linear]),
        centre_mm=torch.cat([turned.centre_mm, flipped.centre_mm]),
    )
    views = apply_affine(given, both)
    assert torch.equal(views[1], given[1].flip(1))
    assert torch.equal(views[:1], apply_affine(given[:1], turned))


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
def test_crops_without_rotation_lie_inside_and_cover_the_drawn_share(shape, spacing_mm, rotation_deg):
    still = AffineRange((0.2, 0.6), (0.0,) * len(rotation_deg), tuple(range(len(shape))))
    params = draw_affine(generators(200), still, shape, spacing_mm)
    boxes = crop_boxes(params)
    assert (boxes.lower >= -0.5).all()
    assert (boxes.upper <= torch.tensor(shape) - 0.5).all()
    assert valid_mask(params, shape).all()
    share = boxes.size.prod(1) / math.prod(shape)
    assert share.min() >= 0.2
    assert share.max() <= 0.6
    assert share.mean().item() == pytest.approx(0.4, abs=0.03)
    side_mm = boxes.size * torch.tensor(spacing_mm)  # the same zoom along all axes in mm
    torch.testing.assert_close(side_mm / side_mm[:, :1], (side_mm[:1] / side_mm[:1, :1]).expand(200, -1))
    centre = (boxes.lower + boxes.upper) / 2 - (torch.tensor(shape) - 1) / 2
    assert (centre.mean(0).abs() < 0.15 * centre.abs().amax(0)).all()


def test_rotations_stay_within_their_range_and_about_their_axis():
    params = draw_affine(generators(300), AffineRange((0.4, 0.4), (30.0, 0.0, 0.0), ()), (6, 20, 20), (5.0, 1.0, 1.0))
    rotation = params.linear / 0.4 ** (1 / 3)
    assert torch.equal(rotation[:, 0, 1:], torch.zeros(300, 2, dtype=torch.float64))
    angles = torch.rad2deg(torch.atan2(rotation[:, 2, 1], rotation[:, 1, 1]))
    assert 28 < angles.max() <= 30
    assert -30 <= angles.min() < -28
    assert valid_mask(params, (6, 20, 20)).float().mean() > 0.99  # the place of a turned crop is chosen so that it fits


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
def test_every_draw_is_a_similarity_in_millimetres(shape, spacing_mm, rotation_deg):
    params = draw_affine(generators(50), ranges(rotation_deg, len(shape)), shape, spacing_mm)
    zoom = torch.linalg.det(params.linear).abs() ** (1 / len(shape))
    unit = torch.eye(len(shape), dtype=torch.float64)
    torch.testing.assert_close(params.linear @ params.linear.mT, zoom[:, None, None] ** 2 * unit)


def test_draws_depend_on_the_samples_generator_only():
    wanted = ranges((30.0,), 2)
    together = draw_affine(generators(4), wanted, (9, 8), (1.0, 2.0))
    alone = draw_affine(generators(4)[2:3], wanted, (9, 8), (1.0, 2.0))
    assert torch.equal(together.linear[2:3], alone.linear)
    assert torch.equal(together.centre_mm[2:3], alone.centre_mm)
    given = volumes((9, 8))
    before = given.clone()
    assert torch.equal(apply_affine(given, together)[2:3], apply_affine(given[2:3], alone))
    assert torch.equal(given, before)
    other = draw_affine(generators(4, step=1), wanted, (9, 8), (1.0, 2.0))
    assert not torch.equal(other.linear, together.linear)


def test_valid_mask_is_false_wherever_a_corner_lies_outside():
    shape, spacing_mm = (6, 11, 9), (3.0, 1.0, 1.4)
    params = make_params(shape, spacing_mm, 0.95, (35.0, 10.0, 0.0), (1, 1, -1), (1.0, -1.5, 0.5))
    points = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij"), -1).flatten(0, 2)
    source = map_points(points[None], params, "to_input")[0]
    inside = ((source >= 0) & (source <= torch.tensor(shape) - 1)).all(1)
    assert 0.1 < inside.float().mean() < 0.9
    assert torch.equal(valid_mask(params, shape)[0].flatten(), inside)


def test_feature_map_of_another_resolution_moves_by_the_same_millimetres():
    shape, spacing_mm = (16, 24), (2.0, 1.0)
    params = make_params(shape, spacing_mm, 0.6, (25.0,), (-1, 1), (2.0, -1.0))
    fine = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"))[None]
    pooled = torch.nn.functional.avg_pool2d(fine, 4)
    after = apply_affine(pooled, params)
    inside = valid_mask(params, pooled.shape[2:])
    torch.testing.assert_close(
        after[:, :, inside[0]],
        torch.nn.functional.avg_pool2d(apply_affine(fine, params), 4)[:, :, inside[0]],
        atol=1e-3,
        rtol=0,
    )
    assert inside.float().mean() > 0.5


def test_mixed_precision_does_not_move_anything():
    shape, spacing_mm = (40, 37), (1.0, 1.5)
    params = draw_affine(generators(2), ranges((45.0,), 2), shape, spacing_mm)
    given, points = volumes(shape, count=2), torch.rand(2, 30, 2) * 37
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view, moved = apply_affine(given, params), map_points(points, params, "to_input")
    assert torch.equal(view, apply_affine(given, params))
    assert torch.equal(moved, map_points(points, params, "to_input"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(STILL, crop_fraction=(0.0, 1.0)), "crop_fraction"),
        (replace(STILL, crop_fraction=(0.5, 1.2)), "crop_fraction"),
        (replace(STILL, rotation_deg=(10.0,)), "rotation"),
        (replace(STILL, flip_axes=(3,)), "flip_axes"),
        (replace(STILL, flip_axes=(-4,)), "flip_axes"),
    ],
)
def test_unusable_ranges_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_affine(generators(), wrong, (4, 5, 6), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(("shape", "spacing_mm", "rotation_deg"), CASES)
def test_no_rotation_is_one_of_no_degrees_and_axes_count_from_the_end(shape, spacing_mm, rotation_deg):
    """Both draw as many random numbers as what says so in full."""
    dimensions = len(shape)
    short = AffineRange((0.3, 0.9), flip_axes=(-1,))
    full = AffineRange((0.3, 0.9), (0.0,) * len(rotation_deg), (dimensions - 1,))
    given, wanted = generators(), generators()
    first, second = draw_affine(given, short, shape, spacing_mm), draw_affine(wanted, full, shape, spacing_mm)
    assert torch.equal(first.linear, second.linear)
    assert torch.equal(first.centre_mm, second.centre_mm)
    assert [each.get_state().tolist() for each in given] == [each.get_state().tolist() for each in wanted]
