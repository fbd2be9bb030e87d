"""InfoNCE against double loops written from MoCo's equation 1, closed-form values of collapse, and precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.contrastive import info_nce_in_batch, info_nce_with_negatives, info_nce_with_queue


def unit(rows: int, seed: int, dimensions: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimensions, generator=generator), dim=1)


def slow_info_nce(query, positive, negatives, temperature: float) -> float:
    def similarity(a, b) -> float:
        return math.exp(sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / temperature)

    above = similarity(query, positive)
    return -math.log(above / (above + sum(similarity(query, negative) for negative in negatives)))


def test_queue_form_is_equation_1():
    queries, keys, queue = unit(3, 0), unit(3, 1), unit(7, 2)
    wanted = sum(slow_info_nce(q, k, queue, 0.2) for q, k in zip(queries, keys, strict=True)) / 3
    assert info_nce_with_queue(queries, keys, queue, 0.2).item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("first_row", [0, 2])
def test_batch_form_has_the_other_keys_as_negatives(first_row):
    queries, keys = unit(3, 0), unit(6, 1)
    wanted = 0.0
    for row, query in enumerate(queries):
        place = first_row + row
        negatives = [key for other, key in enumerate(keys) if other != place]
        wanted += slow_info_nce(query, keys[place], negatives, 0.3) / 3
    assert info_nce_in_batch(queries, keys, 0.3, first_row).item() == pytest.approx(wanted, abs=1e-5)


def test_collapsed_embeddings_cost_what_the_closed_form_says():
    same = unit(1, 0).expand(6, -1)
    assert info_nce_with_queue(same, same, same[:1].expand(32, -1), 0.07).item() == pytest.approx(
        math.log(33), abs=1e-5
    )
    assert info_nce_in_batch(same, same, 0.07).item() == pytest.approx(math.log(6), abs=1e-5)


def test_gradient_of_the_queue_form_reaches_the_queries_only():
    queries, keys, queue = (tensor.requires_grad_() for tensor in (unit(3, 0), unit(3, 1), unit(7, 2)))
    info_nce_with_queue(queries, keys, queue, 0.2).backward()
    assert keys.grad is None
    assert queue.grad is None
    numeric = torch.zeros_like(queries)
    for place in range(queries.numel()):
        step = torch.zeros(queries.numel())
        step[place] = 1e-2
        step = step.view_as(queries)
        with torch.no_grad():
            high = info_nce_with_queue(queries + step, keys, queue, 0.2)
            low = info_nce_with_queue(queries - step, keys, queue, 0.2)
        numeric.view(-1)[place] = (high - low) / 2e-2
    torch.testing.assert_close(queries.grad, numeric, atol=2e-3, rtol=0)


def test_mixed_precision_leaves_the_logits_in_float32():
    queries, keys, queue = unit(4, 0, 64), unit(4, 1, 64), unit(50, 2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queue_form = info_nce_with_queue(queries, keys, queue, 0.05)
        batch_form = info_nce_in_batch(queries, keys, 0.05)
    assert torch.equal(queue_form, info_nce_with_queue(queries, keys, queue, 0.05))
    assert torch.equal(batch_form, info_nce_in_batch(queries, keys, 0.05))


def test_keys_that_do_not_reach_are_an_error():
    with pytest.raises(ValueError, match="rows 2 to 4"):
        info_nce_in_batch(unit(3, 0), unit(4, 1), 0.1, first_row=2)


def own_negatives() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, positives, negatives of each and which of them count: all, some and none."""
    negatives = F.normalize(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(2)), dim=2)
    present = torch.tensor([[1] * 6, [0, 1, 0, 0, 1, 1], [0] * 6], dtype=torch.bool)
    return unit(3, 0), unit(3, 1), negatives, present


def test_negatives_of_their_own_are_compared_by_loops():
    queries, positives, negatives, present = own_negatives()
    found = info_nce_with_negatives(queries, positives, negatives, present, 0.2)
    for row in range(3):
        wanted = slow_info_nce(queries[row], positives[row], negatives[row][present[row]], 0.2)
        assert found[row].item() == pytest.approx(wanted, abs=1e-5)


def test_gradient_with_negatives_of_their_own_reaches_all_three():
    """Against a small step of every number; what does not count gets none."""
    *vectors, present = own_negatives()
    vectors = [each.requires_grad_() for each in vectors]
    info_nce_with_negatives(*vectors, present, 0.2).sum().backward()
    assert (vectors[2].grad[~present] == 0).all()
    for place, tensor in enumerate(vectors):
        numeric = torch.zeros_like(tensor)
        for number in range(tensor.numel()):
            moved = [each.detach().double() for each in vectors]
            ends = []
            for sign in (1, -1):
                stepped = [each.clone() for each in moved]
                stepped[place].view(-1)[number] += sign * 1e-2
                ends.append(info_nce_with_negatives(*stepped, present, 0.2).sum())
            numeric.view(-1)[number] = (ends[0] - ends[1]) / 2e-2
        torch.testing.assert_close(tensor.grad, numeric, atol=5e-3, rtol=0)
        assert numeric.abs().max() > 0.1


def test_mixed_precision_leaves_negatives_of_their_own_in_float32():
    given = own_negatives()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce_with_negatives(*given, 0.05)
    assert torch.equal(found, info_nce_with_negatives(*given, 0.05))
