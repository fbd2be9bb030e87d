import math

import pytest
import torch

from nnssl.losses.nt_xent import nt_xent


def by_loops(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """The paper's formula in scalars: every point against all others of both sides."""
    rows = [[float(x) for x in row] for row in torch.cat([first, second]).double()]
    rows = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    pairs = len(first)
    total = 0.0
    for i, row in enumerate(rows):
        partner = (i + pairs) % (2 * pairs)
        logits = [sum(x * y for x, y in zip(row, other, strict=True)) / temperature for other in rows]
        total -= logits[partner] - math.log(sum(math.exp(logits[k]) for k in range(2 * pairs) if k != i))
    return total / (2 * pairs)


def sides(pairs: int = 8, dimensions: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(2, pairs, dimensions, generator=generator))


@pytest.mark.parametrize("temperature", [0.1, 0.53])
def test_equals_loops(temperature):
    first, second = sides()
    assert nt_xent(first, second, temperature).item() == pytest.approx(by_loops(first, second, temperature), abs=1e-6)


def test_constant_embeddings_cost_log_of_the_others():
    first = torch.ones(1000, 4)
    assert nt_xent(first, first, 0.53).item() == pytest.approx(math.log(1999), abs=1e-4)
    assert nt_xent(first, first, 0.53).item() == pytest.approx(7.6004, abs=1e-4)


def test_pairs_may_be_shuffled_together_but_not_apart():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(64, 32, generator=generator)
    second = first + 0.1 * torch.randn(64, 32, generator=generator)
    order = torch.randperm(64, generator=generator)
    loss = nt_xent(first, second, 0.1)
    assert nt_xent(first[order], second[order], 0.1).item() == pytest.approx(loss.item(), rel=1e-5)
    assert nt_xent(first, second[order], 0.1) > math.log(127) > 5 * loss


def test_gradient_flows_into_both_sides():
    first, second = (side.requires_grad_() for side in sides())
    nt_xent(first, second, 0.5).backward()
    assert (first.grad.abs().sum(dim=1) > 0).all()
    assert (second.grad.abs().sum(dim=1) > 0).all()


def test_half_precision_is_computed_in_float32():
    first, second = (side.bfloat16() for side in sides(32, 16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(first, second, 0.01)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loops(first, second, 0.01), rel=1e-5)
