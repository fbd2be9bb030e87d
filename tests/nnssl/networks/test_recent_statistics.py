"""Standardisation over the batch and the rows before it, against a loop over all rows that it should cover."""

import copy

import pytest
import torch

from nnssl.momentum import make_teacher, update_teacher
from nnssl.networks import recent_statistics
from nnssl.networks.recent_statistics import RecentStatistics

ROWS, WIDTH = 3, 2


@pytest.fixture
def remembers_four(monkeypatch) -> None:
    """A batch of three is completed to seven rows."""
    monkeypatch.setattr(recent_statistics, "MEMORY", 7)


def steps(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [5 + 2 * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(number)]


def by_loops(rows: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(rows)
    for column in range(WIDTH):
        values = [float(value) for value in covered[:, column]]
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        for row in range(len(rows)):
            result[row, column] = (float(rows[row, column]) - mean) / deviation
    return result


def test_statistics_cover_the_batch_and_the_most_recent_rows(remembers_four):
    layer = RecentStatistics(WIDTH, ROWS)
    given = steps(5)
    for number, rows in enumerate(given):
        before = torch.cat(given[:number])[-4:] if number else rows[:0]
        torch.testing.assert_close(layer(rows), by_loops(rows, torch.cat([rows, before])), rtol=1e-4, atol=1e-5)


def test_a_large_batch_needs_no_memory():
    layer = RecentStatistics(WIDTH, 400)
    assert not len(layer.memory)
    rows = torch.randn(400, WIDTH)
    layer(rows + 7)
    torch.testing.assert_close(layer(rows), by_loops(rows, rows), rtol=1e-4, atol=1e-5)


def test_nothing_is_remembered_in_evaluation_and_a_copy_continues_alike(remembers_four):
    layer = RecentStatistics(WIDTH, ROWS)
    first, second, third = steps(3)
    layer(first)
    layer.eval()(second)
    restored = RecentStatistics(WIDTH, ROWS)
    restored.load_state_dict(copy.deepcopy(layer.state_dict()))
    layer.train()
    assert torch.equal(restored(third), layer(third))
    covered = torch.cat([second, third, first[-1:]])
    torch.testing.assert_close(restored.eval()(second), by_loops(second, covered), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_batch_through_its_statistics(remembers_four):
    """What is remembered is a constant."""
    layer = RecentStatistics(WIDTH, ROWS)
    first, second = steps(2)
    layer(first.requires_grad_())
    second.requires_grad_()
    (found,) = torch.autograd.grad(layer.eval()(second).pow(3).sum(), second)
    covered = torch.cat([second, first.detach()])
    expected = (second - covered.mean(0)) / covered.std(0, correction=0)
    (gradient,) = torch.autograd.grad(expected.pow(3).sum(), second)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    assert first.grad is None


def test_a_teacher_remembers_its_own_rows(remembers_four):
    student = RecentStatistics(WIDTH, ROWS)
    teacher = make_teacher(student)
    first, second = steps(2)
    student(first)
    teacher(second)
    update_teacher(student, teacher, 0.9)
    assert torch.equal(teacher.memory[:ROWS], second)
    assert torch.equal(student.memory[:ROWS], first)
