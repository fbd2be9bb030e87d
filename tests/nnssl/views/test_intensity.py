"""Each change against NumPy and SciPy on one row at a time; draws that repeat; inputs that stay as they are."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity, even_blur, restrict_to
from nnssl.views.intensity_changes import (
    add_noise,
    blur,
    change_gamma,
    invert_contrast,
    jitter_window,
    multiply_bias_field,
    percentiles,
    scale_contrast,
    shift_brightness,
    values_of_ranks,
)

SHAPES = [(5, 9, 6), (11, 7)]
NAMES = ("bias_field", "inversion", "window", "contrast", "brightness", "gamma", "blur", "noise")
ALWAYS = replace(IntensityRange(), **{f"{name}_probability": 1.0 for name in NAMES})


def generators(samples=range(5), step: int = 0):
    return sample_generators(9, "intensity", step, list(samples))


@pytest.fixture(params=SHAPES, ids=["3d", "2d"])
def rows(request) -> torch.Tensor:
    """Return three rows of different mean, scale and skew."""
    noise = torch.randn(3, *request.param, generator=torch.Generator().manual_seed(0))
    return torch.stack([noise[0], 3 * noise[1] + 5, noise[2].exp() - 1])


def batch(shape, channels: int = 2) -> torch.Tensor:
    return torch.randn(5, channels, *shape, generator=torch.Generator().manual_seed(2))


def check(changed: torch.Tensor, rows: torch.Tensor, slow) -> None:
    for row in range(len(rows)):
        wanted = slow(rows[row].double().numpy(), row)
        np.testing.assert_allclose(changed[row].numpy(), wanted, atol=2e-5, rtol=1e-5)


def test_contrast(rows):
    factor = torch.tensor([0.6, 1.4, 1.0])
    check(scale_contrast(rows, factor), rows, lambda x, row: x.mean() + factor[row].item() * (x - x.mean()))


def test_brightness(rows):
    shift = torch.tensor([-0.4, 0.3, 0.1])
    check(shift_brightness(rows, shift), rows, lambda x, row: x + shift[row].item() * x.std())


def test_gamma_keeps_the_range(rows):
    gamma = torch.tensor([0.7, 1.5, 1.1])

    def slow(x, row):
        return x.min() + np.ptp(x) * ((x - x.min()) / np.ptp(x)) ** gamma[row].item()

    changed = change_gamma(rows, gamma)
    check(changed, rows, slow)
    torch.testing.assert_close(changed.flatten(1).amax(1), rows.flatten(1).amax(1))


def test_inversion(rows):
    check(invert_contrast(rows), rows, lambda x, _: np.percentile(x, 1) + np.percentile(x, 99) - x)


def test_percentiles_do_not_depend_on_how_they_are_selected():
    """Ties, one voxel, and a type that is not sorted by NumPy."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(3, 40, 30, generator=generator)
    rows[0, :30] = -1.25
    rows[1] = 2.0
    shares = (0.0, 0.01, 0.5, 0.99, 1.0)
    expected = np.percentile(rows.numpy().reshape(3, -1), [100 * share for share in shares], axis=1).T
    np.testing.assert_allclose(percentiles(rows, shares).numpy(), expected, rtol=1e-6)
    for values, ranks in ((rows.flatten(1), (0, 12, 1199)), (rows[:, :1, 0], (0,))):
        assert torch.equal(values_of_ranks(values, ranks).double(), values_of_ranks(values.double(), ranks))
    assert torch.equal(percentiles(rows[:, :1, :1], shares), rows[:, :1, 0].expand(3, 5))


def test_inversion_of_a_large_volume_uses_close_percentiles():
    volume = torch.randn(1, 64, 80, 96, generator=torch.Generator().manual_seed(4)) ** 2
    total = np.percentile(volume.numpy(), 1) + np.percentile(volume.numpy(), 99)
    assert (invert_contrast(volume) + volume).mean().item() == pytest.approx(total, rel=0.02)


def test_window(rows):
    shifts = torch.tensor([[0.3, -0.2], [-0.25, 0.3], [0.9, -0.9]])

    def slow(x, row):
        low, high = x.min() + shifts[row, 0].item() * x.std(), x.max() + shifts[row, 1].item() * x.std()
        return x.min() + np.ptp(x) * (np.clip(x, low, high) - low) / (high - low)

    check(jitter_window(rows, shifts), rows, slow)


