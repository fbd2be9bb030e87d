"""Points against loops over voxels, in 2D and in 3D with sides that all differ."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl.views import points as points_module
from nnssl.views.points import (
    are_inside,
    brighter_part,
    cell_centres_vox,
    corner_points,
    draw_points,
    interpolate_at,
    place_of,
)

SHAPES = {2: (6, 10), 3: (4, 6, 10)}
dims = pytest.mark.parametrize("dim", [2, 3])


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def masks(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(2, *SHAPES[dim], generator=generator) < 0.7
    preferred = torch.rand(2, *SHAPES[dim], generator=generator) < 0.5
    return valid, preferred


@dims
def test_points_are_distinct_valid_and_half_of_them_preferred(dim):
    valid, preferred = masks(dim)
    points = draw_points(generators([1, 2]), valid, 16, preferred, 0.5)
    assert points.shape == (2, 16, dim)
    for sample, rows in enumerate(points.tolist()):
        assert len({tuple(row) for row in rows}) == 16
        assert all(valid[(sample, *row)] for row in rows)
        assert sum(bool(preferred[(sample, *row)]) for row in rows) >= 8


@dims
def test_share_of_preferred_points_is_what_is_asked_for(dim):
    """One preferred voxel in ten: without preference few are drawn, with full preference all."""
    valid = torch.ones(1, *SHAPES[dim], dtype=torch.bool)
    preferred = torch.zeros_like(valid)
    preferred.view(-1)[::10] = True
    wanted = int(preferred.sum())
    everything = draw_points(generators([0]), valid, wanted, preferred, 1.0)
    assert sum(bool(preferred[(0, *row)]) for row in everything[0].tolist()) == wanted
    counts = [
        sum(
            bool(preferred[(0, *row)])
            for row in draw_points(generators([s]), valid, wanted, preferred, 0.0)[0].tolist()
        )
        for s in range(50)
    ]
    assert sum(counts) / (50 * wanted) == pytest.approx(0.1, abs=0.06)


def test_every_valid_voxel_is_drawn_as_often():
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    counts = torch.zeros(3, 4)
    for seed in range(600):
        for y, x in draw_points(generators([seed]), valid, 3, torch.zeros_like(valid), 0.0)[0].tolist():
            counts[y, x] += 1
    assert counts[0, 0] == 0
    assert (counts.flatten()[1:] - 600 * 3 / 11).abs().max() < 45


@dims
def test_a_sample_is_the_same_in_any_batch_and_replays(dim):
    valid, preferred = masks(dim)
    both = draw_points(generators([1, 2]), valid, 9, preferred, 0.5)
    assert torch.equal(both[1:], draw_points(generators([2]), valid[1:], 9, preferred[1:], 0.5))
    assert not torch.equal(both[1:], draw_points(generators([3]), valid[1:], 9, preferred[1:], 0.5))


@dims
def test_too_few_valid_voxels_are_repeated(dim):
    valid = torch.zeros(1, *SHAPES[dim], dtype=torch.bool)
    valid.view(-1)[[3, 17]] = True
    points = draw_points(generators([0]), valid, 5, ~valid, 0.5)
    flat = [int(i) for i in torch.stack([(points[0, :, a]) for a in range(dim)], 1) @ strides(SHAPES[dim])]
    assert sorted(set(flat)) == [3, 17]
    assert sorted(flat.count(i) for i in (3, 17)) == [2, 3]


def strides(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])


@pytest.fixture(params=["by products", "by gathers"])
def both_ways(request, monkeypatch):
    """Maps of few and of many cells are interpolated differently."""
    if request.param == "by gathers":
        monkeypatch.setattr(points_module, "FEW_CELLS", 0)


@dims
def test_interpolation_equals_the_formula(dim, both_ways):
    """Sum over the cells of the tent function of their distance, written in loops; points beyond the border too."""
    generator = torch.Generator().manual_seed(0)
    grid, shape = {2: (3, 5), 3: (2, 3, 5)}[dim], SHAPES[dim]
    maps = torch.randn(2, 3, *grid, generator=generator)
    points = torch.rand(2, 7, dim, generator=generator) * (torch.tensor(shape) + 1) - 1
    found = interpolate_at(maps, points, shape)
    for sample, index in itertools.product(range(2), range(7)):
        place = [
            min(max((p + 0.5) * cells / voxels - 0.5, 0), cells - 1)
            for p, cells, voxels in zip(points[sample, index].tolist(), grid, shape, strict=True)
        ]
        for channel in range(3):
            total = 0.0
            for cell in itertools.product(*(range(n) for n in grid)):
                weight = math.prod(max(0.0, 1 - abs(p - c)) for p, c in zip(place, cell, strict=True))
                total += weight * float(maps[(sample, channel, *cell)])
            assert found[sample, index, channel].item() == pytest.approx(total, abs=1e-5)


@dims
@pytest.mark.parametrize("factor", [1, 2])
def test_interpolation_equals_grid_sample(dim, factor, both_ways):
    """torch's sampling with ``align_corners=False`` and border padding is the reference for maps of any resolution."""
    shape = SHAPES[dim]
    grid = tuple(n // factor for n in shape)
    maps = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0), requires_grad=True)
    points = torch.rand(2, 7, dim, generator=torch.Generator().manual_seed(1)) * (torch.tensor(shape) - 1)
    place = (2 * (points + 0.5) / torch.tensor(shape) - 1).flip(-1).view(2, *(1,) * (dim - 1), 7, dim)
    expected = F.grid_sample(maps, place, padding_mode="border", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(interpolate_at(maps, points, shape), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((interpolate_at(maps, points, shape) * weights).sum(), maps)
    (reference,) = torch.autograd.grad((expected * weights).sum(), maps)
    torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-5)


@dims
def test_voxel_centres_are_exact_also_in_half_precision(dim, both_ways):
    shape = SHAPES[dim]
    maps = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    points = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).flatten(0, -2)
    found = interpolate_at(maps, points[None].float(), shape)
    assert found.dtype == torch.float32
    assert torch.equal(found, maps.float().flatten(2).transpose(1, 2))


