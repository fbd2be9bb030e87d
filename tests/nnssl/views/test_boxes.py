"""Boxes against counting voxels one by one."""

import itertools

import pytest
import torch

from nnssl.views.boxes import (
    boxes_of_voxels,
    contains,
    intersect,
    intersection_over_union,
    overlap_share,
    to_mm,
    volume,
)

FIRST = boxes_of_voxels(
    torch.tensor([[0, 1, 2], [0, 0, 0], [1, 1, 1]]), torch.tensor([[3, 4, 5], [2, 2, 2], [5, 2, 3]])
)
SECOND = boxes_of_voxels(
    torch.tensor([[2, 0, 4], [3, 0, 0], [2, 1, 2]]), torch.tensor([[4, 3, 9], [1, 2, 3], [2, 1, 1]])
)


def voxels(boxes, row: int) -> set[tuple[int, ...]]:
    lower = (boxes.lower[row] + 0.5).int().tolist()
    size = boxes.size[row].int().tolist()
    return set(itertools.product(*(range(low, low + n) for low, n in zip(lower, size, strict=True))))


def test_volumes_and_shares_count_voxels():
    for row in range(3):
        a, b = voxels(FIRST, row), voxels(SECOND, row)
        assert volume(FIRST)[row] == len(a)
        assert volume(intersect(FIRST, SECOND))[row] == len(a & b)
        assert overlap_share(FIRST, SECOND)[row].item() == pytest.approx(len(a & b) / min(len(a), len(b)))
        assert intersection_over_union(FIRST, SECOND)[row].item() == pytest.approx(len(a & b) / len(a | b))


def test_intersection_lies_where_both_are():
    both = intersect(FIRST, SECOND)
    assert voxels(both, 0) == voxels(FIRST, 0) & voxels(SECOND, 0)
    assert voxels(both, 2) == voxels(SECOND, 2)


def test_points_inside():
    corners = torch.tensor([[[-0.5, 0.5, 1.5], [2.49, 4.49, 6.49], [2.5, 2, 3], [1, 1, 7], [0, 0.4, 3]]]).expand(
        3, -1, -1
    )
    assert contains(FIRST, corners)[0].tolist() == [True, True, False, False, False]


def test_millimetres():
    in_mm = to_mm(FIRST, (5.0, 0.5, 2.0))
    assert in_mm.lower[0].tolist() == [-2.5, 0.25, 3.0]
    assert volume(in_mm).tolist() == [volume_vox * 5.0 for volume_vox in volume(FIRST).tolist()]
    assert overlap_share(in_mm, to_mm(SECOND, (5.0, 0.5, 2.0))).tolist() == pytest.approx(
        overlap_share(FIRST, SECOND).tolist()
    )
