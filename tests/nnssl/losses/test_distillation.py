"""Distillation losses against their formulas spelled out, and what the stabilizer does to gradients."""

import math

import pytest
import torch

from nnssl.losses.distillation import distillation_cross_entropy, stabilise, weighted_mean
from nnssl.networks.uncertainty import normalised_entropy

PARTNER = torch.tensor([1, 0, 3, 4, 2])


def make(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_in_loops():
    target, logits = make(0, 2, 3, 5).softmax(dim=-1), 3 * make(1, 2, 3, 5)
    expected = torch.zeros(2, 3)
    for b in range(2):
        for i in range(3):
            total = sum(math.exp(logits[b, i, c]) for c in range(5))
            for c in range(5):
                expected[b, i] -= target[b, i, c] * math.log(math.exp(logits[b, i, c]) / total)
    torch.testing.assert_close(distillation_cross_entropy(target, logits), expected)


def test_no_gradient_reaches_the_teacher():
    target, logits = make(0, 4, 6).requires_grad_(), make(1, 4, 6).requires_grad_()
    distillation_cross_entropy(target.softmax(dim=-1), logits).sum().backward()
    assert target.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_entropy_is_between_certain_and_no_idea():
    assert normalised_entropy(torch.full((2, 7), 1 / 7)) == pytest.approx(1.0, abs=1e-6)
    assert normalised_entropy(torch.eye(7)).abs().max() == 0
    rows = (4 * make(0, 50, 7)).softmax(dim=-1)
    expected = [-sum(float(p) * math.log(float(p)) for p in row) / math.log(7) for row in rows]
    torch.testing.assert_close(normalised_entropy(rows), torch.tensor(expected))
    assert (normalised_entropy(rows) <= 1).all()


@pytest.mark.parametrize("kind", ["none", "literal", "signed_detached", "excess", "added"])
def test_stabilizers_in_loops(kind):
    values = make(0, 5, 4)
    expected = torch.zeros(5, 4)
    for b in range(5):
        for i in range(4):
            own, other = float(values[b, i]), float(values[int(PARTNER[b]), i])
            expected[b, i] = {
                "none": own,
                "literal": abs(own - other),
                "signed_detached": own - other,
                "excess": max(0.0, own - other),
                "added": own + 0.3 * abs(own - other),
            }[kind]
    torch.testing.assert_close(stabilise(values, PARTNER, kind, 0.3), expected)


def test_equal_images_cost_nothing_under_the_printed_formula():
    values = make(0, 1, 4).expand(2, 4)
    assert stabilise(values, torch.tensor([1, 0]), "literal", 0.5).abs().max() == 0


def gradient(kind: str) -> torch.Tensor:
    values = make(0, 5, 4).requires_grad_()
    weighted_mean(stabilise(values, PARTNER, kind, 0.3), make(1, 5, 4).abs()).backward()
    assert values.grad is not None
    return values.grad


def test_signed_and_detached_has_the_gradient_of_none():
    torch.testing.assert_close(gradient("signed_detached"), gradient("none"), atol=1e-6, rtol=0)
    assert not torch.allclose(gradient("literal"), gradient("none"), atol=1e-3)
    assert not torch.allclose(gradient("added"), gradient("none"), atol=1e-3)


def test_excess_trains_the_worse_of_two_images_alone():
    values = torch.tensor([[2.0, 5.0], [3.0, 1.0]]).requires_grad_()
    stabilise(values, torch.tensor([1, 0]), "excess", 0.0).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_weights():
    values, weights = torch.tensor([[1.0, 5.0], [3.0, 100.0]]), torch.tensor([[1.0, 3.0], [1.0, 0.0]])
    assert weighted_mean(values, weights) == pytest.approx((1 + 15 + 3) / 5)
    assert weighted_mean(values, torch.zeros(2, 2)) == 0
