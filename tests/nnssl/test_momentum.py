"""Teacher and queue: the moving average to 1e-7, shared parameters, buffers, wrap-around."""

import copy

import pytest
import torch
from torch import nn

from nnssl.momentum import FeatureQueue, cosine_momentum, make_teacher, momentum_for_run, update_teacher


class SharedEncoder(nn.Module):
    """As nnU-Net's U-Net: the decoder holds the encoder too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.decoder = nn.ModuleDict({"encoder": self.encoder, "out": nn.Linear(4, 2)})


def pair() -> tuple[SharedEncoder, SharedEncoder]:
    torch.manual_seed(0)
    student, teacher = SharedEncoder(), SharedEncoder()
    student.encoder(torch.randn(8, 3))  # moves the running statistics
    return student, teacher


def test_update_is_the_moving_average_once_per_parameter():
    student, teacher = pair()
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    own = {name: value.clone() for name, value in student.named_parameters()}
    update_teacher(student, teacher, 0.75)
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * own[name], atol=1e-7, rtol=0)
        assert torch.equal(dict(student.named_parameters())[name], own[name])
    for copied, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(copied, buffer)


def test_copy_makes_equal_and_frozen_and_not_shared():
    student, _ = pair()
    teacher = make_teacher(student)
    for (name, value), copied in zip(student.state_dict().items(), teacher.state_dict().values(), strict=True):
        assert torch.equal(value, copied), name
        assert value.data_ptr() != copied.data_ptr()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_small_steps_are_not_lost():
    student, teacher = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 2.0)
    nn.init.constant_(teacher.weight, 1.0)
    for _ in range(1000):
        update_teacher(student, teacher, 0.9999)
    assert teacher.weight.item() == pytest.approx(2 - 0.9999**1000, abs=1e-4)
    with pytest.raises(ValueError, match="bfloat16"):
        update_teacher(student, copy.deepcopy(teacher).bfloat16(), 0.999)


def test_other_architecture_is_an_error():
    with pytest.raises(ValueError, match="same parameters"):
        update_teacher(nn.Linear(3, 4), nn.Linear(4, 3), 0.9)


def test_schedules():
    assert cosine_momentum(0, 100, 0.996) == pytest.approx(0.996)
    assert cosine_momentum(50, 100, 0.996) == pytest.approx(0.998)
    assert cosine_momentum(25, 100, 0.996) == pytest.approx(1 - 0.004 * (0.5**0.5 + 1) / 2)
    assert cosine_momentum(100, 100, 0.996) == 1
    assert momentum_for_run(0.999, 50_000) == 0.999
    assert momentum_for_run(0.999, 1000) == pytest.approx(0.98)
    assert momentum_for_run(0.999, 5) == 0


@pytest.mark.parametrize("batch", [4, 3])
def test_queue_holds_the_last_keys_and_wraps_around(batch):
    queue = FeatureQueue(8, 2, torch.Generator().manual_seed(0))
    slow = queue.keys.tolist()
    for step in range(9):
        keys = torch.nn.functional.normalize(
            torch.randn(batch, 2, generator=torch.Generator().manual_seed(step)), dim=1
        )
        queue.enqueue(keys)
        for row, key in enumerate(keys.tolist()):
            slow[(step * batch + row) % 8] = key
        assert queue.keys.tolist() == slow
        assert queue.pointer.item() == (step + 1) * batch % 8
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(8))


def test_queue_starts_from_its_generator_on_the_sphere():
    queue, other = (FeatureQueue(50, 3, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(50))
    assert torch.equal(queue.keys, FeatureQueue(50, 3, torch.Generator().manual_seed(1)).keys)
    assert not torch.equal(queue.keys, other.keys)
    assert set(queue.state_dict()) == {"keys", "pointer"}
    assert not list(queue.parameters())


def test_more_keys_than_the_queue_holds_are_an_error():
    queue = FeatureQueue(4, 2, torch.Generator().manual_seed(0))
    queue.enqueue(torch.eye(4)[:, :2])
    assert queue.pointer.item() == 0
    with pytest.raises(ValueError, match="the number of keys must be at most 4, .* got 5"):
        queue.enqueue(torch.zeros(5, 2))
