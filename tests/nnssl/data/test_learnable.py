"""The mask of what may be learned from, on phantoms of a body in noisy air, and its resampling against loops."""

import numpy as np
import pytest

from nnssl.data.learnable import fill_slices, learnable_mask, resample_mask

SHAPE, SPACING_MM = (30, 90, 70), (5.0, 2.0, 2.5)


def make_body(air: float = 0.0, noise: float = 8.0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A body of 300 with dim fat of 120, lungs open to the last slice, gas, a table, all in noisy air."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")

    def ellipse(at_y, at_x, by_y, by_x):
        return ((y - at_y) / by_y) ** 2 + ((x - at_x) / by_x) ** 2 < 1

    parts = {"body": ellipse(45, 36, 33, 26), "inner": ellipse(45, 36, 27, 20)}
    parts["lung"] = ellipse(45, 28, 16, 8) & (z > 14)  # reaches the end of the volume
    parts["gas"] = ellipse(52, 42, 5, 6) & (z > 4) & (z < 9)
    parts["table"] = (y > 84) & (y < 88) & (x > 20) & (x < 50)
    volume = np.full(SHAPE, air)
    volume[parts["body"]] = 120
    volume[parts["inner"]] = 300
    volume[parts["lung"] | parts["gas"]] = air
    volume[parts["table"]] = 200
    return (volume + np.abs(rng.normal(0, noise, SHAPE))).astype(np.float32), parts


def check_body(mask: np.ndarray, body: np.ndarray) -> None:
    """The whole body counts, and of the air only what lies within a block of it or in a narrow gap."""
    assert mask[body].all()
    assert (mask & ~body).sum() < 0.12 * body.sum()


def test_air_inside_the_body_belongs_to_it_and_dim_fat_and_the_table_are_told_apart():
    volume, parts = make_body()
    mask = learnable_mask(volume[None], SPACING_MM)
    check_body(mask, parts["body"])
    assert not mask[parts["table"]].any()


def test_air_at_one_value_is_filled_within_the_body_too():
    """As in a CT whose lowest values were clipped, with blank slices at its end that the lungs touch."""
    volume, parts = make_body(noise=0.0)
    volume[-2:] = 0
    mask = learnable_mask(volume[None] - 1000, SPACING_MM)
    body = parts["body"].copy()
    body[-2:] = False
    check_body(mask, body)
    assert not mask[-2:].any()


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.5, 1.0), (2.0, 2.0, 2.0), (10.0, 2.5, 2.0), (4.0, 3.5, 4.0)])
@pytest.mark.parametrize("kind", ["CT", "MR"])
def test_noisy_air_is_outside_at_every_spacing(spacing_mm, kind):
    """Large voxels are blocks of their own, whose noise is not averaged; without dim tissue nothing separates its upper half."""
    shape = tuple(round(length / mm) for length, mm in zip((110, 120, 130), spacing_mm, strict=True))
    rng, places = np.random.default_rng(0), np.indices(shape)
    radii = [(place - length / 2) / (0.3 * length) for place, length in zip(places, shape, strict=True)]
    body = sum(radius**2 for radius in radii) < 1
    if kind == "CT":
        volume = np.where(body, 40, -1000) + rng.normal(0, 20, shape)
    else:
        volume = np.hypot(np.where(body, 100, 0) + rng.normal(0, 5, shape), rng.normal(0, 5, shape))
    mask = learnable_mask(volume[None].astype(np.float32), spacing_mm)
    assert (mask & ~body).sum() < 0.1 * (~body).sum()
    assert (~mask & body).sum() < 0.01 * body.sum()


@pytest.mark.parametrize("lowest", [0.0, -1000.0])
@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_a_defaced_region_is_outside_and_a_hole_of_the_same_value_is_not(noise, lowest):
    volume, parts = make_body(noise=noise)
    volume += lowest
    face = np.zeros(SHAPE, bool)
    face[8:22, :24, 18:50] = True  # enclosed by tissue in slices along y, open to the air in front
    hole = np.zeros(SHAPE, bool)
    hole[10:20, 60:70, 30:44] = True
    volume[face | hole] = lowest
    mask = learnable_mask(volume[None], SPACING_MM)
    assert not mask[face].any()
    check_body(mask, parts["body"] & ~face)
    assert mask[hole].all()


