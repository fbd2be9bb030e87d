"""A batch in pieces: order of the recomputation, results by kind, random state, copies, compiled parts."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.backbone import build_network, parts_to_compile
from nnssl.networks.dense import decoder_maps
from nnssl.networks.pieces import in_pieces, recompute_stages, recomputed
from tests.nnssl.networks.test_hybrid import PATCHES, architecture


class Watched(torch.autograd.Function):
    """Records when the backward pass of a piece has reached its input."""

    @staticmethod
    def forward(ctx, value, events):
        ctx.events, ctx.first = events, float(value.flatten()[0])
        return value * 1.0

    @staticmethod
    def backward(ctx, gradient):
        ctx.events.append(("done", ctx.first))
        return gradient, None


def test_one_piece_is_recomputed_and_done_before_the_next():
    events: list = []
    weight = torch.ones(3, requires_grad=True)

    def embed(rows: Tensor) -> Tensor:
        events.append(("computed", float(rows[0, 0])))
        return (Watched.apply(rows * weight, events).tanh() * weight).exp()

    rows = torch.arange(5.0)[:, None].expand(5, 3) / 10
    found = in_pieces(embed, [rows], 3)
    assert events == [("computed", pytest.approx(first)) for first in (0.0, 0.2, 0.4)]  # 2, 2 and 1 rows
    events.clear()
    found.square().mean().backward()
    order = [(what, pytest.approx(first)) for first in (0.4, 0.2, 0.0) for what in ("computed", "done")]
    assert events == order
    split, weight.grad = weight.grad, None
    embed(rows).square().mean().backward()
    torch.testing.assert_close(split, weight.grad)


def test_results_are_joined_by_kind():
    """Rows are concatenated, however many there are of a sample; means are weighted by the number of samples."""
    values = torch.randn(5, 7)
    found = in_pieces(
        lambda rows: {"rows": rows.repeat_interleave(2, dim=0), "mean": rows.mean(), "none": rows[:0]}, [values], 3
    )
    assert torch.equal(found["rows"], values.repeat_interleave(2, dim=0))
    torch.testing.assert_close(found["mean"], values.mean())
    assert found["none"].shape == (0, 7)


def test_several_tensors_are_split_alike():
    first, second = torch.randn(4, 2), torch.arange(4)
    assert torch.equal(in_pieces(lambda a, b: a * b[:, None], [first, second], 3), first * second[:, None])


def test_one_piece_is_a_plain_call():
    values = torch.randn(3, 2)
    assert in_pieces(lambda rows: rows, [values], 1) is values
    with pytest.raises(UserError, match=r"^pieces must be at most the 3 patches of a process, got 4$"):
        in_pieces(lambda rows: rows, [values], 4)


def test_the_random_state_is_that_of_the_first_call():
    weight = torch.ones(1000, requires_grad=True)
    torch.manual_seed(3)
    found = recomputed(lambda each: nn.functional.dropout(each.sin(), 0.5), weight)
    torch.manual_seed(4)
    found.sum().backward()
    assert torch.equal(weight.grad == 0, found == 0)


def test_parts_without_gradient_that_come_last_are_not_repeated():
    calls, weight = [], torch.ones(2, requires_grad=True)

    def embed(rows: Tensor) -> dict[str, Tensor]:
        student = (rows * weight).exp()
        with torch.no_grad():
            calls.append(len(rows))
            return {"student": student, "teacher": rows.exp()}

    in_pieces(embed, [torch.randn(4, 2)], 2)["student"].sum().backward()
    assert calls == [2, 2]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_a_copy_of_recomputed_stages_has_its_own_weights(dim, residual):
    network = build_network(architecture(dim, residual, True), 2, 3, seed=1)
    volumes = torch.randn(2, 2, *PATCHES[dim])
    plain = decoder_maps(network, volumes)[-1]
    recompute_stages(network)
    recompute_stages(network)  # again changes nothing
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(decoder_maps(network, volumes)[-1], plain)
    assert not decoder_maps(other, volumes)[-1].any()
    assert set(network.state_dict()) == set(build_network(architecture(dim, residual, True), 2, 3, seed=1).state_dict())


@pytest.mark.nightly
@pytest.mark.parametrize(("residual", "recompute"), [(False, False), (True, True)])
def test_compiled_parts_in_pieces(residual, recompute):
    """Traced, but not translated to machine code, which needs a compiler."""

    def gradients(compiled: bool) -> list[Tensor]:
        network = build_network(architecture(2, residual, False), 2, 3, seed=1)
        if recompute:
            recompute_stages(network)
        if compiled:
            for part in parts_to_compile(network):
                part.compile(backend="aot_eager")
        generator = torch.Generator().manual_seed(0)
        volumes = torch.randn(5, 2, *PATCHES[2], generator=generator)
        for _ in range(2):
            network.zero_grad()
            in_pieces(lambda each: decoder_maps(network, each)[-1], [volumes], 2).square().mean().backward()
        return [each.grad for each in network.parameters() if each.grad is not None]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
