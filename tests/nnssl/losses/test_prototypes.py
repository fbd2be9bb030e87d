"""The loss of prototypes by loops."""

import math

import pytest
import torch

from nnssl.losses.prototypes import prototype_loss, prototypes_of


def draw(batch=3, points=11, regions=4, width=6):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(batch, points, width, generator=generator)
    places = torch.randint(-1, regions, (batch, points), generator=generator)
    used = torch.ones(batch, regions, dtype=torch.bool)
    used[0, 3] = used[1, 2] = used[1, 3] = False
    places = torch.where(used.gather(1, places.clamp_min(0)), places, -1)
    prototypes = torch.nn.functional.normalize(torch.randn(batch, regions, width, generator=generator), dim=2)
    return queries, places, prototypes, used


def by_loops(queries, places, prototypes, used, temperature):
    batch, count = used.shape
    entropies, lost, rights = [], [], []
    for b in range(batch):
        own_entropy, own_right, chances = [], [], []
        for q, place in zip(queries[b].double(), places[b].tolist(), strict=True):
            if place < 0:
                continue
            scores = {
                (i, r): math.exp(float(q @ prototypes[i, r].double() / q.norm()) / temperature)
                for i in range(batch)
                for r in range(count)
                if used[i, r]
            }
            total = sum(scores.values())
            own_entropy.append(-math.log(scores[b, place] / total))
            own_right.append(max(scores, key=scores.get) == (b, place))
            chances.append(({r: scores.get((b, r), 0.0) / total for r in range(count)}, place))
        dice = []
        for r in range(count):
            truth = sum(place == r for _, place in chances)
            if truth:
                hit = sum(each[r] for each, place in chances if place == r)
                dice.append(1 - 2 * hit / (sum(each[r] for each, _ in chances) + truth))
        entropies.append(sum(own_entropy) / max(1, len(own_entropy)))
        rights.append(sum(own_right) / max(1, len(own_right)))
        lost.append(sum(dice) / max(1, len(dice)))
    return (sum(each) / batch for each in (entropies, lost, rights))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_is_that_of_its_docstring(temperature):
    drawn = draw()
    found = prototype_loss(*drawn, temperature)
    for value, expected in zip(found, by_loops(*drawn, temperature), strict=True):
        assert value.item() == pytest.approx(expected, rel=1e-4)


def test_equal_embeddings_cost_the_log_of_all_prototypes():
    queries, places, prototypes, used = draw()
    same = torch.ones_like(prototypes[:1, :1]).expand_as(prototypes) / math.sqrt(prototypes.shape[2])
    loss = prototype_loss(queries, places, same, used, 0.1)
    assert loss.cross_entropy.item() == pytest.approx(math.log(int(used.sum())), rel=1e-5)


def test_images_without_points_cost_nothing_and_have_finite_gradients():
    queries, places, prototypes, used = draw()
    queries.requires_grad_(True)
    loss = prototype_loss(queries, torch.full_like(places, -1), prototypes, used, 0.1)
    (loss.cross_entropy + loss.dice).backward()
    assert loss.cross_entropy == loss.dice == 0
    assert not queries.grad.any()


def test_prototypes_are_normalised_means():
    embeddings = torch.randn(2, 7, 5)
    regions = torch.tensor([[0, 0, 1, -1, 1, 1, 0], [2, 2, -1, -1, 2, 0, 0]])
    found = prototypes_of(embeddings, regions, 3)
    mean = embeddings[0, [2, 4, 5]].mean(dim=0)
    torch.testing.assert_close(found[0, 1], mean / mean.norm())
    assert not found[0, 2].any()
    mean = embeddings[1, [0, 1, 4]].mean(dim=0)
    torch.testing.assert_close(found[1, 2], mean / mean.norm())


def test_mixed_precision_changes_nothing():
    drawn = draw(points=40, regions=16, width=64)
    expected = prototype_loss(*drawn, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototype_loss(*drawn, 0.1)
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other)