def test_an_image_without_air_counts_as_a_whole_but_not_its_padding():
    rng = np.random.default_rng(1)
    volume = rng.normal(100, 15, (1, 30, 40, 36)).astype(np.float32)
    assert learnable_mask(volume, (1.0, 1.0, 1.2)).all()
    volume[0, 15, 20, 18] = 0  # a single dark voxel is no padding
    hole = (0, slice(10, 22), slice(10, 22), slice(10, 22))
    volume[hole] = 0
    assert learnable_mask(volume, (1.0, 1.0, 1.2)).all()
    volume[0, :, :12] = 0
    volume[0, :, :, 24:] = 0
    mask = learnable_mask(volume, (1.0, 1.0, 1.2))
    assert not mask[:, :12].any()
    assert not mask[:, :, 24:].any()
    assert mask[:, 23:, :9].all()


def test_a_skull_stripped_image_keeps_its_dark_rim():
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, length) for length in (40, 50, 44)), indexing="ij")
    radius = np.sqrt((z / 0.7) ** 2 + (y / 0.8) ** 2 + (x / 0.7) ** 2)
    rng = np.random.default_rng(2)
    volume = np.where(radius < 0.9, 300.0, 60.0) + rng.normal(0, 8, radius.shape)
    volume[radius > 1] = 0
    mask = learnable_mask(volume[None].astype(np.float32), (3.0, 3.0, 3.0))
    assert mask[radius <= 1].all()
    assert mask[radius > 1.3].mean() < 0.01


def test_padding_far_below_air_is_not_taken_for_the_air():
    """As in a CT whose round field of view lies in a square of -3024."""
    volume, parts = make_body()
    volume = 4 * volume - 1000
    z, y, x = np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")
    beyond = ((y - 45) / 45) ** 2 + ((x - 36) / 34) ** 2 > 1
    volume[beyond] = -3024
    mask = learnable_mask(volume[None], SPACING_MM)
    check_body(mask, parts["body"] & ~beyond)
    assert not mask[beyond].any()


def test_a_volume_without_contrast_counts_everywhere():
    assert learnable_mask(np.full((1, 4, 5, 6), 7.0, np.float32), (1.0, 1.0, 1.0)).all()
    assert learnable_mask(np.zeros((2, 4, 5, 6), np.float32), (1.0, 1.0, 1.0)).all()


def test_a_single_slice_has_a_mask():
    volume, parts = make_body()
    for z in (2, 20):
        mask = learnable_mask(volume[None, z : z + 1], (999 * 2.5, *SPACING_MM[1:]))
        check_body(mask[0], parts["body"][z])


def enclosed_by_flood(mask: np.ndarray) -> np.ndarray:
    """What a flood from the border of a slice does not reach, voxel by voxel."""
    reached = np.zeros_like(mask)
    edge = [(i, j) for i, j in np.ndindex(*mask.shape) if i in (0, mask.shape[0] - 1) or j in (0, mask.shape[1] - 1)]
    while edge:
        i, j = edge.pop()
        if 0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] and not mask[i, j] and not reached[i, j]:
            reached[i, j] = True
            edge += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return ~reached


def test_filled_slices_are_those_that_a_flood_does_not_reach():
    mask = np.random.default_rng(3).random((5, 9, 7)) < 0.62
    expected = mask.copy()
    for axis in range(3):
        for place in range(mask.shape[axis]):
            index = tuple(place if each == axis else slice(None) for each in range(3))
            expected[index] |= enclosed_by_flood(mask[index])
    assert expected.sum() > mask.sum()
    np.testing.assert_array_equal(fill_slices(mask), expected)


@pytest.mark.parametrize("shape", [(5, 9, 7), (3, 20, 11), (12, 4, 7), (1, 1, 30)])
def test_resampling_takes_the_nearest_voxel(shape):
    mask = np.random.default_rng(4).random((5, 9, 7)) < 0.5
    found = resample_mask(mask, shape)
    assert found.shape == shape
    for index in np.ndindex(*shape):
        nearest = []
        for place, wanted, length in zip(index, shape, mask.shape, strict=True):
            centre = (place + 0.5) / wanted * length  # of the voxel, from the border of the field of view
            nearest.append(min(range(length), key=lambda voxel: (abs(voxel + 0.5 - centre), -voxel)))
        assert found[index] == mask[tuple(nearest)]


@pytest.mark.parametrize("exponent", [70, 119, -110])
def test_the_mask_does_not_depend_on_the_unit_of_intensities(exponent):
    """Sums of blocks of extreme intensities would leave the range of float32."""
    volume = make_body()[0][None]
    with np.errstate(over="raise", invalid="raise"):
        found = learnable_mask(np.ldexp(volume, exponent), (1.0, 1.0, 1.0))
    expected = learnable_mask(volume, (1.0, 1.0, 1.0))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(found, expected)
