"""MAE on tiny U-Nets in 2D and anisotropic 3D and on a tiny Primus: its loss by loops, what it sees, what leaves."""

import math

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.mae import MAE
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network, stage_strides
from tests.nnssl.methods.test_alice import PRIMUS
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
NETWORKS = {
    "slices": (2, architecture(2, False, False)),
    "plain": (3, architecture(3, False, False)),
    "residual": (3, architecture(3, True, False)),
    "primus": (3, PRIMUS),
}
networks = pytest.mark.parametrize("name", NETWORKS)
ways = pytest.mark.parametrize(
    ("name", "overrides"),
    [*((name, ()) for name in NETWORKS), *((name, ("sparse=true",)) for name in NETWORKS if name != "primus")],
    ids=lambda value: value if isinstance(value, str) else "".join(value) or "dense",
)


def make_stage(name: str, *overrides: str):
    dim, network = NETWORKS[name]
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(MAE, planned(configuration), "mae.recovery", ("mask_ratio=0.5", *overrides))
    built = build_network(network, CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return built, MAE(built, settings, configuration)


def make_batch(name: str, batch: int = 4) -> torch.Tensor:
    shape = PATCHES[NETWORKS[name][0]]
    return 3 + 2 * torch.randn(batch, CHANNELS, *shape, generator=torch.Generator().manual_seed(3))


def generators(samples: list[int]):
    return sample_generators(0, "mae.recovery", 0, samples)


def views_of(method: MAE, name: str):
    return method.make_views(make_batch(name), generators([0, 1, 2, 3]))


@networks
def test_targets_are_standardised_and_the_share_of_cells_is_masked(name):
    _, method = make_stage(name)
    views = views_of(method, name)
    flat = views.target.flatten(2)
    torch.testing.assert_close(flat.mean(dim=2), torch.zeros(4, CHANNELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.var(dim=2, correction=0), torch.ones(4, CHANNELS), atol=1e-4, rtol=0)
    cells = math.prod(method.grid)
    assert (views.mask.sum(dim=1) == math.ceil(0.5 * cells)).all()
    assert not torch.equal(views.mask[0], views.mask[1])
    assert not views.mask.gather(1, views.visible).any()
    if name != "primus":  # cells are the positions of the bottleneck
        assert method.cell_vox == stage_strides(method.network.encoder, len(method.grid))[-1]
    still = make_stage(name, "flip_probability=0")[1].make_views(make_batch(name), generators([0, 1, 2, 3]))
    volumes = make_batch(name)
    mean, deviation = volumes.flatten(2).mean(dim=2), volumes.flatten(2).std(dim=2, correction=0)
    expected = (volumes.flatten(2) - mean[..., None]) / deviation[..., None]
    torch.testing.assert_close(still.target.flatten(2), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(still.patches, volumes)  # the network sees what fine-tuning shows it


@ways
def test_loss_is_the_squared_error_of_masked_voxels(name, overrides):
    _, method = make_stage(name, *overrides)
    views = views_of(method, name)
    with torch.no_grad():
        recovered = method.recover(views.patches, views.mask, views.visible)
        output = method.losses(views, 0.0)
    total, of_constant, count = 0.0, 0.0, 0
    for sample in range(4):
        for cell, masked in enumerate(views.mask[sample].tolist()):
            if not masked:
                continue
            place = torch.unravel_index(torch.tensor(cell), method.grid)
            box = tuple(
                slice(int(at) * size, (int(at) + 1) * size) for at, size in zip(place, method.cell_vox, strict=True)
            )
            voxels = views.target[(sample, slice(None), *box)].flatten()
            total += float((recovered[sample, cell] - voxels).square().sum())
            of_constant += float(voxels.square().sum())
            count += len(voxels)
    assert output.losses["recovery"].item() == pytest.approx(total / count, rel=1e-4)
    assert output.monitors["recovery_of_constant"].item() == pytest.approx(of_constant / count, rel=1e-4)
    assert output.embeddings is None


@ways
def test_masked_voxels_cannot_be_seen(name, overrides):
    _, method = make_stage(name, *overrides)
    method.eval()
    views = views_of(method, name)
    hidden = views.mask.unflatten(1, method.grid)
    for axis, size in enumerate(method.cell_vox, start=1):
        hidden = hidden.repeat_interleave(size, dim=axis)
    changed = torch.where(hidden[:, None], 50 * torch.randn_like(views.patches), views.patches)
    with torch.no_grad():
        torch.testing.assert_close(
            method.recover(views.patches, views.mask, views.visible), method.recover(changed, views.mask, views.visible)
        )
        other = views.patches + 1.0 * torch.randn_like(views.patches)
        assert not torch.allclose(
            method.recover(views.patches, views.mask, views.visible), method.recover(other, views.mask, views.visible)
        )


@networks
def test_views_depend_on_their_own_sample_alone(name):
    _, method = make_stage(name)
    together = views_of(method, name)
    alone = method.make_views(make_batch(name)[2:3], generators([2]))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other[2:3])


@ways
def test_what_is_exported_learns_and_nothing_else(name, overrides):
    network, method = make_stage(name, *overrides)
    with torch.no_grad():  # residual blocks start as identities, which stop gradients
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD([p for group in method.parameter_groups() for p in group.parameters], 0.1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    method.losses(views_of(method, name), 0.0).losses["recovery"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    optimizer.step()
    prefixes = method.exported().pretrained
    assert ("decoder.stages." in prefixes) == (name != "primus")
    for key, value in network.state_dict().items():
        if key.startswith(prefixes):
            # a bias before instance normalisation changes nothing, so its gradient is rounding
            assert not torch.equal(value, before[key]) or key.endswith("bias"), key
        else:
            assert torch.equal(value, before[key]), key
    decaying = {id(p) for group in method.parameter_groups() if group.weight_decay for p in group.parameters}
    assert all((id(p) in decaying) == (p.squeeze().ndim > 1) for p in method.parameters() if p.requires_grad)


@ways
def test_some_steps_recover_more_than_a_constant(name, overrides):
    _, method = make_stage(name, *overrides, "flip_probability=0")
    optimizer = torch.optim.Adam([p for group in method.parameter_groups() for p in group.parameters], 3e-3)
    axes = torch.meshgrid(*(torch.arange(n) / n for n in PATCHES[NETWORKS[name][0]]), indexing="ij")
    wave = torch.stack([torch.sin(7 * axes[-1] + phase) + torch.cos(5 * axes[-2]) for phase in range(4)])
    volumes = wave[:, None].repeat(1, CHANNELS, *(1,) * (wave.ndim - 1))
    for step in range(60):
        output = method.losses(
            method.make_views(volumes, sample_generators(0, "mae.recovery", step, [0, 1, 2, 3])), 0.0
        )
        optimizer.zero_grad()
        output.losses["recovery"].backward()
        optimizer.step()
    assert output.losses["recovery"] < 0.7 * output.monitors["recovery_of_constant"]


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(UserError, match="mask_ratio must leave some of 30 tokens visible and some masked"):
        make_stage("slices", "mask_ratio=0.99")
    with pytest.raises(UserError, match="flip_axes must be axes of a patch of 2 axes, got 2"):
        make_stage("slices", "flip_axes=2")
