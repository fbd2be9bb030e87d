"""Tensors made to fit another network answer as before, where there is an input that can show it."""

import pytest
import torch
import torch.nn.functional as F

from nnssl.weights.kernels import fit_input_channels, fit_kernel


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("policy", ["mean", "repeat"])
@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 5), (4, 7), (3, 3), (3, 1)])
def test_an_image_in_all_channels_is_answered_as_before(policy, old, new):
    weights, image = drawn(5, old, 3, 3), drawn(1, 1, 9, 8)
    fitted = fit_input_channels(weights, new, policy)
    assert fitted.shape == (5, new, 3, 3)
    if policy == "repeat" and new < old:
        assert torch.equal(fitted, weights[:, :new])
        return
    expected = F.conv2d(image.expand(1, old, -1, -1), weights)
    torch.testing.assert_close(F.conv2d(image.expand(1, new, -1, -1), fitted), expected)


def test_repeat_takes_channels_in_turn():
    weights = drawn(2, 2, 3, 3, 3)
    fitted = fit_input_channels(weights, 5, "repeat")
    for channel, (taken, shared_by) in enumerate([(0, 3), (1, 2), (0, 3), (1, 2), (0, 3)]):
        torch.testing.assert_close(fitted[:, channel], weights[:, taken] / shared_by)


@pytest.mark.parametrize(
    ("names", "new_names", "message"),
    [
        (None, ["CT"], "both sides name"),
        (["CT"], ["CT", "PET", "MR"], "both sides name"),
        (["CT", "ct"], ["CT", "PET"], "same name"),
        (["CT", "MR"], ["T1", "T2"], "no channel name in common"),
    ],
)
def test_channels_that_cannot_be_matched_by_name(names, new_names, message):
    with pytest.raises(ValueError, match=message):
        fit_input_channels(drawn(2, 2, 3, 3), 2, "named", names, new_names)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_longer_kernel_computes_the_same(stride):
    weights, volume = drawn(3, 2, 1, 3, 3), drawn(1, 2, 6, 8, 7)
    fitted = fit_kernel(weights, (3, 3, 5), transposed=False)
    expected = F.conv3d(volume, weights, stride=stride, padding=(0, 1, 1))
    torch.testing.assert_close(F.conv3d(volume, fitted, stride=stride, padding=(1, 1, 2)), expected)


def test_a_kernel_cut_to_one_voxel_answers_a_constant_axis_as_before():
    weights, image = drawn(3, 2, 3, 3, 3), drawn(1, 2, 8, 7)
    volume = image[:, :, None].expand(-1, -1, 5, -1, -1)
    expected = F.conv3d(volume, weights)[:, :, 1]
    torch.testing.assert_close(F.conv3d(volume, fit_kernel(weights, (1, 3, 3), transposed=False))[:, :, 1], expected)
    torch.testing.assert_close(F.conv2d(image, fit_kernel(weights, (3, 3), transposed=False)), expected)


def test_upsampling_is_repeated_or_averaged():
    """A transposed convolution whose kernel is its stride writes every output voxel once."""
    weights, volume = drawn(2, 3, 1, 2, 2), drawn(1, 2, 4, 3, 5)
    fitted = fit_kernel(weights, (2, 2, 2), transposed=True)
    coarse = F.conv_transpose3d(volume, weights, stride=(1, 2, 2))
    fine = F.conv_transpose3d(volume, fitted, stride=(2, 2, 2))
    torch.testing.assert_close(fine, coarse.repeat_interleave(2, dim=2))
    back = F.conv_transpose3d(volume, fit_kernel(fitted, (1, 2, 2), transposed=True), stride=(1, 2, 2))
    torch.testing.assert_close(back, coarse)


def test_what_has_no_faithful_way():
    assert fit_kernel(drawn(2, 2, 5, 5, 5), (3, 3, 3), transposed=False) is None
    assert fit_kernel(drawn(2, 2, 3, 3), (2, 2), transposed=False) is None
    assert fit_kernel(drawn(2, 2, 3, 3), (4, 4), transposed=False) is None  # there is no middle to put it in
    assert fit_kernel(drawn(2, 2, 2, 2), (4, 4), transposed=True) is None
