import numpy as np
import pytest

from nnssl.data.bounding_box import find_box


@pytest.mark.parametrize("shape", [(9, 6, 13), (5, 8), (11,)])
def test_the_box_reaches_from_the_first_to_the_last_true_element(shape):
    generator = np.random.default_rng(3)
    for share in (0.02, 0.1, 0.9):
        mask = generator.random(shape) < share
        mask[tuple(generator.integers(0, shape))] = True
        before = mask.copy()
        places = [place for place in np.ndindex(*shape) if mask[place]]
        ranges = [(min(axis), max(axis) + 1) for axis in zip(*places, strict=True)]
        assert find_box(mask) == tuple(slice(first, end) for first, end in ranges)
        np.testing.assert_array_equal(mask, before)
