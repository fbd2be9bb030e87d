"""A linear segmentation probe, which measures how well a linear layer separates classes by frozen features of voxels.

The features of a voxel are those of all encoder stages and, if the decoder is pretrained, of its stages, concatenated.
Multinomial logistic regression is fitted to voxels of a few labelled tiles, with the same number of voxels per class where
there are enough. The score is the Dice on tiles of other cases.

A linear layer commutes with interpolation. Whole tiles are therefore predicted by applying the layer to each map at its own
resolution and summing the interpolated results, without computing features at full resolution.

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
"""Label of voxels that are excluded from fit and score."""
POINTS_PER_CLASS = 50
"""Number of voxels of each class that are drawn from a tile."""
REGULARISATION = 1.0
"""scikit-learn's ``C``, the inverse strength of the regularisation."""
ITERATIONS = 100
"""Largest number of iterations of the fit, which need not converge to the last digit."""


@dataclass(frozen=True)
class LabelledTile:
    """A patch of a labelled case."""

    case: str
    volume: Float[np.ndarray, " channel *shape"]
    labels: Int[np.ndarray, "*shape"]
    """Class values; ``IGNORED`` for unlabelled voxels."""


@dataclass(frozen=True)
class LinearProbe:
    """One linear layer per feature map; the sum of their outputs is the logits of the classes."""

    classes: tuple[int, ...]
    weights: tuple[Float[Tensor, "class channel"], ...]
    bias: Float[Tensor, " class"]

    def logits(self, maps: Sequence[Tensor], shape: Sequence[int]) -> Float[Tensor, "batch class *shape"]:
        """Return the logits of all voxels of a patch.

        Args:
            maps: Feature maps (batch, channel, *grid) of any resolution that cover the patch.
            shape: Shape of the patch in voxels.
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
    """Switch a network to inference and restore its modes and the random state afterwards; no gradients are computed."""
    modes = {name: module.training for name, module in network.named_modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for name, module in network.named_modules():
            module.training = modes[name]


def probe_maps(network: Any, volumes: Float[Tensor, "batch channel *shape"], with_decoder: bool) -> list[Tensor]:
    """Return the feature maps of the probe: all encoder stages and, on request, the decoder stages.

    Args:
        network: Network that ``nnssl.networks.dense.decoder_maps`` accepts.
        volumes: Patches.
        with_decoder: Whether to include the decoder stages.
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
        network: Network, which is frozen during the fit and restored afterwards.
        tiles: Tiles of the training cases.
        classes: Class values to separate, including the background.
        with_decoder: Whether to use the decoder stages.
        seed: Random seed of the drawn voxels.
        device: Device of the network.
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
    std[std < 1e-6] = np.inf  # a constant feature carries no information
    present = np.unique(target)
    weight, bias = np.zeros((len(classes), values.shape[1])), np.full(len(classes), -1e4)
    if len(present) == 1:
        bias[list(classes).index(int(present[0]))] = 0.0
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fit that has not converged is good enough
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
    """Return the Dice of every class except the first over all voxels of the tiles; None for an absent class.

    Args:
        network: Network, which is frozen during the prediction and restored afterwards.
        probe: Probe fitted to other tiles.
        tiles: Tiles of the test cases.
        with_decoder: Whether to use the decoder stages.
        device: Device of the network.
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
    """Return the mean over the classes that occur; NaN if none does."""
    values = [value for value in dice.values() if value is not None]
    return float(np.mean(values)) if values else float("nan")


def draw_labelled_points(
    labels: Int[np.ndarray, "*shape"], classes: Sequence[int], seed: int, number: int
) -> Int[np.ndarray, "points d"]:
    """Draw up to ``POINTS_PER_CLASS`` voxels of every class, without replacement.

    Args:
        labels: Class values of a tile.
        classes: Classes to draw.
        seed: Random seed of the probe.
        number: Number of the tile, which determines the draw together with the seed.
    """
    generator = make_generator(seed, "probe/points", number)
    chosen = []
    for value in classes:
        places = np.argwhere(labels == value)
        order = torch.randperm(len(places), generator=generator).numpy()
        chosen.append(places[order[:POINTS_PER_CLASS]])
    return np.concatenate(chosen)
