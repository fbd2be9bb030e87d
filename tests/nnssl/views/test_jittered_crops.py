"""A pair of views equals two crops with jitter, drawn one after the other."""

import pytest
import torch

from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity
from nnssl.views.jittered_crops import jittered_crop_pair
from nnssl.views.spatial import AffineRange, apply_affine, draw_affine


@pytest.mark.parametrize(("shape", "spacing_mm"), [((5, 9, 12), (3.0, 1.0, 0.8)), ((10, 14), (1.5, 0.7))])
def test_equals_two_draws_in_a_row(shape, spacing_mm):
    volumes = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(0))
    crop, changes = AffineRange((0.3, 0.8), flip_axes=(-1,)), IntensityRange()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]

    drawn = generators()
    expected = []
    for _ in range(2):
        params = draw_affine(drawn, crop, shape, spacing_mm)
        expected.append(apply_intensity(apply_affine(volumes, params), draw_intensity(drawn, changes, 2)))
    first, second = jittered_crop_pair(volumes, generators(), crop, changes, spacing_mm)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert not torch.equal(first, second)
