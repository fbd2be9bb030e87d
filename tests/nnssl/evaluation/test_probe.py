"""The linear probe, compared with features at full resolution, and on classes that a feature separates."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl.evaluation.probe import (
    IGNORED,
    LabelledTile,
    LinearProbe,
    draw_labelled_points,
    fit_probe,
    mean_dice,
    probe_maps,
    score_probe,
)
from nnssl.networks.backbone import build_network
from nnssl.views.points import interpolate_at
from tests.nnssl.networks.test_hybrid import architecture

CPU = torch.device("cpu")
SHAPES = [(9, 14), (6, 9, 14)]


class Encoder(nn.Module):
    """Encoder with two maps: the voxels, and their mean over blocks of two."""

    def forward(self, volumes):
        pool = F.avg_pool2d if volumes.ndim == 4 else F.avg_pool3d
        return [volumes, pool(volumes, 2, ceil_mode=True)]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.dropout = nn.Dropout(0.5)


def make_tile(seed, shape, shuffled=False):
    """Return a tile with class 1 bright and class 2 dark in channel 0, and noise in channel 1."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int16)
    labels[..., 1:4, 2:8], labels[..., 5:8, 6:13] = 1, 2
    volume = 0.3 * rng.standard_normal((2, *shape))
    volume[0] += np.array([0.0, 2.0, -2.0])[labels]
    if shuffled:
        labels = rng.permutation(labels.ravel()).reshape(shape)
    return LabelledTile(f"case_{seed}", volume.astype(np.float32), labels)


@pytest.mark.parametrize("shape", SHAPES)
def test_separable_classes_are_found_and_shuffled_labels_are_not(shape):
    network = Network()
    for shuffled in (False, True):
        train, test = ([make_tile(seed, shape, shuffled) for seed in seeds] for seeds in ((0, 1), (2, 3)))
        probe = fit_probe(network, train, (0, 1, 2), False, 0, CPU)
        dice = mean_dice(score_probe(network, probe, test, False, CPU))
        assert dice < 0.4 if shuffled else dice > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_tiles_are_predicted_as_if_features_had_been_interpolated(shape):
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, width, *(max(1, n // step) for n in shape), generator=generator)
        for width, step in ((3, 1), (5, 3))
    ]
    weights = tuple(torch.randn(4, each.shape[1], generator=generator) for each in maps)
    bias = torch.randn(4, generator=generator)
    every = (
        torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).flatten(0, -2)[None].float()
    )
    features = torch.cat([interpolate_at(each, every, shape) for each in maps], dim=2)[0]
    expected = features @ torch.cat(weights, dim=1).T + bias
    found = LinearProbe((0, 1, 2, 3), weights, bias).logits(maps, shape)
    torch.testing.assert_close(found[0].flatten(1).T, expected, atol=1e-5, rtol=1e-5)


def test_fit_is_logistic_regression_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network, tile = Network(), make_tile(0, (9, 14))
    probe = fit_probe(network, [tile], (0, 1, 2), False, 5, CPU)
    points = draw_labelled_points(tile.labels, (0, 1, 2), 5, 0)
    volume = torch.from_numpy(tile.volume)[None]
    maps = probe_maps(network, volume, False)
    features = torch.cat([interpolate_at(m, torch.from_numpy(points).float()[None], (9, 14)) for m in maps], dim=2)[0]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100)).fit(
        features, tile.labels[tuple(points.T)]
    )
    ours = probe.logits(maps, (9, 14))[0][:, points[:, 0], points[:, 1]].T.softmax(dim=1)
    np.testing.assert_allclose(ours.numpy(), model.predict_proba(features), atol=1e-3)


def test_classes_that_are_missing_are_not_predicted():
    network, tile = Network(), make_tile(0, (9, 14))
    without = LabelledTile("a", tile.volume, np.where(tile.labels == 2, 0, tile.labels).astype(np.int16))
    probe = fit_probe(network, [without], (0, 1, 2, 7), False, 0, CPU)
    dice = score_probe(network, probe, [tile], False, CPU)
    assert dice[2] == 0
    assert dice[7] is None
    assert dice[1] > 0.8
    background = LabelledTile("a", tile.volume, np.zeros_like(tile.labels))
    only = fit_probe(network, [background], (0, 1), False, 0, CPU)
    assert score_probe(network, only, [tile], False, CPU) == {1: 0.0}


def test_ignored_voxels_are_neither_fitted_nor_scored():
    tile = make_tile(0, (9, 14))
    unknown = tile.labels.copy()
    unknown[5:] = IGNORED
    assert not (draw_labelled_points(unknown, (0, 1, 2), 0, 0)[:, 0] >= 5).any()
    probe = fit_probe(Network(), [tile], (0, 1, 2), False, 0, CPU)
    assert score_probe(Network(), probe, [LabelledTile("a", tile.volume, unknown)], False, CPU)[2] in (None, 0.0)


def test_points_are_the_same_number_of_every_class():
    labels = np.zeros((40, 40), np.int16)
    labels[:20], labels[35:, 36:] = 1, 2
    points = draw_labelled_points(labels, (0, 1, 2), 0, 0)
    values, counts = np.unique(labels[tuple(points.T)], return_counts=True)
    assert dict(zip(values, counts, strict=True)) == {0: 50, 1: 50, 2: 20}
    assert len(np.unique(points, axis=0)) == len(points)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("hybrid", [False, True])
def test_everything_is_left_as_it_was(dimensions, hybrid):
    network = build_network(architecture(dimensions, False, hybrid), 2, 3, 0).train()
    network.decoder.stages.eval()
    shape = (12, 20) if dimensions == 2 else (4, 12, 20)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tile = make_tile(0, shape)
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    probe = fit_probe(network, [tile], (0, 1, 2), True, 0, CPU)
    dice = score_probe(network, probe, [tile], True, CPU)
    assert torch.equal(torch.rand(5), expected)
    assert network.encoder.training
    assert not network.decoder.stages.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert dice == score_probe(network, fit_probe(network, [tile], (0, 1, 2), True, 0, CPU), [tile], True, CPU)
    with_decoder, without = (len(probe_maps(network, torch.zeros(1, 2, *shape), each)) for each in (True, False))
    assert with_decoder == 2 * without - 1