def test_blur_is_scipys_along_every_axis(rows):
    dimensions = rows.ndim - 1
    sigma = torch.tensor([[0.5, 1.2, 0.8], [1.3, 0.4, 1.0], [0.0, 0.9, 0.0]])[:, :dimensions]
    radius = (4, 4, 3)[:dimensions]

    def slow(x, row):
        for axis in range(dimensions):
            if sigma[row, axis] > 0:
                width = sigma[row, axis].item()
                x = gaussian_filter1d(x, width, axis, mode="nearest", radius=radius[axis])
        return x

    check(blur(rows, sigma, radius), rows, slow)
    assert torch.equal(blur(rows, torch.zeros(3, dimensions), radius), rows)


def test_noise_has_the_drawn_scale_and_its_own_seed():
    rows = torch.randn(3, 30, 40, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 2]).view(
        3, 1, 1, 1
    )
    noise = add_noise(rows, torch.tensor([0.2, 0.1, 0.0]), [11, 12, 13]) - rows
    assert noise[0].std().item() == pytest.approx(0.2, rel=0.03)
    assert noise[1].std().item() == pytest.approx(0.5, rel=0.03)
    assert (noise[2] == 0).all()
    alone = add_noise(rows[1:2], torch.tensor([0.1]), [12]) - rows[1:2]
    assert torch.equal(alone[0], noise[1])
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.03


def test_every_channel_and_every_draw_has_noise_of_its_own():
    ranges = restrict_to(IntensityRange(noise_probability=1.0), ["noise"])
    volumes = torch.randn(1, 1, 20, 30, generator=torch.Generator().manual_seed(0)).expand(3, 2, -1, -1)
    noise = (apply_intensity(volumes, draw_intensity(generators(range(3)), ranges, 2)) - volumes).flatten(0, 1)
    correlation = np.corrcoef(noise.flatten(1).numpy()) - np.eye(6)
    assert np.abs(correlation).max() < 0.2


