"""Painting against loops over boxes, shuffling against loops over windows; draws that keep to their ranges."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.views.corruption import (
    INPAINTING,
    NOT_PAINTED,
    OUTPAINTING,
    CorruptionParams,
    CorruptionRange,
    apply_corruption,
    draw_corruption,
    painted_mask,
)

CASES = [
    pytest.param((9, 34, 26), (5.0, 0.8, 1.1), id="thick slices"),
    pytest.param((17, 12, 14), (1.5, 1.0, 1.2), id="3d"),
    pytest.param((31, 22), (0.7, 1.3), id="2d"),
]
BOTH = CorruptionRange(shuffle_probability=1.0, shuffle_side_mm=4.2)
PAINT = replace(BOTH, paint_probability=1.0, inpainting_share=0.5, shuffle_probability=0.0)
SHUFFLE = replace(BOTH, paint_probability=0.0)
OFF = replace(SHUFFLE, shuffle_probability=0.0)


def generators(samples=range(6), step: int = 0):
    return sample_generators(7, "corruption", step, list(samples))


def given(shape, samples: int = 6) -> torch.Tensor:
    """Return volumes of two channels that differ in mean, scale and skew."""
    noise = torch.randn(samples, 2, *shape, generator=torch.Generator().manual_seed(1))
    return torch.stack([noise[:, 0], 3 * noise[:, 1].exp() + 5], dim=1)


def slow_mask(params: CorruptionParams, sample: int) -> np.ndarray:
    kind = int(params.kind[sample])
    mask = np.full(params.shape, kind == OUTPAINTING)
    for lower, size, used in zip(params.lower_vox[sample], params.size_vox[sample], params.used[sample], strict=True):
        if used:
            box = tuple(slice(int(first), int(first + side)) for first, side in zip(lower, size, strict=True))
            mask[box] = kind == INPAINTING
    return mask


def windows_of(params: CorruptionParams, sample: int):
    """Yield the windows of a sample as slices, one axis after the other."""
    axes = []
    for length, side, shift in zip(
        params.shape, params.window_vox[sample].tolist(), params.shift_vox[sample].tolist(), strict=True
    ):
        axes.append([slice(max(first, 0), min(first + side, length)) for first in range(-shift, length, side)])
    yield from itertools.product(*axes)


def within_five_deviations(share: float, probability: float, draws: int) -> bool:
    return abs(share - probability) <= 5 * (probability * (1 - probability) / draws) ** 0.5


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
@pytest.mark.parametrize(("kind", "sides"), [(INPAINTING, (1 / 6, 1 / 3)), (OUTPAINTING, (3 / 7, 4 / 7))])
def test_boxes_fill_the_ranges_of_their_sides_and_places(shape, spacing_mm, kind, sides):
    params = draw_corruption(generators(range(300)), PAINT, shape, spacing_mm)
    boxes = (params.kind == kind)[:, None] & params.used
    size, lower = params.size_vox[boxes], params.lower_vox[boxes]
    assert len(size) > 400
    for axis, length in enumerate(shape):
        allowed = {side for side in range(1, length) if sides[0] <= side / length <= sides[1]}
        assert set(size[:, axis].tolist()) == allowed
        for side in allowed:
            first = lower[size[:, axis] == side, axis]
            margin = min(3, (length - side) // 2)
            assert first.min() >= margin
            assert first.max() + side <= length - margin
        assert lower[:, axis].min() == min(3, (length - max(allowed)) // 2)
        assert (lower + size)[:, axis].max() == length - min(3, (length - max(allowed)) // 2)


def test_boxes_of_a_patch_with_hardly_any_room():
    params = draw_corruption(generators(range(40)), PAINT, (1, 3, 4), (5.0, 1.0, 1.0))
    # no whole number of voxels lies in (3/7, 4/7) of 3: the largest below
    painted_in, painted_out = (params.size_vox[params.kind == kind].flatten(0, 1) for kind in (INPAINTING, OUTPAINTING))
    assert painted_in.unique(dim=0).tolist() == [[1, 1, 1]]
    assert painted_out.unique(dim=0).tolist() == [[1, 1, 2]]
    assert params.lower_vox[..., :2].flatten(0, 1).unique(dim=0).tolist() == [[0, 1]]


def test_sides_along_axes_and_of_boxes_are_drawn_apart():
    params = draw_corruption(generators(range(200)), replace(PAINT, inpainting_share=1.0), (60, 90), (1.0, 1.0))
    share = params.size_vox.double() / torch.tensor([60, 90])
    numbers = torch.cat([share[:, :2].flatten(1), params.lower_vox[:, :2].flatten(1)], dim=1)
    correlation = np.corrcoef(numbers.T.numpy()) - np.eye(8)
    for side in range(4):  # a place depends on the room that its own side leaves
        correlation[side, side + 4] = correlation[side + 4, side] = 0
    assert np.abs(correlation).max() < 0.35


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
def test_mask_is_that_of_a_loop_over_boxes(shape, spacing_mm):
    params = draw_corruption(generators(range(20)), replace(PAINT, paint_probability=0.7), shape, spacing_mm)
    assert set(params.kind.tolist()) == {NOT_PAINTED, INPAINTING, OUTPAINTING}
    mask = painted_mask(params)
    for sample in range(20):
        assert np.array_equal(mask[sample].numpy(), slow_mask(params, sample))
    assert not mask[params.kind == NOT_PAINTED].any()
    assert not params.used[params.kind == NOT_PAINTED].any()


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
def test_noise_is_where_the_mask_is_and_nothing_else_changes(shape, spacing_mm):
    volumes = given(shape)
    before = volumes.clone()
    params = draw_corruption(generators(), PAINT, shape, spacing_mm)
    painted = apply_corruption(volumes, params)
    assert torch.equal(volumes, before)
    for sample, channel in itertools.product(range(6), range(2)):
        mask = torch.from_numpy(slow_mask(params, sample))
        old, new = volumes[sample, channel], painted[sample, channel]
        assert mask.any()
        assert torch.equal(new[~mask], old[~mask])
        assert (new[mask] != old[mask]).all()
        low, high = np.percentile(old.numpy(), [1, 99])
        share = (new[mask].numpy() - low) / (high - low)
        assert share.min() >= -1e-5
        assert share.max() <= 1 + 1e-5


def test_noise_is_uniform_and_every_voxel_channel_and_sample_has_its_own():
    shape = (20, 50, 60)
    params = draw_corruption(generators(range(2)), replace(PAINT, inpainting_share=0.0), shape, (1.0, 1.0, 1.0))
    volumes = given(shape, 2)[:1].expand(2, -1, -1, -1, -1)
    painted = apply_corruption(volumes, params)
    mask = painted_mask(params).all(dim=0)
    share = []
    for sample, channel in itertools.product(range(2), range(2)):
        low, high = np.percentile(volumes[sample, channel].numpy(), [1, 99])
        share.append((painted[sample, channel][mask].numpy() - low) / (high - low))
        deciles = np.histogram(share[-1], 10, (0, 1))[0] / mask.sum().item()
        assert deciles == pytest.approx(np.full(10, 0.1), abs=0.02)
    assert mask.sum() > 5000
    assert np.abs(np.corrcoef(share) - np.eye(4)).max() < 0.08
    assert abs(np.corrcoef(share[0][1:], share[0][:-1])[0, 1]) < 0.08


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
def test_shuffling_permutes_every_window_and_all_channels_alike(shape, spacing_mm):
    voxels = int(np.prod(shape))
    number = torch.arange(voxels, dtype=torch.float32).view(shape)
    volumes = torch.stack([number, number + voxels]).expand(6, 2, *shape).contiguous()
    before = volumes.clone()
    params = draw_corruption(generators(), SHUFFLE, shape, spacing_mm)
    shuffled = apply_corruption(volumes, params)
    assert torch.equal(volumes, before)
    for sample in range(6):
        new = shuffled[sample, 0]
        covered = 0
        for window in windows_of(params, sample):
            assert torch.equal(new[window].flatten().sort().values, number[window].flatten())
            covered += new[window].numel()
        assert covered == voxels
        volume = params.window_vox[sample].prod().item()
        assert volume >= 2
        # each voxel of a whole window stays with probability 1 / volume; smaller windows are at the border
        assert (new == number).float().mean() < 0.9
        assert torch.equal(shuffled[sample, 1], new + voxels)
    assert len({tuple(volume.flatten().tolist()) for volume in shuffled[:, 0]}) == 6


def test_shuffling_takes_every_voxel_to_every_place_of_its_window_equally_often():
    drawn = draw_corruption(generators(range(1500)), replace(SHUFFLE, shuffle_side_mm=3.0), (2, 3), (1.0, 1.0))
    whole = torch.tensor([2, 3]).expand(1500, 2).contiguous()
    params = replace(drawn, window_vox=whole, shift_vox=torch.zeros_like(whole))
    shuffled = apply_corruption(torch.arange(6.0).view(1, 1, 2, 3).repeat(1500, 1, 1, 1), params).flatten(1)
    for voxel in range(6):
        places = (shuffled == voxel).double().mean(0)
        assert all(within_five_deviations(share, 1 / 6, 1500) for share in places.tolist())
    pairs = {(row.index(0), row.index(1)) for row in shuffled.tolist()}
    assert len(pairs) == 30


def test_windows_fill_their_ranges_in_millimetres_and_leave_thick_slices_apart():
    shape, spacing_mm = (9, 34, 26), (5.0, 0.8, 1.1)
    params = draw_corruption(generators(range(300)), SHUFFLE, shape, spacing_mm)
    for axis, sides in enumerate([{1}, {2, 3, 4, 5}, {2, 3}]):  # up to 4.2 mm
        assert set(params.window_vox[:, axis].tolist()) == sides
        for side in sides:
            shifts = params.shift_vox[params.window_vox[:, axis] == side, axis]
            assert set(shifts.tolist()) == set(range(side))
    slices = apply_corruption(given(shape), draw_corruption(generators(), SHUFFLE, shape, spacing_mm))
    for old, new in zip(given(shape).flatten(0, 2), slices.flatten(0, 2), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "largest"),
    [
        ((64, 64, 32), (1.0, 1.0, 1.0), [3, 3, 3]),  # 3.2 mm
        ((20, 160, 128), (5.0, 0.8, 0.8), [2, 12, 12]),  # 10 mm
        ((9, 128, 128), (5.0, 0.8, 0.8), [1, 5, 5]),  # 4.5 mm
        ((1, 100, 80), (5.0, 1.0, 1.0), [1, 8, 8]),  # the axis of one voxel does not count
        ((9, 34, 26), (5.0, 0.8, 1.1), [1, 3, 2]),  # 2.72 mm
        ((12, 14), (1.0, 1.3), [2, 1]),  # 1.2 mm would shuffle nothing: two voxels of 1 mm
        ((1, 1), (1.0, 1.0), [1, 1]),
    ],
)
def test_largest_window_without_a_given_side(shape, spacing_mm, largest):
    ranges = replace(SHUFFLE, shuffle_side_mm=None)
    params = draw_corruption(generators(range(200)), ranges, shape, spacing_mm)
    assert params.window_vox.amax(0).tolist() == largest
    assert params.window_vox.amin(0).tolist() == [min(side, 2) for side in largest]


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
def test_a_sample_is_shuffled_first_then_painted(shape, spacing_mm):
    volumes = given(shape)
    params = draw_corruption(generators(), replace(BOTH, paint_probability=1.0), shape, spacing_mm)
    both = apply_corruption(volumes, params)
    unpainted = replace(params, kind=torch.full_like(params.kind, NOT_PAINTED))
    assert not painted_mask(unpainted).any()
    shuffled = apply_corruption(volumes, unpainted)
    painted = apply_corruption(volumes, replace(params, window_vox=torch.zeros_like(params.window_vox)))
    mask = painted_mask(params)[:, None]
    assert torch.equal(both, torch.where(mask, painted, shuffled))
    assert not torch.equal(both, torch.where(mask, painted, volumes))


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
def test_a_sample_does_not_depend_on_its_batch_and_repeats(shape, spacing_mm):
    ranges = replace(BOTH, shuffle_probability=0.5)
    together = draw_corruption(generators(), ranges, shape, spacing_mm)
    volumes = given(shape)
    corrupted = apply_corruption(volumes, together)
    assert len(set(together.kind.tolist())) > 1
    assert {bool(window) for window in together.window_vox.amax(1)} == {True, False}
    for sample in range(6):
        alone = draw_corruption(generators([sample]), ranges, shape, spacing_mm)
        assert torch.equal(apply_corruption(volumes[sample : sample + 1], alone)[0], corrupted[sample])
    other = draw_corruption(generators(step=1), ranges, shape, spacing_mm)
    assert not torch.equal(apply_corruption(volumes, other), corrupted)


def test_the_other_view_has_the_kind_but_not_the_boxes():
    shape, spacing_mm = (9, 34, 26), (5.0, 0.8, 1.1)
    ranges = CorruptionRange(paint_probability=0.6, inpainting_share=0.5)
    first = draw_corruption(generators(range(60)), ranges, shape, spacing_mm)
    second_generators, third_generators = generators(range(60), step=1), generators(range(60), step=1)
    second = draw_corruption(second_generators, ranges, shape, spacing_mm, paint_like=first)
    alone = draw_corruption(third_generators, ranges, shape, spacing_mm)
    assert torch.equal(second.kind, first.kind)
    assert not torch.equal(alone.kind, first.kind)
    assert torch.equal(second.used.any(1), first.kind != NOT_PAINTED)
    assert (second.lower_vox != first.lower_vox).flatten(1).any(1).all()
    assert (second.noise_seed != first.noise_seed).all()
    is_out = second.kind == OUTPAINTING
    assert second.size_vox[is_out][..., 1].min() >= 34 * 3 / 7
    assert second.size_vox[~is_out][..., 1].max() <= 34 / 3
    for name in ("window_vox", "shift_vox", "noise_seed", "shuffle_seed"):
        assert torch.equal(getattr(second, name), getattr(alone, name))
    assert torch.equal(second_generators[0].get_state(), third_generators[0].get_state())


def test_what_is_drawn_does_not_move_the_other_draws():
    shape, spacing_mm = (17, 12, 14), (1.5, 1.0, 1.2)
    wanted = draw_corruption(generators(), BOTH, shape, spacing_mm)
    fewer_boxes = draw_corruption(generators(), replace(BOTH, boxes=2), shape, spacing_mm)
    assert fewer_boxes.used.shape == (6, 2)
    assert fewer_boxes.lower_vox.shape == fewer_boxes.size_vox.shape == (6, 2, 3)
    for name in ("kind", "noise_seed", "window_vox", "shift_vox", "shuffle_seed"):
        assert torch.equal(getattr(fewer_boxes, name), getattr(wanted, name))
    state = []
    for ranges in (BOTH, OFF, PAINT, SHUFFLE, CorruptionRange(box_continues=0.0, margin_vox=0)):
        each = generators([0])
        draw_corruption(each, ranges, shape, spacing_mm)
        state.append(each[0].get_state())
    assert all(torch.equal(state[0], other) for other in state[1:])
    unshuffled = draw_corruption(generators(), replace(BOTH, shuffle_probability=0.0), shape, spacing_mm)
    for field in fields(CorruptionParams):
        if field.name in ("window_vox", "shift_vox"):
            assert not getattr(unshuffled, field.name).any()
        elif field.name != "shape":
            assert torch.equal(getattr(unshuffled, field.name), getattr(wanted, field.name))


@pytest.mark.parametrize(("shape", "spacing_mm"), CASES)
def test_probabilities_of_0_change_nothing(shape, spacing_mm):
    volumes = given(shape)
    params = draw_corruption(generators(), OFF, shape, spacing_mm)
    unchanged = apply_corruption(volumes, params)
    assert torch.equal(unchanged, volumes)
    assert not painted_mask(params).any()
    unchanged.zero_()
    assert volumes.any()


def test_kinds_shuffling_and_numbers_of_boxes_are_as_frequent_as_they_should_be():
    draws = 2000
    params = draw_corruption(generators(range(draws)), CorruptionRange(), (17, 12), (1.0, 1.0))
    wanted = {NOT_PAINTED: 0.1, INPAINTING: 0.18, OUTPAINTING: 0.72}
    for kind, probability in wanted.items():
        assert within_five_deviations((params.kind == kind).double().mean().item(), probability, draws), kind
    shuffled = (params.window_vox > 0).all(1)
    assert within_five_deviations(shuffled.double().mean().item(), 0.5, draws)
    assert torch.equal(shuffled, (params.window_vox > 0).any(1))
    counts = params.used.sum(1)[params.kind != NOT_PAINTED]
    for boxes, probability in {0: 0.0, 1: 0.05, 2: 0.0475, 5: 0.95**4}.items():
        assert within_five_deviations((counts == boxes).double().mean().item(), probability, len(counts)), boxes
    assert (params.used.long().diff(dim=1) <= 0).all()  # the first ones are used
    joint = (shuffled & (params.kind == OUTPAINTING)).double().mean().item()
    assert within_five_deviations(joint, 0.36, draws)
    assert len(set(params.noise_seed.tolist()) | set(params.shuffle_seed.tolist())) == 2 * draws


def test_constant_channels_and_other_precisions():
    shape, spacing_mm = (9, 34, 26), (5.0, 0.8, 1.1)
    params = draw_corruption(generators(), BOTH, shape, spacing_mm)
    constant = torch.full((6, 1, *shape), -1.7)
    assert torch.equal(apply_corruption(constant, params), constant)
    assert apply_corruption(given(shape).double(), params).dtype == torch.float64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"paint_probability": 1.2}, "paint_probability"),
        ({"box_continues": -0.1}, "box_continues"),
        ({"inpainting_side": (0.4, 0.3)}, "inpainting_side"),
        ({"outpainting_side": (0.0, 0.3)}, "outpainting_side"),
        ({"boxes": 0}, "boxes"),
        ({"margin_vox": -1}, "margin_vox"),
        ({"shuffle_side_mm": 0.0}, "shuffle_side_mm"),
    ],
)
def test_unusable_ranges_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_corruption(generators(), replace(BOTH, **wrong), (4, 5), (1.0, 1.0))


def test_what_does_not_fit_is_an_error():
    params = draw_corruption(generators(), BOTH, (9, 8), (1.0, 1.0))
    for volumes in (given((9, 8), 5), given((9, 7)), given((2, 9, 8))):
        with pytest.raises(ValueError, match="of volumes must be"):
            apply_corruption(volumes, params)
    with pytest.raises(ValueError, match="axes"):
        draw_corruption(generators(), BOTH, (9, 8), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="paint_like"):
        draw_corruption(generators(range(2)), BOTH, (9, 8), (1.0, 1.0), paint_like=params)
