"""Tone curves against de Casteljau's construction, and what they keep of an image."""

import numpy as np
import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.views.tone_curves import TABLE_LENGTH, ToneCurves, apply_tone_curves, bezier_curve, draw_tone_curves


def generators(samples: range) -> list[torch.Generator]:
    return sample_generators(0, "tone curves", 0, list(samples))


def casteljau(points: np.ndarray, t: float) -> np.ndarray:
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def test_curve_is_that_of_de_casteljau_and_never_falls():
    inner = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner[0] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # the steepest and flattest that the unit square allows
    inputs, outputs = bezier_curve(inner)
    for row in range(3):
        points = np.array([[0.0, 0.0], *inner[row].tolist(), [1.0, 1.0]])
        for place in (0, 100, 512, 1024):
            expected = casteljau(points, place / 1024)
            assert np.allclose([inputs[row, place], outputs[row, place]], expected, atol=1e-12)
    assert (inputs.diff(dim=-1) >= -1e-12).all()
    assert (outputs.diff(dim=-1) >= -1e-12).all()


def test_tables_lead_from_end_to_end_and_half_of_them_fall():
    curves = draw_tone_curves(generators(range(400)), 2, 0.9, 0.5)
    ends = curves.table[..., [0, -1]].flatten(0, 1)
    falls = ends[:, 0] > 0.5
    assert torch.equal(ends[~falls], torch.tensor([[0.0, 1.0]]).expand(int((~falls).sum()), -1))
    assert torch.equal(ends[falls], torch.tensor([[1.0, 0.0]]).expand(int(falls.sum()), -1))
    assert 0.43 < falls.float().mean() < 0.57
    assert 0.85 < curves.used.mean() < 0.95
    rising = draw_tone_curves(generators(range(20)), 1, 1.0, 0.0)
    assert (rising.table.diff(dim=-1) >= -1e-6).all()
    assert rising.used.all()


@pytest.mark.parametrize("shape", [(12, 20), (4, 12, 20)])
def test_known_curves_change_intensities_as_expected(shape):
    volumes = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(1))
    steps = torch.linspace(0, 1, TABLE_LENGTH)
    table = torch.stack([steps, 1 - steps, steps.square()])[:, None].expand(3, 2, -1)
    made = apply_tone_curves(volumes, ToneCurves(table, torch.ones(3)))
    for sample, channel in ((0, 0), (1, 1), (2, 0)):
        values = volumes[sample, channel].double()
        low, high = np.quantile(values, (0.01, 0.99))
        share = ((values - low) / (high - low)).clamp(0, 1)
        expected = (share, 1 - share, share**2)[sample] * (high - low) + low
        torch.testing.assert_close(made[sample, channel].double(), expected, atol=1e-4, rtol=1e-4)
    unused = apply_tone_curves(volumes, ToneCurves(table, torch.tensor([1.0, 0.0, 1.0])))
    assert torch.equal(unused[1], volumes[1])
    assert torch.equal(unused[0], made[0])


def test_a_sample_does_not_depend_on_the_batch_and_a_constant_patch_stays_finite():
    volumes = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    volumes[3] = 0.5
    together = apply_tone_curves(volumes, draw_tone_curves(generators(range(4)), 1, 1.0, 0.5))
    alone = apply_tone_curves(volumes[2:3], draw_tone_curves(generators(range(2, 3)), 1, 1.0, 0.5))
    torch.testing.assert_close(together[2:3], alone)
    torch.testing.assert_close(together[3], volumes[3])


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"falling_share must be within \[0, 1\], got 2.0"):
        draw_tone_curves(generators(range(1)), 1, 1.0, 2.0)
    with pytest.raises(ValueError, match="as drawn, got a batch of"):
        apply_tone_curves(torch.zeros(2, 1, 8, 8), draw_tone_curves(generators(range(1)), 1, 1.0, 0.5))


def test_a_patch_of_air_keeps_its_little_tissue():
    volumes = torch.zeros(1, 1, 40, 40)
    volumes[0, 0, :3, :3] = 2.0  # less than 1 %
    made = apply_tone_curves(volumes, draw_tone_curves(generators(range(1)), 1, 1.0, 0.0))
    assert torch.equal(made, volumes)
