import pytest
import torch

from nnssl.errors import UserError
from nnssl.views.partners import check_pairs, of_other_pairs, pair_up, partners_in_batch, show_same_place


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


def test_patches_of_one_place_against_loops():
    """Of two processes with six patches each: boxes voxel by voxel, and pairs of which any two patches overlap."""
    generator = torch.Generator().manual_seed(0)
    size_mm = torch.tensor([6.0, 4.0, 10.0])
    scan = torch.randint(5, (12,), generator=generator)
    place_mm = torch.randint(0, 16, (12, 3), generator=generator).float()
    partner = partners_in_batch(6, torch.device("cpu"))
    all_partners = torch.cat([partner, 6 + partner])

    def voxels(index: int) -> set[tuple[int, ...]]:
        z, y, x = place_mm[index].int().tolist()
        box = (range(z, z + 6), range(y, y + 4), range(x, x + 10))
        return {(int(scan[index]), *vox) for vox in ((a, b, c) for a in box[0] for b in box[1] for c in box[2])}

    shown = [voxels(index) for index in range(12)]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    for one in range(12):
        for other in range(12):
            pairs = [(each, int(all_partners[each])) for each in (one, other)]
            expected[one, other] = any(shown[a] & shown[b] for a in pairs[0] for b in pairs[1])
    assert 0.2 < expected.float().mean() < 0.8
    for rank in (0, 1):
        own = slice(6 * rank, 6 * rank + 6)
        found = show_same_place(scan[own], place_mm[own], partner, scan, place_mm, all_partners, size_mm)
        assert torch.equal(found, expected[own])
        assert not (~found & ~of_other_pairs(partner, 12, rank)).any()  # a pair always shows its own place


def test_patches_a_patch_apart_show_other_places():
    place_mm = torch.tensor([[0.0, 0.0, 0.0], [6.0, 0.0, 0.0], [5.9, 3.9, 9.9], [0.0, 0.0, 0.0]])
    alone = torch.arange(4)
    scan = torch.tensor([7, 7, 7, 8])
    same = show_same_place(scan, place_mm, alone, scan, place_mm, alone, torch.tensor([6.0, 4.0, 10.0]))
    assert same.tolist() == [
        [True, False, True, False],
        [False, True, True, False],
        [True, True, True, False],
        [False, False, False, True],
    ]
