"""Label maps on the grids of the image and of the preprocessed case: a known voxel moves there and back."""

from pathlib import Path

import numpy as np
import pytest

from nnssl.data.bounding_box import find_box
from nnssl.propagation.grids import ImageGrid, LabelResampling, to_case, to_image

SHAPE = (7, 10, 12)


class Stored:
    name = "a"

    def __init__(self, shape, spacing_mm):
        self.shape, self.spacing_mm = shape, spacing_mm


def resize_by_nnunet(labels: bool):
    from functools import partial

    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    return partial(resample_data_or_seg_to_shape, is_seg=labels, order=1, order_z=0, force_separate_z=None)


def make_grid(order, spacing_mm=(3.0, 1.0, 1.5)) -> tuple[ImageGrid, LabelResampling]:
    image = np.zeros(SHAPE)
    image[1:6, 2:10, 3:11] = 1  # cropped on other sides of every axis
    box = find_box(image.transpose(order) != 0)
    resampling = LabelResampling(order, resize_by_nnunet(True), resize_by_nnunet(False))
    return ImageGrid(Path("a"), SHAPE, spacing_mm, box, {}), resampling


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_labels_come_back_exactly_without_resampling(order):
    grid, resampling = make_grid(order)
    cropped = tuple(part.stop - part.start for part in grid.box)
    case = Stored(cropped, tuple(grid.spacing_mm[axis] for axis in order))
    labels = np.zeros(SHAPE, np.int64)
    labels[1:6, 2:10, 3:11] = np.random.default_rng(0).integers(0, 3, (5, 8, 8))
    there = to_case(labels, grid, case, resampling)
    voxel = (4, 5, 9)  # moved by the crop, then by the order of the axes
    moved = tuple((np.array(voxel) - (1, 2, 3))[list(order)])
    assert there[moved] == labels[voxel]
    assert np.array_equal(to_image(np.moveaxis(np.eye(3)[there], -1, 0), grid, case, resampling), labels)


def test_a_box_comes_back_up_to_resampling():
    order = (2, 0, 1)
    grid, resampling = make_grid(order)
    case = Stored((12, 8, 5), (1.0, 1.875, 1.6))
    labels = np.zeros(SHAPE, np.int64)
    labels[2:5, 4:9, 5:10] = 2
    there = to_case(labels, grid, case, resampling)
    back = to_image(np.moveaxis(np.eye(3)[there], -1, 0), grid, case, resampling)
    assert back.shape == SHAPE
    common = ((back == 2) & (labels == 2)).sum()
    assert 2 * common / ((back == 2).sum() + (labels == 2).sum()) > 0.8
    assert not back[:1].any()
    assert not back[..., :3].any()
