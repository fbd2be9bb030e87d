import pytest
import torch

from nnssl.errors import UserError
from nnssl.views.partners import check_pairs, pair_up, partners_in_batch


def test_partners_are_neighbours():
    assert pair_up(4) == ([0, 0, 2, 2], [1, 0, 3, 2])
    assert pair_up(5) == ([0, 0, 2, 2, 2], [1, 0, 3, 4, 2])
    assert pair_up(3) == ([0, 0, 0], [1, 2, 0])
    assert pair_up(1) == ([0], [0])


def test_in_an_even_batch_partners_are_each_others():
    found = partners_in_batch(6, torch.device("cpu"))
    assert found.tolist() == [1, 0, 3, 2, 5, 4]
    assert torch.equal(found[found], torch.arange(6))


@pytest.mark.parametrize(("batch", "processes", "wanted"), [(3, 1, 2), (1, 1, 2), (6, 2, 4), (2, 2, 4)])
def test_pairs_stay_in_one_process(batch, processes, wanted):
    check_pairs(wanted, processes)
    message = (
        f"batch_size must be a multiple of {2 * processes}, got {batch}: .*{processes} process.*set batch_size={wanted}"
    )
    with pytest.raises(UserError, match=message):
        check_pairs(batch, processes)
