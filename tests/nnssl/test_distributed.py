"""Two processes equal one: values and gradients, with different data on each rank."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from nnssl import distributed
from nnssl.distributed import (
    gather,
    gather_with_gradient,
    is_distributed,
    mean_over_ranks,
    rank,
    standardise_over_ranks,
    world_size,
)
from nnssl.losses.barlow_twins import barlow_twins
from nnssl.losses.contrastive import info_nce_in_batch, info_nce_with_queue
from nnssl.losses.nt_xent import nt_xent
from nnssl.momentum import FeatureQueue
from nnssl.networks.recent_statistics import RecentStatistics
from tests.waiting import HUNG_S

RANKS, PER_RANK = 2, 3


def standardised(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A loss that is not linear in the standardised rows, whose plain sums of squares are the same for any rows."""
    return (standardise_over_ranks(first) ** 3 * second.tanh()).mean()


def scaled(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The same with a factor and a shift of each dimension, which get a gradient, too."""
    scale, shift = first.new_tensor([0.5, 1.0, 2.0, -1.0, 3.0]), first.new_tensor([0.0, 1.0, -1.0, 0.5, 0.2])
    return (standardise_over_ranks(first, scale=scale, shift=shift) ** 3 * second.tanh()).mean()


def remembered(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A loss of the second call of a standardisation that remembers the first one."""
    layer = RecentStatistics(first.shape[1], RANKS * PER_RANK)
    layer(second.detach())
    return (layer(first) ** 3 * second.tanh()).mean()


# losses of pairs whose rows are shared out over the processes
PAIR_LOSSES = {
    "nt_xent": lambda first, second: nt_xent(first, second, 0.5),
    "barlow_twins": lambda first, second: barlow_twins(first, second, 0.1),
    "standardise": standardised,
    "standardise, scale and shift": scaled,
    "remembered": remembered,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("factor", "mean"), [(1.0, 0.0), (1e-2, 0.0), (300.0, 1500.0)])
def test_statistics_of_half_precision_are_those_of_float32_for_several_processes_too(dtype, factor, mean):
    rows = (mean + factor * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    scale, shift = torch.linspace(0.5, 2, 5), torch.linspace(-1, 1, 5)
    found = []
    for way in (standardise_over_ranks, distributed._standardise_by_exchange):
        own = rows.clone().requires_grad_()
        output = way(own, 1e-5, scale, shift)
        (output.float() ** 3).mean().backward()
        assert output.dtype is own.grad.dtype is dtype
        found.append((output.detach().float(), own.grad.float()))
    for one, other in zip(*found, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.02 * float(other.abs().max()))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the global batch: inputs of the queries and of the keys."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, RANKS * PER_RANK, 4, generator=generator))


def weight() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()


def embed(inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return F.normalize(inputs @ matrix, dim=1)


def queue_loss(queue: FeatureQueue, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return info_nce_with_queue(queries, keys, queue.keys.clone(), 0.2)


def run_rank(place: int, folder: str) -> None:
    """Do on one of two processes what ``one_process`` does on one, and save what came out."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=place, world_size=RANKS, timeout=timedelta(seconds=HUNG_S))
    try:
        own = slice(place * PER_RANK, (place + 1) * PER_RANK)
        query_inputs, key_inputs = (inputs[own] for inputs in data())
        result = {"rank": rank(), "world_size": world_size(), "gathered": gather(query_inputs.T.contiguous().T)}

        for name, gathered in (("with_gradient", gather_with_gradient), ("without_gradient", gather)):
            matrix = weight()
            keys = gathered(embed(key_inputs, matrix))
            loss = info_nce_in_batch(embed(query_inputs, matrix), keys, 0.2, first_row=rank() * PER_RANK)
            loss.backward()
            result[name] = (mean_over_ranks(loss), mean_over_ranks(matrix.grad))

        for name, pair_loss in PAIR_LOSSES.items():
            matrix = weight()
            loss = pair_loss(query_inputs @ matrix, key_inputs @ matrix)
            loss.backward()
            result[name] = (mean_over_ranks(loss), mean_over_ranks(matrix.grad))

        queue = FeatureQueue(10, 5, torch.Generator().manual_seed(2))
        matrix = weight()
        queue.enqueue(gather(embed(key_inputs, matrix)))
        loss = queue_loss(queue, embed(query_inputs, matrix), embed(key_inputs, matrix))
        loss.backward()
        result["queue"] = (mean_over_ranks(loss), mean_over_ranks(matrix.grad))
        result["queue_keys"], result["pointer"] = queue.keys, queue.pointer
        torch.save(result, f"{folder}/rank{place}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"rank{place}.pt", weights_only=True) for place in range(RANKS)]


def test_ranks_and_gathered_rows(results):
    for place, result in enumerate(results):
        assert (result["rank"], result["world_size"]) == (place, RANKS)
        assert torch.equal(result["gathered"], data()[0])


@pytest.mark.parametrize("detach", [False, True], ids=["with_gradient", "without_gradient"])
def test_in_batch_loss_and_gradient_equal_one_process(results, detach):
    query_inputs, key_inputs = data()
    matrix = weight()
    keys = embed(key_inputs, matrix)
    loss = info_nce_in_batch(embed(query_inputs, matrix), keys.detach() if detach else keys, 0.2)
    loss.backward()
    for result in results:
        mean_loss, mean_gradient = result["without_gradient" if detach else "with_gradient"]
        torch.testing.assert_close(mean_loss, loss.detach())
        torch.testing.assert_close(mean_gradient, matrix.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_of_pairs_equal_one_process(results, name):
    query_inputs, key_inputs = data()
    matrix = weight()
    loss = PAIR_LOSSES[name](query_inputs @ matrix, key_inputs @ matrix)
    loss.backward()
    assert matrix.grad.abs().max() > 1e-3
    for result in results:
        torch.testing.assert_close(result[name][0], loss.detach())
        torch.testing.assert_close(result[name][1], matrix.grad, atol=1e-6, rtol=1e-4)


def test_queue_after_gathered_keys_equals_one_process(results):
    query_inputs, key_inputs = data()
    queue, matrix = FeatureQueue(10, 5, torch.Generator().manual_seed(2)), weight()
    queue.enqueue(embed(key_inputs, matrix))
    loss = queue_loss(queue, embed(query_inputs, matrix), embed(key_inputs, matrix))
    loss.backward()
    for result in results:
        torch.testing.assert_close(result["queue_keys"], queue.keys)
        assert result["pointer"] == RANKS * PER_RANK
        torch.testing.assert_close(result["queue"][0], loss.detach())
        torch.testing.assert_close(result["queue"][1], matrix.grad, atol=1e-6, rtol=1e-5)


def test_one_process_is_the_identity():
    tensor = torch.arange(6.0).view(3, 2).requires_grad_()
    assert (is_distributed(), rank(), world_size()) == (False, 0, 1)
    assert torch.equal(gather(tensor), tensor)
    assert not gather(tensor).requires_grad
    assert gather_with_gradient(tensor) is tensor
    assert torch.equal(mean_over_ranks(tensor), tensor)
    assert not mean_over_ranks(tensor).requires_grad
