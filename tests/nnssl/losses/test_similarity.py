"""Cosine distance against scalars, its scale, precision, and whom it teaches."""

import math

import pytest
import torch

from nnssl.losses.similarity import cosine_distance


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_loops(first, second) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(first, second, strict=True))
    lengths = math.prod(math.sqrt(sum(float(a) ** 2 for a in row)) for row in (first, second))
    return 2 - 2 * dot / lengths


def test_equals_scalars_whatever_the_scale():
    first, second = rows(0, 3, 4, 5), 7 * rows(1, 3, 4, 5)
    found = cosine_distance(first, second)
    for i in range(3):
        for j in range(4):
            assert found[i, j].item() == pytest.approx(by_loops(first[i, j], second[i, j]), abs=1e-5)
    torch.testing.assert_close(cosine_distance(first, 3 * first), torch.zeros(3, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(first, -first), torch.full((3, 4), 4.0))


def test_the_second_is_the_teacher():
    first, second = rows(0, 6, 5).requires_grad_(), rows(1, 6, 5).requires_grad_()
    cosine_distance(first, second).sum().backward()
    assert second.grad is None
    assert (first.grad.abs().sum(dim=1) > 0).all()


def test_half_precision_is_computed_in_float32():
    first, second = rows(0, 32, 64).bfloat16(), rows(1, 32, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine_distance(first, second)
    assert found.dtype == torch.float32
    assert torch.equal(found, cosine_distance(first.float(), second.float()))
