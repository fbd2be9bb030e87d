"""Crops, rotations, flips and intensity changes that suit the data."""

import random

import pytest

from nnssl.views.intensity import IntensityRange, restrict_to
from planners.view_rules import decide_crop, decide_flips, decide_intensity, decide_rotation, mean_overlap


@pytest.mark.parametrize(
    ("patch", "share"),
    [
        ((96, 128, 80), 0.2),  # RepRec's
        ((7, 128, 112), 0.2),  # 0.2 ^ (1/3) of 7 voxels are 4.1
        ((6, 128, 112), 0.2963),  # (4 / 6)^3
        ((5, 40, 64), 0.512),
        ((112, 5, 40), 0.512),  # whichever axis is the short one
        ((3, 256, 224), 1.0),  # no crop of four voxels lies in three
        ((128, 112), 0.2),
        ((8, 40), 0.25),
    ],
)
def test_crops_keep_four_voxels_of_the_shortest_axis(patch, share):
    chosen, overlap, reasons = decide_crop(patch)
    assert chosen == (share, 1.0)
    assert overlap == mean_overlap(share, len(patch))
    assert ("at least 4 voxels" in reasons[0][2]) == (share > 0.2)


@pytest.mark.parametrize(("low", "dimensions"), [(0.2, 3), (0.5, 3), (0.3, 2), (1.0, 2)])
def test_overlap_is_that_of_intervals_drawn_one_by_one(low, dimensions):
    draw = random.Random(1)
    total = 0.0
    for _ in range(1500):
        zooms = [draw.uniform(low, 1) ** (1 / dimensions) for _ in range(2)]
        common = 1.0
        for _ in range(dimensions):
            starts = [draw.uniform(0, 1 - zoom) for zoom in zooms]
            ends = [start + zoom for start, zoom in zip(starts, zooms, strict=True)]
            common *= max(0.0, min(ends) - max(starts))
        total += common / min(zooms) ** dimensions
    assert mean_overlap(low, dimensions) == pytest.approx(total / 1500, abs=0.03)


def test_nothing_is_turned_out_of_thick_slices():
    for axis in range(3):
        angles, reasons = decide_rotation(3, axis)
        assert angles == tuple(180.0 if other == axis else 0.0 for other in range(3))
        assert f"about axis {axis} only" in reasons[0][1]
    assert decide_rotation(3, None)[0] == (30.0, 30.0, 30.0)
    assert decide_rotation(2, None)[0] == (180.0,)


def test_flips_are_those_of_the_fine_plane():
    assert decide_flips(3)[0] == (1, 2)
    assert decide_flips(2)[0] == (0, 1)


def test_the_modality_decides_which_intensities_change():
    """Hounsfield units keep their order and meaning: no gamma, bias field or inversion. X-rays are taken without a coil."""
    ct, mr, x_ray = (set(decide_intensity([modality])[0]) for modality in ("CT", "MRI", "X-ray"))
    assert ct == {"contrast", "brightness", "noise", "blur", "window"}
    assert mr == {"contrast", "brightness", "noise", "blur", "gamma", "bias_field", "inversion"}
    assert x_ray == mr - {"bias_field"}
    for names in (ct, mr, x_ray):
        restrict_to(IntensityRange(), sorted(names))  # all are names of changes


@pytest.mark.parametrize(
    ("modalities", "word"),
    [
        (["X-ray"], "X-ray: exposure"),
        (["X-ray", "X-ray"], "X-ray: exposure"),
        (["X-ray", "MRI"], "MR: units"),
        (["X-ray", "CT"], "CT: Hounsfield"),
        (["PET"], "MR: units"),
    ],
)
def test_the_reason_names_the_modality(modalities, word):
    (reason,) = [reason for _, _, reason in decide_intensity(modalities)[1]]
    assert reason.startswith(word)
    assert ("coil sensitivity" in reason) == word.startswith("MR")
    assert ("MONOCHROME1" in reason) == word.startswith("X-ray")
