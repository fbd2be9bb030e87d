"""No step of any method waits for a GPU by reading a value or by a size that depends on values."""

import pytest
import torch

from nnssl.momentum import update_teacher
from nnssl.views import intensity_changes
from tests.nnssl.methods.test_excluded_voxels import make_mask, views_of
from tests.nnssl.methods.test_pieces import STEPS
from tests.synchronising import WaitsFor
from trainers.pretraining.optimisation import step_optimizer


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: (2 * x)[x > 0], "index"),
        (lambda x: torch.nonzero(x), "nonzero"),
        (lambda x: x.clone().masked_select(x > 0), "masked_select"),
        (lambda x: torch.nn.functional.one_hot((x > 0).long()), "_local_scalar_dense"),
        (lambda x: torch.unique(x), "_unique2"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: torch.repeat_interleave(x, (x > 0).long()), "repeat_interleave"),
    ],
)
def test_the_counter_counts(wait, name):
    on_device, elsewhere = torch.randn(5), torch.randn(5)
    with WaitsFor([on_device]) as waits:
        wait(elsewhere)
        assert not waits.waits
        wait(on_device.square() - 0.5)
    assert any(place.startswith(f"{name} at ") for place in waits.waits)


def test_a_wait_in_the_backward_pass_counts():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 2 * x * gradient * float(gradient.sum())

    x = torch.randn(5, requires_grad=True)
    with WaitsFor([x]) as waits:
        Square.apply(x).sum().backward()
    assert sum(waits.waits.values()) == 1


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait(name, monkeypatch):
    monkeypatch.setattr(intensity_changes, "numpy_sorts", lambda rows: False)  # as on a GPU
    build, batch = STEPS[name]
    made = build()
    method = (made[1] if isinstance(made, tuple) else made).train()
    groups = [group for group in method.parameter_groups() if len(group.parameters)]
    optimizer = torch.optim.AdamW([{"params": list(group.parameters)} for group in groups], fused=True)
    mask = make_mask(batch)
    with WaitsFor([batch, mask, *method.parameters(), *method.buffers()]) as waits:
        with torch.no_grad():
            views = views_of(method, batch, mask)
        output = method.losses(views, 0.3)
        total = torch.stack([loss.float() for loss in output.losses.values()]).sum()
        step_optimizer(total, optimizer, None, 12.0)
        for student, teacher in method.momentum_pairs():
            update_teacher(student, teacher, method.momentum(0.3))
        method.after_step(output.carry)
    assert not waits.waits
