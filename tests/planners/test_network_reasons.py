"""Reasons for the network: the text must follow the numbers."""

from pathlib import Path

import numpy as np
import pytest

from planners.network_reasons import explain_data_set, explain_network
from planners.presets import PRESETS

LIKE = Path("/x/Dataset004_Other/nnUNetPlans.json")


def data_set(spacing, cases, order=(0, 1, 2), schemes=("CTNormalization",), like=None, given=False):
    configuration = {"spacing": spacing, "normalization_schemes": schemes}
    nnunet = {"configurations": {"3d_fullres": configuration, "2d": {}}, "transpose_forward": list(order)}
    modalities = ["CT", "MRI", "PET"][: len(schemes)]
    found = explain_data_set(
        nnunet, np.array(cases), modalities, PRESETS["cpu"], like, {"3d_fullres": "set by the user"} if given else {}
    )
    return {what: (value, reason) for what, value, reason in found}


def test_spacing_is_explained_by_what_the_cases_have():
    same = data_set([2.5, 1, 1], [[2.5, 1, 1]] * 3)
    assert same["spacing"] == ("2.5 x 1 x 1 mm", "the same in all 3 cases")
    mixed = [[5, 0.8, 0.75], [5, 0.9, 0.9], [2.5, 0.7, 0.9]]
    median = data_set([5, 0.8, 0.9], mixed)["spacing"][1]
    assert median == "median of 3 cases (2.5 x 0.7 x 0.75 to 5 x 0.9 x 0.9 mm)"
    assert "10th percentile" in data_set([2.5, 0.8, 0.9], mixed)["spacing"][1]
    assert "10th percentile" not in data_set([10.0, 0.8, 0.9], mixed)["spacing"][1]  # given by the user, coarser
    given = data_set([2.5, 1, 1], [[2.5, 1, 1]], given=True)["spacing"][1]
    assert given == "set by the user; in the data: that of the only case"
    # a spacing finer than the median does not come from nnU-Net's percentile if the user has set it
    assert "10th percentile" not in data_set([2.5, 0.8, 0.9], mixed, given=True)["spacing"][1]
    assert data_set([2.5, 0.8, 0.9], mixed, like=LIKE)["spacing"][1] == "taken from Dataset004_Other/nnUNetPlans.json"


@pytest.mark.parametrize(("slice_mm", "apart"), [(3.0, False), (3.1, True), (1.0, False)])
def test_slices_more_than_three_times_as_thick_are_treated_separately(slice_mm, apart):
    value, reason = data_set([slice_mm, 1, 1], [[slice_mm, 1, 1]] * 2)["slice axis"]
    assert value == ("treated separately" if apart else "treated like the others")
    assert f"{slice_mm:g} mm and 1 mm {'differ by more than' if apart else 'are within'} a factor of 3" in reason


def test_single_slices_have_no_thickness():
    """nnU-Net's readers give them a distance of 999 times their spacing, which nobody measured."""
    nnunet = {
        "configurations": {"2d": {"spacing": [0.14, 0.15], "normalization_schemes": ["ZScoreNormalization"]}},
        "transpose_forward": [0, 1, 2],
    }
    cases = np.array([[999 * 0.15, 0.14, 0.15], [999 * 0.2, 0.12, 0.2], [999 * 0.15, 0.14, 0.15]])
    found = explain_data_set(nnunet, cases, ["X-ray"], PRESETS["cpu"], None, {}, single_slices=True)
    said = {what: (value, reason) for what, value, reason in found}
    assert said["slice axis"] == ("none", "every image is a single slice")
    assert said["spacing"] == ("0.14 x 0.15 mm", "median of 3 cases (0.12 x 0.15 to 0.14 x 0.2 mm)")
    assert said["normalisation of channel 0"][1].startswith("X-ray: arbitrary units")
    text = " ".join(word for each in found for word in each)
    assert "thick" not in text
    assert "149" not in text
    same = explain_data_set(nnunet, cases[[0, 2]], ["X-ray"], PRESETS["cpu"], None, {}, single_slices=True)
    assert dict((what, reason) for what, _, reason in same)["spacing"] == "the same in all 2 cases"


def test_axes_and_normalisation():
    said = data_set([5, 1, 1], [[5, 1, 1]], (2, 0, 1), ("CTNormalization", "ZScoreNormalization", "NoNormalization"))
    assert said["axis order"] == ("(2, 0, 1)", "axis of the largest spacing first")
    assert data_set([5, 1, 1], [[5, 1, 1]])["axis order"][1] == "as stored"
    for channel, (scheme, words) in enumerate(
        (
            ("CTNormalization", "CT: clipped"),
            ("ZScoreNormalization", "MRI: arbitrary"),
            ("NoNormalization", "PET: nnU"),
        )
    ):
        value, reason = said[f"normalisation of channel {channel}"]
        assert value == scheme
        assert reason.startswith(words)
    assert said["memory target"] == ("0.5 GB", "plain encoder with 16 features in the first stage")


@pytest.mark.parametrize(
    ("kernels", "words"),
    [([[3, 3, 3], [1, 3, 3]], "1 along the coarse axis"), ([3, [3] * 3], "similar"), ([[3, 3], 1], "1 along")],
)
def test_network(kernels, words):
    base = {
        "patch_size": [16, 64, 48],
        "batch_size": 2,
        "median_image_size_in_voxels": [20.4, 99.6, 80],
        "architecture": {
            "network_class_name": "a.b.PlainConvUNet",
            "arch_kwargs": {"strides": [[1, 1, 1], 2], "kernel_sizes": kernels},
        },
    }
    said = {what: (value, reason) for what, value, reason in explain_network(base, PRESETS["cpu"], None, None)}
    assert words in said["kernels"][1]
    assert said["patch (fine-tuning)"][0] == "16x64x48"
    assert "20x100x80" in said["patch (fine-tuning)"][1]
    assert said["strides"][0] == "1x1x1 2"
    assert said["backbone"][0] == "PlainConvUNet"
    assert "at most 5%" in said["batch size (fine-tuning)"][1]
    residual = {what: reason for what, _, reason in explain_network(base, PRESETS["24gb"], None, None)}
    assert "5%" not in residual["batch size (fine-tuning)"]
    taken = {reason for _, _, reason in explain_network(base, PRESETS["24gb"], LIKE, None)}
    assert taken == {"taken from Dataset004_Other/nnUNetPlans.json"}
