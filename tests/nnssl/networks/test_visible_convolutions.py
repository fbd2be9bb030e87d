"""The sparse encoder on tiny U-Nets: nothing of masked voxels enters, and statistics are those of visible positions."""

import pytest
import torch

from nnssl.networks.backbone import build_network, stage_strides
from nnssl.networks.visible_convolutions import SkipTokens, enlarge, visible_maps
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

KINDS = [(dim, residual) for dim in (2, 3) for residual in (False, True)]
kinds = pytest.mark.parametrize(("dim", "residual"), KINDS, ids=lambda value: str(value))


def encoder_and_mask(dim: int, residual: bool):
    network = build_network(architecture(dim, residual, False), 2, 3, seed=0)
    stride = stage_strides(network.encoder, dim)[-1]
    grid = [n // step for n, step in zip(PATCHES[dim], stride, strict=True)]
    shown = torch.rand(3, *grid, generator=torch.Generator().manual_seed(4)) < 0.4
    shown[(slice(None), *(0,) * dim)] = True
    return network.encoder, shown


@kinds
def test_masked_voxels_do_not_matter_and_masked_positions_are_empty(dim, residual):
    encoder, shown = encoder_and_mask(dim, residual)
    volumes = torch.randn(3, 2, *PATCHES[dim])
    maps = visible_maps(encoder, volumes, shown)
    changed = torch.where(enlarge(shown, PATCHES[dim]), volumes, 100 * torch.randn_like(volumes))
    for one, other in zip(maps, visible_maps(encoder, changed, shown), strict=True):
        torch.testing.assert_close(one, other)
        hidden = ~enlarge(shown, one.shape[2:]).expand_as(one)
        assert not one[hidden].any()
        assert one[~hidden].abs().mean() > 0.05


@kinds
def test_with_everything_visible_the_maps_are_those_of_the_encoder(dim, residual):
    encoder, shown = encoder_and_mask(dim, residual)
    volumes = torch.randn(3, 2, *PATCHES[dim])
    maps = visible_maps(encoder, volumes, torch.ones_like(shown))
    expected = encoder(volumes)
    assert len(maps) == len(expected)
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@kinds
def test_statistics_are_those_of_visible_positions(dim, residual):
    encoder, shown = encoder_and_mask(dim, residual)
    found = []
    norms = [each for each in encoder.modules() if isinstance(each, (torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d))]
    hooks = [each.register_forward_hook(lambda module, inputs, output: found.append(output.clone())) for each in norms]
    visible_maps(encoder, torch.randn(3, 2, *PATCHES[dim]), shown)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(norms)
    for features in found:
        mask = enlarge(shown, features.shape[2:])[:, 0]
        for sample in range(3):
            seen = features[sample][:, mask[sample]]
            if seen.shape[1] > 1:  # a single position has no variance
                torch.testing.assert_close(seen.mean(dim=1), torch.zeros(len(seen)), atol=1e-4, rtol=0)
                assert (seen.var(dim=1, correction=0) <= 1.001).all()


@kinds
def test_the_encoder_is_left_as_it_was_and_recomputing_changes_nothing(dim, residual):
    encoder, shown = encoder_and_mask(dim, residual)
    volumes = torch.randn(3, 2, *PATCHES[dim])
    before = encoder(volumes)
    gradients = []
    for recompute in (False, True):
        encoder.zero_grad()
        torch.stack([each.square().sum() for each in visible_maps(encoder, volumes, shown, recompute)]).sum().backward()
        gradients.append([each.grad.clone() for each in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(before, encoder(volumes), strict=True):
        assert torch.equal(one, other)
    assert all("forward" not in vars(each) and not each._forward_hooks for each in encoder.modules())


def test_tokens_stand_at_masked_positions_and_learn():
    tokens = SkipTokens([3, 5])
    shown = torch.tensor([[[True, False], [False, False]]])
    maps = [torch.randn(1, 3, 4, 4) * enlarge(shown, (4, 4)), torch.randn(1, 5, 2, 2) * enlarge(shown, (2, 2))]
    filled = tokens(maps, shown)
    for features, made, token in zip(maps, filled, tokens.tokens, strict=True):
        visible = enlarge(shown, features.shape[2:]).expand_as(features)
        assert torch.equal(made[visible], features[visible])
        assert torch.equal(made[0, :, -1, -1], token)
    filled[0].sum().backward()
    assert torch.equal(tokens.tokens[0].grad, torch.full((3,), 12.0))
    assert tokens.tokens[1].grad is None
