"""Volume Fusion on tiny networks, in 2D and in anisotropic 3D with two channels: nnU-Net's loss, its pairs, what leaves."""

import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.settings import resolve_stage
from nnssl.methods.volume_fusion import VolumeFusion
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import decoder_maps
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
dims = pytest.mark.parametrize("dim", [2, 3])


def make_stage(dim: int, *overrides: str, residual: bool = False):
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(VolumeFusion, planned(configuration), "volume_fusion.segmentation", overrides)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return network, VolumeFusion(network, settings, configuration)


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(3))


def generators(samples: list[int], step: int = 0):
    return sample_generators(0, "volume_fusion.segmentation", step, samples)


def by_loops(logits: torch.Tensor, classes: torch.Tensor, count: int) -> tuple[float, float]:
    """nnU-Net's soft Dice loss without class 0, mean over samples and classes, and the cross-entropy."""
    dice, entropy = [], []
    for own, wanted in zip(logits.double(), classes, strict=True):
        shares = own.flatten(1).softmax(dim=0)
        target = wanted.flatten()
        entropy += [-math.log(float(shares[int(k), voxel])) for voxel, k in enumerate(target)]
        for k in range(1, count):
            hit = float(shares[k][target == k].sum())
            total = float(shares[k].sum()) + int((target == k).sum())
            dice.append((2 * hit + 1e-5) / (total + 1e-5))
    return -sum(dice) / len(dice), sum(entropy) / len(entropy)


@dims
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_loss_is_that_of_nnunet(dim, residual):
    network, method = make_stage(dim, residual=residual)
    views = method.make_views(make_batch(dim), generators([0, 1, 2, 3]))
    with torch.no_grad():
        output = method.losses(views, 0.0)
        losses = output.losses
        logits = method.output(decoder_maps(network, views.fused)[-1])
    right = (logits.argmax(dim=1) == views.classes).double().mean().item()
    assert output.monitors["head_accuracy"].item() == pytest.approx(right, rel=1e-5)
    dice, entropy = by_loops(logits, views.classes, 5)
    assert losses["dice"].item() == pytest.approx(dice, rel=1e-3)
    assert losses["cross_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    kwargs = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    whole = DC_and_CE_loss(kwargs, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    assert sum(losses.values()).item() == pytest.approx(whole(logits, views.classes[:, None]).item(), rel=1e-4)


@dims
def test_every_patch_is_fused_into_its_partner(dim):
    _, method = make_stage(dim, "flip_probability=0")
    volumes = make_batch(dim)
    views = method.make_views(volumes, generators([0, 1, 2, 3]))
    for sample, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        share = views.classes[sample] / 4
        expected = share * volumes[sample] + (1 - share) * volumes[partner]
        torch.testing.assert_close(views.fused[sample], expected)
    assert views.classes.min() == 0
    assert views.classes.max() == 4
    pair = method.make_views(volumes[2:], generators([2, 3]))  # a pair depends on nothing else
    torch.testing.assert_close(pair.fused, views.fused[2:])
    assert torch.equal(pair.classes, views.classes[2:])
    flipped = make_stage(dim, "flip_probability=1")[1].make_views(volumes, generators([0, 1, 2, 3]))
    assert torch.equal(flipped.classes, views.classes)  # patches are flipped, classes belong to the fused image
    assert not torch.allclose(flipped.fused, views.fused)


@dims
def test_encoder_and_decoder_learn_and_nothing_else(dim):
    network, method = make_stage(dim)
    optimizer = torch.optim.SGD([p for group in method.parameter_groups() for p in group.parameters], 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    output = method.losses(method.make_views(make_batch(dim), generators([0, 1, 2, 3])), 0.0)
    torch.stack(list(output.losses.values())).sum().backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    optimizer.step()
    prefixes = method.exported().pretrained
    for name, value in network.state_dict().items():
        if name.startswith(prefixes):
            assert not torch.equal(value, before[name]) or name.endswith("bias"), name
        else:
            assert ".seg_layers." in name
            assert torch.equal(value, before[name]), name


@dims
def test_some_steps_find_the_coefficients(dim):
    """Patches that are constant: the fused value says the coefficient."""
    _, method = make_stage(dim, "coefficients=2")
    optimizer = torch.optim.Adam([p for group in method.parameter_groups() for p in group.parameters], 1e-2)
    volumes = torch.ones(4, CHANNELS, *PATCHES[dim])
    volumes[:, 1] = 0.0
    volumes[1::2] = volumes[1::2].flip(1)
    values = []
    for step in range(60):
        output = method.losses(method.make_views(volumes, generators([0, 1, 2, 3], step)), 0.0)
        loss = torch.stack(list(output.losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-10:]) < sum(values[:10]) - 4


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(UserError, match="batch_size must be a multiple of 2, got 3"):
        make_stage(2, "batch_size=3")
    with pytest.raises(UserError, match="boxes must be two ascending numbers, got 5,4"):
        make_stage(2, "boxes=5,4")
