"""Flips and quarter turns: NumPy's on a moved voxel, exact inverses, and what their code says."""

import itertools

import numpy as np
import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.views.turns import (
    TurnParams,
    apply_turns,
    draw_turns,
    mean_over_turns,
    no_turns,
    turn_code,
    turn_plane,
    undo_turns,
)

CASES = [
    pytest.param((4, 5, 5), (1, 2), id="yx"),
    pytest.param((5, 3, 5), (0, 2), id="zx"),
    pytest.param((5, 5, 7), (0, 1), id="zy"),
    pytest.param((6, 6), (0, 1), id="2d"),
]


def generators(samples=range(5), step: int = 0):
    return sample_generators(3, "turns", step, list(samples))


def numbered(shape, samples: int = 1, channels: int = 2) -> torch.Tensor:
    """Return volumes whose voxels all differ."""
    size = (samples, channels, *shape)
    return torch.arange(int(np.prod(size)), dtype=torch.float32).view(size)


def all_turns(dimensions: int, plane) -> TurnParams:
    """Return every combination of flips and turns, one per sample."""
    flips = list(itertools.product([False, True], repeat=dimensions))
    pairs = list(itertools.product(flips, range(4)))
    return TurnParams(torch.tensor([flip for flip, _ in pairs]), torch.tensor([turn for _, turn in pairs]), plane)


def moved_marker(place, shape, flips, turns: int, plane) -> list[int]:
    """Return where a voxel goes, by NumPy on a volume that is 0 elsewhere."""
    volume = np.zeros(shape)
    volume[tuple(place)] = 1
    flipped = np.flip(volume, [axis for axis, flip in enumerate(flips) if flip])
    return [int(where[0]) for where in np.nonzero(np.rot90(flipped, turns, axes=plane))]


@pytest.mark.parametrize(("shape", "plane"), CASES)
def test_undoing_every_combination_gives_the_volumes_back(shape, plane):
    params = all_turns(len(shape), plane)
    assert len(params.flips) == 4 * 2 ** len(shape)
    given = numbered(shape, len(params.flips))
    before = given.clone()
    turned = apply_turns(given, params)
    assert torch.equal(undo_turns(turned, params), given)
    assert torch.equal(apply_turns(undo_turns(given, params), params), given)
    assert torch.equal(given, before)
    turned.zero_()
    assert torch.equal(given, before)  # also where nothing is flipped, what is returned is a copy


@pytest.mark.parametrize(("shape", "plane"), CASES)
def test_a_voxel_moves_where_numpy_moves_it(shape, plane):
    params = all_turns(len(shape), plane)
    place = [1, 0, 2][: len(shape)]
    volumes = torch.zeros(len(params.flips), 1, *shape)
    volumes[(slice(None), 0, *place)] = 1
    turned = apply_turns(volumes, params)
    for sample, (flips, turns) in enumerate(zip(params.flips.tolist(), params.quarter_turns.tolist(), strict=True)):
        wanted = moved_marker(place, shape, flips, turns, plane)
        assert turned[sample, 0].nonzero().tolist() == [wanted], (flips, turns)


def test_one_quarter_turn_takes_the_first_axis_to_the_second():
    """By hand: as ``rot90`` does it, y 0, x 0 goes to the last y, x 0 and from there to the last y, last x."""
    volume = torch.zeros(1, 1, 2, 3, 3)
    volume[0, 0, 1, 0, 0] = 1
    still = torch.zeros(1, 3, dtype=torch.bool)
    corners = [(0, 0), (2, 0), (2, 2), (0, 2)]
    for turns, (y, x) in enumerate(corners):
        turned = apply_turns(volume, TurnParams(still, torch.tensor([turns]), (1, 2)))
        assert turned[0, 0].nonzero().tolist() == [[1, y, x]]


