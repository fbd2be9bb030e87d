"""SimCLR on tiny networks, in 2D and in anisotropic 3D with two channels: its loss by loops, its views, what leaves."""

import math

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.methods.settings import resolve_stage
from nnssl.methods.simclr import SimCLR
from nnssl.networks.backbone import build_network
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
STILL = ("intensity_views=", "crop_fraction=1,1", "flip_probability=0")
dims = pytest.mark.parametrize("dim", [2, 3])


def make_stage(dim: int, *overrides: str, residual: bool = False):
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(SimCLR, planned(configuration), "simclr.contrast", overrides)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return network, SimCLR(network, settings, configuration)


def patches(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(3))


def generators(samples: list[int]):
    return sample_generators(0, "simclr.contrast", 0, samples)


def by_loops(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """Equation 1, one row at a time."""
    rows = [row / row.norm() for row in (*first.double(), *second.double())]
    n, total = len(first), 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = sum(math.exp(float(rows[i] @ rows[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(float(rows[i] @ rows[partner]) / temperature) / others)
    return total / (2 * n)


@dims
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_loss_is_equation_1_of_pooled_projections(dim, residual):
    _, method = make_stage(dim, "temperature=0.3", residual=residual)
    views = method.make_views(patches(dim), generators([0, 1, 2, 3]))
    loss = method.losses(views, 0.0).losses["contrast"]
    pooled = []
    for volumes in views:
        features = method.encoder(volumes)[-1].flatten(2)
        hidden = torch.relu(torch.einsum("bcn,hc->bnh", features, method.head.hidden.weight) + method.head.hidden.bias)
        pooled.append(hidden.mean(1))
    both = torch.cat(pooled)  # the hidden vectors are standardised over the batch of both views
    embedded = [
        (each - both.mean(0)) / both.std(0, correction=0) @ method.head.project.weight.T + method.head.project.bias
        for each in pooled
    ]
    assert loss.item() == pytest.approx(by_loops(*embedded, temperature=0.3), rel=1e-3)


@dims
def test_embeddings_that_are_all_equal_cost_log_of_all_others(dim):
    _, method = make_stage(dim)
    with torch.no_grad():
        method.head.project.weight.zero_()
    views = method.make_views(patches(dim), generators([0, 1, 2, 3]))
    assert method.losses(views, 0.0).losses["contrast"].item() == pytest.approx(math.log(7), rel=1e-5)


@dims
def test_views_differ_and_depend_on_their_own_sample_alone(dim):
    _, method = make_stage(dim)
    volumes = patches(dim)
    first, second = method.make_views(volumes, generators([0, 1, 2, 3]))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = method.make_views(volumes[2:3], generators([2]))
    torch.testing.assert_close(alone[0], first[2:3])
    torch.testing.assert_close(alone[1], second[2:3])
    _, still = make_stage(dim, *STILL)
    for view in still.make_views(volumes, generators([0, 1, 2, 3])):
        torch.testing.assert_close(view, volumes)


@dims
def test_encoder_and_head_learn_and_nothing_else(dim):
    network, method = make_stage(dim)
    optimizer = torch.optim.SGD([p for group in method.parameter_groups() for p in group.parameters], 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    output = method.losses(method.make_views(patches(dim), generators([0, 1, 2, 3])), 0.0)
    output.losses["contrast"].backward()
    optimizer.step()
    prefixes = method.exported().pretrained
    for name, value in network.state_dict().items():
        if name.startswith(prefixes):
            # a bias before instance normalisation changes nothing, so its gradient is rounding
            assert not torch.equal(value, before[name]) or name.endswith("bias"), name
        else:
            assert torch.equal(value, before[name]), name
    decaying = {id(p) for group in method.parameter_groups() if group.weight_decay for p in group.parameters}
    assert all((id(p) in decaying) == (p.squeeze().ndim > 1) for p in method.parameters() if p.requires_grad)


@dims
def test_some_steps_lower_the_loss(dim):
    _, method = make_stage(dim, "temperature=0.2")
    optimizer = torch.optim.Adam([p for group in method.parameter_groups() for p in group.parameters], 3e-3)
    volumes = patches(dim)
    values = []
    for _ in range(30):
        views = method.make_views(volumes, generators([0, 1, 2, 3]))
        loss = method.losses(views, 0.0).losses["contrast"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
