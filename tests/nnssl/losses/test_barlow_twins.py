import math

import pytest
import torch

from nnssl.losses.barlow_twins import barlow_twins


def by_loops(first: torch.Tensor, second: torch.Tensor, weight: float) -> float:
    """Equations 1 and 2 in scalars, with a variance whose floor is that of batch normalisation."""
    pairs, dimensions = first.shape

    def standard(rows: torch.Tensor, column: int) -> list[float]:
        values = [float(v) for v in rows[:, column].double()]
        mean = sum(values) / pairs
        variance = sum((v - mean) ** 2 for v in values) / pairs
        return [(v - mean) / math.sqrt(variance + 1e-5) for v in values]

    total = 0.0
    for i in range(dimensions):
        for j in range(dimensions):
            c = sum(a * b for a, b in zip(standard(first, i), standard(second, j), strict=True)) / pairs
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


@pytest.mark.parametrize("weight", [0.0, 0.0051, 1.0])
def test_equals_loops(weight):
    generator = torch.Generator().manual_seed(0)
    first, second = 2 * torch.randn(2, 9, 4, generator=generator) + 1
    assert barlow_twins(first, second, weight).item() == pytest.approx(by_loops(first, second, weight), rel=1e-5)


def test_what_degenerate_embeddings_cost():
    constant = torch.full((100, 256), 3.0)
    assert barlow_twins(constant, constant, 0.0051).item() == pytest.approx(256)
    column = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    identical = column.expand(-1, 16)
    assert barlow_twins(identical, identical, 0.0051).item() == pytest.approx(0.0051 * 16 * 15, rel=1e-3)


def test_independent_equal_inputs_cost_nothing():
    whitened = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0))
    assert barlow_twins(whitened, whitened, 0.0051).item() < 1e-3
    other = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(1))
    assert barlow_twins(whitened, other, 0.0051).item() == pytest.approx(16, rel=0.02)


def test_pairs_may_be_shuffled_together_but_not_apart():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(500, 8, generator=generator)
    second = first + 0.1 * torch.randn(500, 8, generator=generator)
    order = torch.randperm(500, generator=generator)
    loss = barlow_twins(first, second, 0.0051)
    assert barlow_twins(first[order], second[order], 0.0051).item() == pytest.approx(loss.item(), rel=1e-4)
    assert barlow_twins(first, second[order], 0.0051).item() == pytest.approx(8, rel=0.2)


def test_gradient_flows_into_both_sides():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(9, 4, generator=generator, requires_grad=True) for _ in range(2))
    barlow_twins(first, second, 0.1).backward()
    assert (first.grad.abs().sum(dim=1) > 0).all()
    assert (second.grad.abs().sum(dim=1) > 0).all()


def test_half_precision_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(64, 8, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = barlow_twins(first, first + 0.5, 0.0051)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loops(first, first + 0.5, 0.0051), rel=1e-3)
