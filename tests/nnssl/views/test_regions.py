"""Regions of points against a slow assignment."""

import torch

from nnssl.views.regions import assign_regions


def draw(batch=3, reference=60, query=40, kinds=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, kinds, (batch, reference + query), generator=generator, dtype=torch.int32)
    salt = torch.randint(2**30, (batch,), generator=generator)
    return ids[:, :reference], ids[:, reference:], salt


def test_points_of_a_supervoxel_share_a_region():
    reference, query, salt = draw()
    found = assign_regions(reference, query, salt, most=5, least_points=3)
    for sample in range(3):
        own = reference[sample].tolist()
        counts = {each: own.count(each) for each in set(own) if each}
        allowed = {each for each, count in counts.items() if count >= 3}
        region_of = {}
        for point, each in enumerate(own):
            region = int(found.reference[sample, point])
            assert region_of.setdefault(each, region) == region
        chosen = {each: region for each, region in region_of.items() if region >= 0}
        assert set(chosen) <= allowed
        assert len(chosen) == min(5, len(allowed)) == int(found.used[sample].sum())
        assert sorted(chosen.values()) == list(range(len(chosen)))
        assert found.used[sample, : len(chosen)].all()
        for point, each in enumerate(query[sample].tolist()):
            assert int(found.query[sample, point]) == chosen.get(each, -1)


def test_the_salt_decides_which_regions_are_used():
    reference, query, salt = draw(batch=1, reference=400, kinds=40)
    seen = set()
    for step in range(30):
        found = assign_regions(reference, query, salt + step * 7919, most=4, least_points=1)
        seen |= {int(each) for each, region in zip(reference[0], found.reference[0], strict=True) if region >= 0}
    assert len(seen) > 30
    again = assign_regions(reference, query, salt, most=4, least_points=1)
    assert torch.equal(again.reference, assign_regions(reference, query, salt, most=4, least_points=1).reference)


def test_large_numbers_and_patches_without_a_region():
    reference = torch.tensor([[2**31 - 1, 2**31 - 1, 2**31 - 2], [0, 0, 0]])
    query = torch.tensor([[2**31 - 1, 5, 2**31 - 2], [0, 3, 0]])
    found = assign_regions(reference, query, torch.tensor([2**30 - 1, 3]), most=4, least_points=1)
    assert found.used.sum(dim=1).tolist() == [2, 0]
    assert found.reference[0, 0] == found.reference[0, 1] == found.query[0, 0] >= 0
    assert found.query[0, 1] == -1
    assert (found.query[1] == -1).all()
    assert (found.reference[1] == -1).all()
