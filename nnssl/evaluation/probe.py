"""A linear segmentation probe: how much of the classes can be read off frozen features of voxels by a linear layer.

The features of a voxel are those of all encoder stages, and of the decoder stages where the decoder is pretrained, side by
side. Multinomial logistic regression is fitted to voxels of a few labelled tiles, every class with the same number of
voxels where there are enough, and scored by the Dice on tiles of other cases.

A linear layer commutes with interpolation: so whole tiles are predicted by applying the layer to every map at the map's own
resolution and adding up the interpolated results. Features of full resolution are never made.

Source: linear probing of dense features as in Seince et al., Pix2Rep, MIDL 2024; logistic regression is scikit-learn's.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnssl.draws import make_generator
from nnssl.networks.dense import decoder_maps
from nnssl.views.points import interpolate_at

IGNORED = -1
"""Label of voxels that are neither fitted nor scored."""
POINTS_PER_CLASS = 50
"""Voxels of each class that are drawn from a tile."""
REGULARISATION = 1.0
"""scikit-learn's ``C``."""
ITERATIONS = 100
"""Of the fit at most; it need not converge to the last digit."""


@dataclass(frozen=True)
class LabelledTile:
    """Part of a labelled case as a network sees it."""

    case: str
    volume: Float[np.ndarray, " channel *shape"]
    labels: Int[np.ndarray, "*shape"]
    """Class values; ``IGNORED`` where nothing is known."""


@dataclass(frozen=True)
class LinearProbe:
    """One linear layer for every map, whose results add up to the logits of the classes."""

    classes: tuple[int, ...]
    weights: tuple[Float[Tensor, "class channel"], ...]
    bias: Float[Tensor, " class"]

    def logits(self, maps: Sequence[Tensor], shape: Sequence[int]) -> Float[Tensor, "batch class *shape"]:
        """Return the logits of all voxels of a patch.

        Args:
            maps: feature maps (batch, channel, *grid) of any resolution that cover the patch.
            shape: voxels of the patch.
        """
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        total = self.bias.view(1, -1, *[1] * len(shape))
        for weight, each in zip(self.weights, maps, strict=True):
            own = torch.einsum("kc,bc...->bk...", weight, each.float())
            if tuple(own.shape[2:]) != tuple(shape):
                own = F.interpolate(own, tuple(shape), mode=mode, align_corners=False)
            total = total + own
        return total


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Compute features as in prediction and leave everything as it was: modes, gradients, random numbers."""
    modes = {name: module.training for name, module in network.named_modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for name, module in network.named_modules():
            module.training = modes[name]


def probe_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"], with_decoder: bool) -> list[Tensor]:
    """Return the maps that the probe reads: all encoder stages, and the decoder's where asked for.

    Args:
        network: as ``nnssl.networks.dense.decoder_maps`` takes it.
        volumes: patches.
        with_decoder: whether the decoder says something.
    """
    skips = list(network.encoder(volumes))
    return [*skips, *decoder_maps(network, volumes)[1:]] if with_decoder else skips


def fit_probe(
    network: Any,
    tiles: Sequence[LabelledTile],
    classes: Sequence[int],
    with_decoder: bool,
    seed: int,
    device: torch.device,
) -> LinearProbe:
    """Fit the probe to labelled tiles.

    Args:
        network: frozen here, put back afterwards.
        tiles: to learn from.
        classes: values that are told apart, background included.
        with_decoder: as ``probe_maps``.
        seed: of the drawn voxels.
        device: where the network is.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    rows, targets, widths = [], [], []
    with frozen(network):
        for number, tile in enumerate(tiles):
            points = draw_labelled_points(tile.labels, classes, seed, number)
            if not len(points):
                continue
            maps = probe_maps(network, torch.from_numpy(tile.volume)[None].to(device), with_decoder)
            widths = [each.shape[1] for each in maps]
            places = torch.from_numpy(points).float().to(device)[None]
            features = [interpolate_at(each, places, tile.labels.shape)[0] for each in maps]
            rows.append(torch.cat(features, dim=1).cpu().numpy())
            targets.append(tile.labels[tuple(points.T)])
    values, target = np.concatenate(rows), np.concatenate(targets)
    mean, std = values.mean(axis=0), values.std(axis=0)
    std[std < 1e-6] = np.inf  # a feature that does not vary says nothing
    present = np.unique(target)
    weight, bias = np.zeros((len(classes), values.shape[1])), np.full(len(classes), -1e4)
    if len(present) == 1:
        bias[list(classes).index(int(present[0]))] = 0.0
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged: good enough
            model = LogisticRegression(C=REGULARISATION, max_iter=ITERATIONS).fit((values - mean) / std, target)
        own, offset = model.coef_, model.intercept_
        if len(present) == 2:  # scikit-learn has one row for two classes
            own, offset = np.concatenate([-own, own]) / 2, np.concatenate([-offset, offset]) / 2
        for row, value in enumerate(present):
            place = list(classes).index(int(value))
            weight[place] = own[row] / std
            bias[place] = offset[row] - weight[place] @ mean
    parts = torch.from_numpy(weight).float().to(device).split(widths, dim=1)
    return LinearProbe(tuple(classes), tuple(parts), torch.from_numpy(bias).float().to(device))


def score_probe(
    network: Any, probe: LinearProbe, tiles: Sequence[LabelledTile], with_decoder: bool, device: torch.device
) -> dict[int, float | None]:
    """Return the Dice of every class but the first over all voxels of the tiles; None for one that is nowhere.

    Args:
        network: frozen here, put back afterwards.
        probe: fitted to other tiles.
        tiles: to score on.
        with_decoder: as ``probe_maps``.
        device: where the network is.
    """
    counts = dict.fromkeys(probe.classes[1:], (0, 0))
    with frozen(network):
        for tile in tiles:
            maps = probe_maps(network, torch.from_numpy(tile.volume)[None].to(device), with_decoder)
            found = probe.logits(maps, tile.labels.shape)[0].argmax(dim=0).cpu().numpy()
            predicted, known = np.array(probe.classes)[found], tile.labels != IGNORED
            for value, (common, total) in counts.items():
                ours, theirs = (predicted == value) & known, tile.labels == value
                counts[value] = common + int((ours & theirs).sum()), total + int(ours.sum()) + int(theirs.sum())
    return {value: 2 * common / total if total else None for value, (common, total) in counts.items()}


def mean_dice(dice: Mapping[int, float | None]) -> float:
    """Return the mean over the classes that are somewhere; NaN if none is."""
    values = [value for value in dice.values() if value is not None]
    return float(np.mean(values)) if values else float("nan")


def draw_labelled_points(
    labels: Int[np.ndarray, "*shape"], classes: Sequence[int], seed: int, number: int
) -> Int[np.ndarray, "points d"]:
    """Draw up to ``POINTS_PER_CLASS`` voxels of every class, without replacement.

    Args:
        labels: of a tile.
        classes: that are drawn.
        seed: of the probe.
        number: of the tile; together they decide the draw.
    """
    generator = make_generator(seed, "probe/points", number)
    chosen = []
    for value in classes:
        places = np.argwhere(labels == value)
        order = torch.randperm(len(places), generator=generator).numpy()
        chosen.append(places[order[:POINTS_PER_CLASS]])
    return np.concatenate(chosen)