def test_bias_field_is_the_exponential_of_a_polynomial(rows):
    coefficients = torch.rand(3, 19, generator=torch.Generator().manual_seed(1)) - 0.5
    exponents = [(a, b, c) for a in range(4) for b in range(4) for c in range(4) if 1 <= a + b + c <= 3]

    def slow(x, row):
        axes = [(2 * np.arange(n) + 1) / n - 1 for n in x.shape]
        grid = np.meshgrid(*axes, indexing="ij")
        if x.ndim == 2:
            grid = [np.zeros_like(x), *grid]
        field = np.zeros_like(x)
        for value, (a, b, c) in zip(coefficients[row].tolist(), exponents, strict=True):
            field += value * grid[0] ** a * grid[1] ** b * grid[2] ** c
        return x.min() + (x - x.min()) * np.exp(field)

    check(multiply_bias_field(rows, coefficients), rows, slow)


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_history_replays_bit_equal_and_leaves_its_input(shape):
    volumes = batch(shape)
    before = volumes.clone()
    first = apply_intensity(volumes, draw_intensity(generators(), IntensityRange(), 2))
    second = apply_intensity(volumes, draw_intensity(generators(), IntensityRange(), 2))
    assert torch.equal(first, second)
    assert torch.equal(volumes, before)
    assert not torch.equal(first, apply_intensity(volumes, draw_intensity(generators(step=1), IntensityRange(), 2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_does_not_depend_on_its_batch(shape):
    volumes = batch(shape)
    together = apply_intensity(volumes, draw_intensity(generators(), ALWAYS, 2))
    alone = apply_intensity(volumes[3:4], draw_intensity(generators([3]), ALWAYS, 2))
    torch.testing.assert_close(together[3:4], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_change_alone_is_drawn_as_among_the_others_and_spares_other_channels(name):
    volumes = batch((5, 9, 6))
    half = replace(ALWAYS, **{f"{name}_probability": 0.5})
    among, alone = (draw_intensity(generators(), r, 2) for r in (half, restrict_to(half, [name])))
    assert list(alone.changes) == [name]
    assert alone.changes[name].rows == among.changes[name].rows
    assert torch.equal(alone.changes[name].values, among.changes[name].values)
    assert 0 < len(alone.changes[name].rows) < 10
    changed = apply_intensity(volumes, alone).flatten(0, 1)
    same = {row for row, volume in enumerate(volumes.flatten(0, 1)) if torch.equal(changed[row], volume)}
    drawn = set(alone.changes[name].rows)
    assert set(range(10)) - drawn <= same
    assert len(same & drawn) <= 1  # a drawn sigma of 0.02 voxels blurs nothing


def test_drawn_values_fill_their_ranges():
    drawn = draw_intensity(generators(range(400)), ALWAYS, 1).changes
    assert list(drawn) == list(NAMES)
    wanted = {"contrast": (0.6, 1.4), "brightness": (-0.4, 0.4), "gamma": (0.7, 1.5), "bias_field": (-0.3, 0.3)}
    wanted |= {"window": (-0.3, 0.3), "blur": (0.0, 1.0)}
    for name, (low, high) in wanted.items():
        values = drawn[name].values
        assert low <= values.min() < low + 0.05 * (high - low), name
        assert high - 0.05 * (high - low) < values.max() <= high, name
    assert drawn["gamma"].values.log().mean().item() == pytest.approx(np.log(0.7 * 1.5) / 2, abs=0.03)
    assert 0.19 < drawn["noise"].values[:, 0].max() <= 0.2
    assert len(set(drawn["noise"].values[:, 1].tolist())) == 400


def test_whether_a_channel_is_changed_has_nothing_to_do_with_the_values_of_another_change():
    half = replace(ALWAYS, **{f"{name}_probability": 0.5 for name in NAMES})
    drawn = draw_intensity(generators(range(500)), half, 1).changes
    for name, other in itertools.permutations(NAMES, 2):
        chosen = np.isin(drawn[name].rows, drawn[other].rows)
        for values in drawn[name].values.numpy().T:
            assert abs(np.corrcoef(values, chosen)[0, 1]) < 0.3, (name, other)


def test_probabilities_are_met():
    drawn = draw_intensity(generators(range(800)), IntensityRange(), 2).changes
    for name, probability in {"bias_field": 0.5, "inversion": 0.35, "contrast": 1.0, "noise": 0.3}.items():
        assert len(drawn[name].rows) / 1600 == pytest.approx(probability, abs=0.05), name


def test_blur_differs_between_axes_when_its_range_does():
    thick = replace(restrict_to(ALWAYS, ["blur"]), blur_vox=(0.0, 1.0, 2.0))
    params = draw_intensity(generators(), thick, 1)
    values = params.changes["blur"].values
    assert params.blur_radius_vox == (0, 3, 6)
    assert (values[:, 0] == 0).all()
    torch.testing.assert_close(values[:, 2], 2 * values[:, 1])
    plane = batch((8, 9), 1)
    row = params.changes["blur"].rows[0]
    wanted = gaussian_filter1d(plane[row, 0].double().numpy(), values[0, 1].item(), 0, mode="nearest", radius=3)
    wanted = gaussian_filter1d(wanted, values[0, 2].item(), 1, mode="nearest", radius=6)
    np.testing.assert_allclose(apply_intensity(plane, params)[row, 0].numpy(), wanted, atol=1e-5)


def test_even_blur_is_as_wide_in_mm_along_every_axis():
    """Spacing 6 x 1 x 1.5 mm: a sixth of a voxel's along z."""
    assert even_blur(1.2, (6.0, 1.0, 1.5)) == pytest.approx((0.2, 1.2, 0.8))
    assert even_blur(1.2, (1.0, 1.5))[1:] == pytest.approx((1.2, 0.8))


def test_off_by_probability_is_off():
    off = replace(ALWAYS, contrast_probability=0.0, blur_probability=0.0, gamma_probability=0.0, noise_probability=0.0)
    drawn = draw_intensity(generators(), off, 1).changes
    assert list(drawn) == ["bias_field", "inversion", "window", "brightness"]
    none = draw_intensity(generators(), restrict_to(ALWAYS, []), 2)
    volumes = batch((4, 5))
    assert torch.equal(apply_intensity(volumes, none), volumes)


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_channels_stay_finite(shape):
    volumes = torch.full((5, 2, *shape), 3.7)
    assert torch.isfinite(apply_intensity(volumes, draw_intensity(generators(), ALWAYS, 2))).all()


def test_mixed_precision_changes_nothing():
    volumes, params = batch((5, 9, 6)), draw_intensity(generators(), ALWAYS, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changed = apply_intensity(volumes, params)
    assert torch.equal(changed, apply_intensity(volumes, params))


def test_errors():
    with pytest.raises(UserError, match="'saturation'.*contrast"):
        restrict_to(IntensityRange(), ["contrast", "saturation"])
    for wrong in (replace(ALWAYS, window_std=1.0), replace(ALWAYS, contrast=1.2), replace(ALWAYS, gamma=(0.0, 1.0))):
        with pytest.raises(ValueError, match="must be"):
            draw_intensity(generators(), wrong, 1)
    with pytest.raises(ValueError, match="of volumes must be"):
        apply_intensity(batch((4, 5)), draw_intensity(generators(), ALWAYS, 1))