@dims
def test_corners_and_weights_are_those_of_interpolation(dim):
    """By the formula of ``test_interpolation_equals_the_formula``, of a map at full resolution, outside of it too."""
    shape = SHAPES[dim]
    maps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    points = torch.rand(2, 9, dim, generator=torch.Generator().manual_seed(1)) * (torch.tensor(shape) + 4) - 2
    points[0, 0], points[0, 1] = 0.0, torch.tensor(shape) - 1.0
    corners, weights = corner_points(points, shape)
    assert corners.shape == (2, 9, 2**dim, dim)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 9))
    assert (weights >= 0).all()
    for sample, point, channel in itertools.product(range(2), range(9), range(3)):
        total = 0.0
        for corner, weight in zip(corners[sample, point].tolist(), weights[sample, point].tolist(), strict=True):
            total += weight * float(maps[(sample, channel, *map(int, corner))])
        wanted = interpolate_at(maps, points, shape)[sample, point, channel].item()
        assert total == pytest.approx(wanted, abs=1e-5)


def test_an_axis_of_one_cell_is_constant():
    maps = torch.tensor([[[[1.0, 3.0]]]])
    found = interpolate_at(maps, torch.tensor([[[0.0, 0.5], [4.0, 0.5]]]), (5, 4))
    assert found.flatten().tolist() == pytest.approx([1.0, 1.0])


def test_foreground_is_what_is_brighter_than_the_patch():
    volumes = torch.full((2, 2, 3, 4, 5), -1.0)
    volumes[0, :, 1, 1:3, 2:4] = 2.0
    volumes[1, 0, 0] = 3.0
    mask = brighter_part(volumes)
    assert mask[0].sum() == 4
    assert mask[0, 1, 1:3, 2:4].all()
    assert mask[1, 0].all()
    assert not mask[1, 1:].any()


@pytest.mark.parametrize("dim", [2, 3])
def test_places_are_those_of_numpy_and_inside_is_between_the_outer_centres(dim):
    shape = SHAPES[dim]
    points = torch.stack([torch.randint(n, (3, 7)) for n in shape], dim=-1)
    assert torch.equal(place_of(points, shape), torch.tensor(np.ravel_multi_index(points.numpy().T, shape).T))
    last = torch.tensor(shape) - 1.0
    assert are_inside(torch.stack([torch.zeros(dim), last, last / 2])[None], shape).all()
    for axis in range(dim):
        step = torch.zeros(dim)
        step[axis] = 0.01
        assert not are_inside(torch.stack([-step, last + step])[None], shape).any()


def test_centres_of_cells_lie_in_the_middle_of_their_voxels():
    """Two cells of two voxels, and three of three; the last axis fastest."""
    centres = cell_centres_vox((2, 3), (4, 9))
    assert centres.tolist() == [[0.5, 1], [0.5, 4], [0.5, 7], [2.5, 1], [2.5, 4], [2.5, 7]]


def test_an_interpolation_takes_few_operations():
    """A GPU takes as long for a small operation as for a large one, and SAM interpolates ten times for each sample."""
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            counted.append(operation)
            return operation(*args, **(kwargs or {}))

    feature_map, points = torch.randn(2, 4, 3, 5, 4), torch.rand(2, 30, 3)
    interpolate_at(feature_map, points, (12, 20, 16))  # the lengths of the map are kept from now on
    with Count():
        interpolate_at(feature_map, points, (12, 20, 16))
    assert sum(not operation.is_view for operation in counted) < 50
