"""The mask in views, at points and for tokens, against lookups voxel by voxel."""

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.views.learnable import mask_at_points, mask_of_patches, mask_of_tokens, mask_of_view, mask_where_any
from nnssl.views.spatial import AffineRange, draw_affine, map_points

SHAPES = {2: (11, 18), 3: (5, 11, 8)}
SPACING_MM = {2: (1.0, 1.5), 3: (4.0, 1.0, 1.5)}
dims = pytest.mark.parametrize("dim", [2, 3])


def make_mask(dim: int) -> torch.Tensor:
    return torch.rand(3, *SHAPES[dim], generator=torch.Generator().manual_seed(0)) < 0.5


@dims
def test_a_voxel_of_a_view_has_the_mask_of_the_nearest_voxel_that_it_shows(dim):
    mask, shape = make_mask(dim), SHAPES[dim]
    ranges = AffineRange((0.3, 0.9), (40.0,) * (1 if dim == 2 else 3), tuple(range(dim)))
    params = draw_affine(sample_generators(0, "test", 0, range(3)), ranges, shape, SPACING_MM[dim])
    found = mask_of_view(mask, params)
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), dim=-1).flatten(0, -2)
    places = map_points(voxels.double().expand(3, -1, -1), params, "to_input")
    compared, beyond = 0, 0
    for sample in range(3):
        for voxel, place in zip(voxels.tolist(), places[sample].tolist(), strict=True):
            if any(abs(each % 1 - 0.5) < 1e-3 for each in place):
                continue  # two voxels are equally near
            nearest = [round(each) for each in place]
            inside = all(0 <= each < length for each, length in zip(nearest, shape, strict=True))
            assert bool(found[(sample, *voxel)]) == (inside and bool(mask[(sample, *nearest)]))
            compared, beyond = compared + 1, beyond + (not inside)
    assert compared > 0.9 * found.numel()
    assert beyond > 0


@dims
def test_the_mask_at_points_is_that_of_the_nearest_voxel(dim):
    mask, shape = make_mask(dim), SHAPES[dim]
    points = torch.rand(3, 40, dim, generator=torch.Generator().manual_seed(1)) * (torch.tensor(shape) + 2) - 1.5
    found = mask_at_points(mask, points)
    for sample in range(3):
        for index, point in enumerate(points[sample].tolist()):
            nearest = [min(max(round(each), 0), length - 1) for each, length in zip(point, shape, strict=True)]
            assert found[sample, index] == mask[(sample, *nearest)]


def test_a_view_without_voxels_that_count_keeps_all_valid_ones():
    valid = torch.ones(3, 4, 5, dtype=torch.bool)
    valid[:, 0] = False
    mask = torch.zeros_like(valid)
    mask[0, :2] = True  # five of them valid
    mask[1, 1, 3] = True
    mask[2, 0] = True  # none of them valid
    found = mask_where_any(valid, mask)
    assert torch.equal(found[:2], (valid & mask)[:2])
    assert torch.equal(found[2], valid[2])


@dims
def test_a_token_counts_if_half_of_its_voxels_do(dim):
    mask = torch.zeros(1, *((2, 4, 6)[-dim:]), dtype=torch.bool)
    mask[..., :2, 0] = True
    mask[..., :2, 2] = True
    mask[..., 0, 3] = True
    tokens = mask_of_tokens(mask, (1, 2, 3)[-dim:])
    assert tokens.tolist() == [[True, True, False, False, False, False]]


def test_without_a_mask_everything_counts():
    volumes = torch.randn(2, 3, 4, 5)
    assert torch.equal(mask_of_patches(None, volumes), torch.ones(2, 4, 5, dtype=torch.bool))
