"""Prototypes against loops over points, and logits of maps against those of interpolated features."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from nnssl.propagation import prototypes as module
from nnssl.propagation.confidence import expected_dice
from nnssl.propagation.prototypes import POSITION_UNIT, LabelPrototypes, fit_prototypes, fit_scale
from nnssl.views.points import interpolate_at

WIDTHS = (3, 2)


def make_points(count: int = 40):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(count, sum(WIDTHS), generator=generator) * torch.tensor([1, 5, 0.1, 2, 1.0]) + 7
    labels = torch.arange(count) % 3
    return features + labels[:, None], torch.rand(count, 3, generator=generator), labels


def fit(prototypes=(4, 2, 2), weight=0.3, **changes) -> LabelPrototypes:
    features, positions, labels = make_points()
    arguments = dict(widths=WIDTHS, counts=prototypes, position_weight=weight, temperature=0.2, seed=0)
    return fit_prototypes(features, positions, labels, **{**arguments, **changes})


def test_every_map_has_the_same_variance_and_constant_features_none():
    features, _, _ = make_points()
    features[:, 1] = 4
    scaled = fit_scale(features, WIDTHS).apply(features)
    variance = scaled.var(dim=0, correction=0)
    assert variance.tolist() == pytest.approx([1 / 6, 0, 1 / 6, 1 / 4, 1 / 4], abs=1e-5)
    assert scaled.mean(dim=0).abs().max() < 1e-5


def test_logits_are_those_of_a_loop_over_points_and_prototypes():
    fitted = fit()
    features, positions, _ = make_points(7)
    found = fitted.logits(features, positions)
    for row in range(7):
        best = [math.inf] * 3
        for centre, label in zip(fitted.centres.tolist(), fitted.labels.tolist(), strict=True):
            squared = 0.0
            for place in range(5):
                value = (features[row, place] - fitted.scaling.mean[place]) * fitted.scaling.scale[place]
                squared += (value.item() - centre[place]) ** 2
            for axis in range(3):
                squared += (positions[row, axis].item() * math.sqrt(0.3) / POSITION_UNIT - centre[5 + axis]) ** 2
            best[label] = min(best[label], squared)
        assert found[row].tolist() == pytest.approx([-each / 0.2 for each in best], rel=1e-4)


@pytest.mark.parametrize("shape", [(6, 10), (4, 6, 10)])
def test_probabilities_of_maps_equal_those_of_interpolated_features(shape):
    fitted = fit()
    generator = torch.Generator().manual_seed(5)
    coarse = tuple(n // 2 for n in shape)
    maps = [torch.randn(1, 3, *coarse, generator=generator) + 7, torch.randn(1, 2, *shape, generator=generator) + 7]
    positions = torch.rand(3, *shape, generator=generator)
    found = fitted.logits_of_maps(maps, positions).flatten(1).T.softmax(dim=1)
    points = torch.cartesian_prod(*(torch.arange(n) for n in shape)).float()[None]
    features = torch.cat([interpolate_at(each, points, shape)[0] for each in maps], dim=1)
    expected = fitted.logits(features, positions.flatten(1).T).softmax(dim=1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert found.argmax(dim=1).unique().tolist() == [0, 1, 2]


def test_as_many_prototypes_as_points_give_every_point_its_label_back():
    features, positions, labels = make_points()
    fitted = fit(prototypes=(99, 99, 99))
    assert len(fitted.centres) == len(labels)
    assert torch.equal(fitted.logits(features, positions).argmax(dim=1), labels)


def test_one_prototype_is_the_mean_of_its_points():
    features, positions, labels = make_points()
    fitted = fit(prototypes=(1, 1, 1), weight=0.0)
    scaled = fitted.scaling.apply(features)
    for label in range(3):
        assert torch.allclose(fitted.centres[label, :5], scaled[labels == label].mean(dim=0), atol=1e-5)
    assert fitted.labels.tolist() == [0, 1, 2]


def test_without_weight_the_position_does_not_matter():
    features, positions, _ = make_points()
    fitted = fit(weight=0.0)
    assert torch.equal(fitted.logits(features, positions), fitted.logits(features, 1 - positions))
    assert not torch.allclose(fit().logits(features, positions), fit().logits(features, 1 - positions))
    assert module.POSITION_UNIT == 0.1


def test_expected_dice_is_that_of_a_loop_over_voxels():
    rng = np.random.default_rng(0)
    probabilities = softmax(3 * rng.standard_normal((4, 3, 4, 5)), axis=0)
    probabilities[3] = 0  # a label that is found nowhere
    probabilities /= probabilities.sum(axis=0)
    assigned = probabilities.argmax(axis=0)
    for label, found in enumerate(expected_dice(probabilities, assigned), start=1):
        common = total = 0.0
        for voxel in np.ndindex(*assigned.shape):
            p, y = probabilities[(label, *voxel)], assigned[voxel] == label
            common, total = common + p * y, total + p + y
        assert found == pytest.approx(2 * common / total if (assigned == label).any() else 0)
    certain = np.eye(3)[:, assigned % 3]
    assert expected_dice(certain, assigned % 3).tolist() == [1, 1]