@pytest.mark.parametrize(("dimensions", "plane", "distinct"), [(3, (1, 2), 16), (2, (0, 1), 8)])
def test_codes_differ_and_name_half_as_many_maps(dimensions, plane, distinct):
    params = all_turns(dimensions, plane)
    code = turn_code(params)
    assert code.shape == (4 * 2**dimensions, dimensions + 4)
    assert set(code.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(code[:, :dimensions], params.flips.float())
    assert (code[:, dimensions:].sum(1) == 1).all()
    assert torch.equal(code[:, dimensions:].argmax(1), params.quarter_turns)
    assert len(code.unique(dim=0)) == len(code)
    turned = apply_turns(numbered((3, 4, 4)[-dimensions:]).expand(len(code), *(-1,) * (dimensions + 1)), params)
    assert len(turned.unique(dim=0)) == distinct


@pytest.mark.parametrize(("shape", "plane"), CASES)
def test_a_sample_does_not_depend_on_its_batch(shape, plane):
    axes = range(len(shape))
    together = draw_turns(generators(range(12)), len(shape), plane, "quarter", axes)
    given = numbered(shape, 12)
    turned = apply_turns(given, together)
    assert len(turn_code(together).unique(dim=0)) > 4
    for sample in range(12):
        alone = draw_turns(generators([sample]), len(shape), plane, "quarter", axes)
        assert torch.equal(turn_code(alone)[0], turn_code(together)[sample])
        assert torch.equal(apply_turns(given[sample : sample + 1], alone)[0], turned[sample])
    other = draw_turns(generators(range(12), step=1), len(shape), plane, "quarter", axes)
    assert not torch.equal(turn_code(other), turn_code(together))


def test_gradient_returns_to_the_voxel_it_came_from():
    params = all_turns(3, (1, 2))
    given = numbered((2, 3, 3), 32).requires_grad_()
    weight = torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
    (apply_turns(given, params) * weight).sum().backward()
    assert torch.equal(given.grad, undo_turns(weight, params))


def test_draws_are_uniform_and_keep_to_what_is_allowed():
    params = draw_turns(generators(range(2000)), 3, (1, 2), "quarter", (0, 2))
    share = params.flips.double().mean(0)
    assert share[1] == 0
    # five standard deviations of a share of 2000
    assert share[[0, 2]].tolist() == pytest.approx([0.5, 0.5], abs=5 * (0.25 / 2000) ** 0.5)
    counts = params.quarter_turns.bincount(minlength=4) / 2000
    assert counts.tolist() == pytest.approx([0.25] * 4, abs=5 * (0.1875 / 2000) ** 0.5)
    both = (params.flips[:, 0] & params.flips[:, 2]).double().mean().item()
    assert both == pytest.approx(0.25, abs=5 * (0.1875 / 2000) ** 0.5)


def test_half_turns_only_and_what_else_is_drawn_stays():
    quarters = draw_turns(generators(range(200)), 3, (1, 2), "quarter", (0, 1, 2))
    first, second = generators([0]), generators([0])
    draw_turns(first, 3, (1, 2), "quarter", (0, 1, 2))
    draw_turns(second, 3, (1, 2), "half", ())
    assert torch.equal(first[0].get_state(), second[0].get_state())
    halves = draw_turns(generators(range(200)), 3, (1, 2), "half", (0, 1, 2))
    assert torch.equal(halves.flips, quarters.flips)
    assert set(halves.quarter_turns.tolist()) == {0, 2}
    assert 70 < (halves.quarter_turns == 2).sum() < 130


@pytest.mark.parametrize(("shape", "plane"), CASES)
@pytest.mark.parametrize("steps", ["none", "half", "quarter"])
def test_mean_over_turns_is_that_of_every_version(shape, plane, steps):
    """NumPy makes each combination of flips of two axes and turns in the plane, all as likely."""
    flip_axes = (0, len(shape) - 1)
    volumes = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(4))
    versions = []
    for flips in itertools.product([False, True], repeat=2):
        axes = [axis + 2 for axis, flip in zip(flip_axes, flips, strict=True) if flip]
        for turns in {"none": [0], "half": [0, 2], "quarter": [0, 1, 2, 3]}[steps]:
            flipped = np.flip(volumes.numpy(), axes)
            versions.append(np.rot90(flipped, turns, axes=[axis + 2 for axis in plane]))
    found = mean_over_turns(volumes, plane, steps, flip_axes)
    np.testing.assert_allclose(found.numpy(), np.mean(versions, axis=0), atol=1e-6)


def test_no_turns_change_nothing():
    given = numbered((3, 4, 5), 2)
    still = no_turns(2, 3, (1, 2))
    assert torch.equal(apply_turns(given, still), given)
    assert turn_code(still).tolist() == [[0, 0, 0, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "thick_axis", "wanted"),
    [
        ((20, 64, 64), (5.0, 0.8, 0.8), 0, ((1, 2), True)),
        ((64, 64, 64), (1.0, 1.0, 1.0), None, ((1, 2), True)),
        ((64, 64, 64), (1.0, 1.0, 1.0005), None, ((1, 2), True)),
        ((64, 64, 64), (1.0, 1.0, 1.002), None, ((0, 1), True)),
        ((64, 20, 64), (0.8, 5.0, 0.8), 1, ((0, 2), True)),
        ((64, 64, 64), (1.0, 1.0, 1.0), 1, ((0, 2), True)),
        ((64, 64, 64), (1.0, 1.0, 1.0), 2, ((0, 1), True)),
        ((64, 64, 64), (5.0, 1.0, 5.0), 0, ((1, 2), False)),
        ((64, 48, 64), (1.0, 1.0, 2.0), None, ((1, 2), False)),
        ((20, 64, 56), (5.0, 0.8, 0.8), 0, ((1, 2), False)),
        ((32, 32), (0.7, 0.7), None, ((0, 1), True)),
        ((32, 32), (0.7, 0.8), None, ((0, 1), False)),
        ((32, 30), (0.7, 0.7), None, ((0, 1), False)),
    ],
)
def test_plane_with_equal_sides_and_without_the_thick_axis(shape, spacing_mm, thick_axis, wanted):
    assert turn_plane(shape, spacing_mm, thick_axis) == wanted


def test_errors():
    uneven = numbered((4, 5, 6), 4)
    params = all_turns(3, (1, 2))
    half = TurnParams(params.flips[:4], torch.tensor([0, 2, 0, 2]), (1, 2))
    assert torch.equal(undo_turns(apply_turns(uneven, half), half), uneven)
    odd = TurnParams(params.flips[:4], torch.tensor([0, 2, 0, 3]), (1, 2))
    for change in (apply_turns, undo_turns):
        with pytest.raises(ValueError, match="would change the shape"):
            change(uneven, odd)
        with pytest.raises(ValueError, match="of volumes must be"):
            change(numbered((4, 5, 5), 3), half)
        with pytest.raises(ValueError, match="of volumes must be"):
            change(numbered((5, 5), 4), half)
    with pytest.raises(ValueError, match="flip_axes"):
        draw_turns(generators(), 2, (0, 1), "quarter", (0, 2))
    for dimensions, plane in ((2, (1, 2)), (3, (2, 1)), (4, (0, 1))):
        with pytest.raises(ValueError, match="plane"):
            no_turns(2, dimensions, plane)
        with pytest.raises(ValueError, match="plane"):
            draw_turns(generators(), dimensions, plane, "quarter", ())
    with pytest.raises(ValueError, match="must both have 2 or 3 axes"):
        turn_plane((4, 5, 6), (1.0, 1.0), None)
