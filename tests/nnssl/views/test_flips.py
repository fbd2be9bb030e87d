import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.views.flips import apply_flips, check_flips, draw_flips


def test_only_allowed_axes_are_flipped_with_the_probability():
    generators = sample_generators(0, "flips", 0, list(range(500)))
    flips = draw_flips(generators, 3, (1, -1), 0.3)
    assert not flips[:, 0].any()
    assert (flips[:, 1:].float().mean(dim=0) > 0.24).all()
    assert (flips[:, 1:].float().mean(dim=0) < 0.36).all()
    assert not torch.equal(flips[:, 1], flips[:, 2])


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_every_sample_is_flipped_along_its_own_axes(shape):
    volumes = torch.randn(2, 2, *shape)
    flips = torch.zeros(2, len(shape), dtype=torch.bool)
    flips[0, 0] = flips[1, -1] = True
    made = apply_flips(volumes, flips)
    assert torch.equal(made[0], volumes[0].flip(1))
    assert torch.equal(made[1], volumes[1].flip(-1))
    assert torch.equal(apply_flips(made, flips), volumes)


def test_an_axis_that_the_patch_lacks_is_refused():
    check_flips(2, (0, -1))
    with pytest.raises(UserError, match="flip_axes must be axes of a patch of 2 axes, got 0,2"):
        check_flips(2, (0, 2))
