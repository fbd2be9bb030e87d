"""Models Genesis on tiny networks, in 2D and in anisotropic 3D with two channels: its loss, its views, what leaves."""

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.methods.models_genesis import ModelsGenesis
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import decoder_maps
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
STILL = ("curve_probability=0", "shuffle_probability=0", "paint_probability=0", "flip_probability=0")
dims = pytest.mark.parametrize("dim", [2, 3])


def make_stage(dim: int, *overrides: str, residual: bool = False):
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(ModelsGenesis, planned(configuration), "models_genesis.restoration", overrides)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return network, ModelsGenesis(network, settings, configuration)


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(3))


def generators(samples: list[int], step: int = 0):
    return sample_generators(0, "models_genesis.restoration", step, samples)


@dims
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_loss_is_the_squared_error_of_all_voxels_of_the_clean_patch(dim, residual):
    network, method = make_stage(dim, residual=residual)
    views = method.make_views(make_batch(dim), generators([0, 1, 2, 3]))
    with torch.no_grad():
        output = method.losses(views, 0.0)
        last = decoder_maps(network, views.seen)[-1]
        restored = torch.einsum("bc...,oc->bo...", last, method.output.weight.flatten(1))
        restored += method.output.bias.view(1, -1, *(1,) * dim)
    errors = [(a - b) ** 2 for a, b in zip(restored.flatten().tolist(), views.clean.flatten().tolist(), strict=True)]
    assert output.losses["restoration"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    unchanged = (views.seen - views.clean).square().mean().item()
    assert output.monitors["restoration_of_unchanged"].item() == pytest.approx(unchanged, rel=1e-5)


@dims
def test_each_transformation_alone_does_what_it_says(dim):
    volumes = make_batch(dim)

    def seen(*changed: str):
        kept = [each for each in STILL if each.split("=")[0] not in {one.split("=")[0] for one in changed}]
        method = make_stage(dim, *kept, *changed)[1]
        return method.make_views(volumes, generators([0, 1, 2, 3]))

    still = seen()
    assert torch.equal(still.seen, volumes)
    assert torch.equal(still.clean, volumes)
    shuffled = seen("shuffle_probability=1")
    assert torch.equal(shuffled.clean, volumes)
    assert not torch.equal(shuffled.seen, volumes)
    torch.testing.assert_close(shuffled.seen.flatten(2).sort().values, volumes.flatten(2).sort().values)
    flipped = seen("flip_probability=1")
    axes = tuple(axis + 2 for axis in make_configuration(dim).flip_axes)
    assert torch.equal(flipped.clean, volumes.flip(axes))
    assert torch.equal(flipped.seen, flipped.clean)
    curved = seen("curve_probability=1", "falling_share=0")
    assert torch.equal(curved.clean, volumes)
    assert not torch.allclose(curved.seen, volumes)
    order = volumes.flatten(2).argsort(dim=2)
    assert (curved.seen.flatten(2).gather(2, order).diff(dim=2) >= -1e-5).all()  # the order of the voxels is kept
    painted = seen("paint_probability=1", "inpainting_share=1")
    share = (painted.seen != volumes).float().mean()
    assert torch.equal(painted.clean, volumes)
    assert 0.005 < share < 0.5


@dims
def test_views_depend_on_their_own_sample_alone(dim):
    _, method = make_stage(dim)
    together = method.make_views(make_batch(dim), generators([0, 1, 2, 3]))
    alone = method.make_views(make_batch(dim)[2:3], generators([2]))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other[2:3])


@dims
def test_encoder_and_decoder_learn_and_nothing_else(dim):
    network, method = make_stage(dim)
    optimizer = torch.optim.SGD([p for group in method.parameter_groups() for p in group.parameters], 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    views = method.make_views(make_batch(dim), generators([0, 1, 2, 3]))
    method.losses(views, 0.0).losses["restoration"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    optimizer.step()
    prefixes = method.exported().pretrained
    for name, value in network.state_dict().items():
        if name.startswith(prefixes):
            assert not torch.equal(value, before[name]) or name.endswith("bias"), name
        else:
            assert ".seg_layers." in name
            assert torch.equal(value, before[name]), name
    decaying = {id(p) for group in method.parameter_groups() if group.weight_decay for p in group.parameters}
    assert all((id(p) in decaying) == (p.squeeze().ndim > 1) for p in method.parameters() if p.requires_grad)


@dims
def test_some_steps_restore_more_than_nothing(dim):
    _, method = make_stage(dim, "curve_probability=0")
    optimizer = torch.optim.Adam([p for group in method.parameter_groups() for p in group.parameters], 1e-2)
    axes = torch.meshgrid(*(torch.arange(n) / n for n in PATCHES[dim]), indexing="ij")
    wave = torch.stack([torch.sin(7 * axes[-1] + phase) + torch.cos(5 * axes[-2]) for phase in range(4)])
    volumes = wave[:, None].repeat(1, CHANNELS, *(1,) * dim)
    values, unchanged = [], []
    for step in range(60):
        output = method.losses(method.make_views(volumes, generators([0, 1, 2, 3], step)), 0.0)
        optimizer.zero_grad()
        output.losses["restoration"].backward()
        optimizer.step()
        values.append(output.losses["restoration"].item())
        unchanged.append(output.monitors["restoration_of_unchanged"].item())
    assert sum(values[-10:]) < sum(unchanged[-10:])
