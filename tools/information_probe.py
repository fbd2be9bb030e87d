"""Measure what frozen encoder features know about the pose of a crop: PCRL's test of rotation and relative position.

Crops with equal in-plane sides are taken from the body in the pretraining images. Rotation: by how many quarter turns a crop was
rotated in the plane of the last two axes. Relative position: on which side of a crop its neighbour lies along these axes, given
the features of both. A linear classifier reads the bottleneck's feature map, averaged on a grid of two cells per axis. It is
trained on the crops of most patients and evaluated on the others. The chance level of both tasks is 0.25::

    python -m tools.information_probe --weights CHECKPOINT CHECKPOINT
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.data.patients import patient_in_name
from nnssl.networks.backbone import encoder_strides
from nnssl.paths import resolve_folders
from nnssl.pictures.dense_network import dense_network_of
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases

SHIFTS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Offsets of the neighbour along the last two axes, in sides of a crop."""


def crop_side(patch: tuple[int, ...], strides: list[list[int]]) -> tuple[int, ...]:
    """Return the size of a crop: half of the patch's shorter in-plane side, rounded down to a multiple of the stride."""
    stride = np.prod(strides, axis=0)
    in_plane = int(max(stride[-2:]))
    side = max(in_plane, min(patch[-2:]) // 2 // in_plane * in_plane)
    return (*patch[:-2], side, side)


def read_crops(
    case: StoredCase, size: tuple[int, ...], flat: bool, rng: np.random.Generator, count: int
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Return crops around stored voxels of the body, a neighbour of each crop, and the side on which the neighbour lies."""
    found = []
    box = (1, *size) if flat else size
    for centre in rng.permutation(case.foreground_vox)[:count]:
        side = int(rng.integers(4))
        lower = centre - np.array(box) // 2
        moved = lower + np.array([0, *(shift * length for shift, length in zip(SHIFTS[side], size[-2:], strict=True))])
        pair = [torch.from_numpy(case.read_box(each.tolist(), box)) for each in (lower, moved)]
        found.append((*((each.squeeze(1) if flat else each) for each in pair), side))
    return found


@torch.no_grad()
def features(encoder: Any, crops: list[torch.Tensor]) -> np.ndarray:
    """Return the bottleneck's feature map on a grid of two cells per axis, one row per crop."""
    pool: Any = F.adaptive_avg_pool3d if crops[0].ndim == 4 else F.adaptive_avg_pool2d
    return torch.cat([pool(encoder(crop[None])[-1], 2).flatten(1) for crop in crops]).numpy()


def accuracy(rows: np.ndarray, classes: np.ndarray, held_out: np.ndarray) -> float:
    """Return the accuracy of a linear classifier on the held-out rows."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    classifier.fit(rows[~held_out], classes[~held_out])
    return float(classifier.score(rows[held_out], classes[held_out]))


def measure(encoder: Any, store: CaseStore, size: tuple[int, ...], flat: bool, crops_per_case: int) -> list[float]:
    """Return the accuracies for rotation and relative position."""
    rng = np.random.default_rng(0)
    patients = sorted({patient_in_name(name) for name in store.names})
    judged = set(patients[: max(1, len(patients) // 4)])
    crops, neighbours, sides, held_out = [], [], [], []
    for name in store.names:
        for crop, neighbour, side in read_crops(store.case(name), size, flat, rng, crops_per_case):
            crops.append(crop)
            neighbours.append(neighbour)
            sides.append(side)
            held_out.append(patient_in_name(name) in judged)
    turns = rng.integers(4, size=len(crops))
    turned = [torch.rot90(crop, int(turn), (-2, -1)) for crop, turn in zip(crops, turns, strict=True)]
    chosen = np.array(held_out)
    pairs = np.concatenate([features(encoder, crops), features(encoder, neighbours)], axis=1)
    return [accuracy(features(encoder, turned), turns, chosen), accuracy(pairs, np.array(sides), chosen)]


def main() -> None:
    """Print one row for random weights and one for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="checkpoints of nnssl_pretrain")
    parser.add_argument("--crops-per-case", type=int, default=20, help="(default: 20)")
    args = parser.parse_args()
    print("| encoder | rotation | relative position |\n|---|---|---|")
    for place, path in enumerate([args.weights[0], *args.weights]):
        weights = open_checkpoint(path)
        network, provenance = dense_network_of(weights, "pyramid", torch.device("cpu")), weights.own_provenance
        encoder = network.network.encoder
        if not place:
            torch.manual_seed(0)
            encoder.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
        patch = weights.plan.configuration(provenance.configuration).patch_size
        architecture = provenance.plans["configurations"][provenance.configuration]["architecture"]
        store = open_cases(provenance, provenance.dataset_name, resolve_folders())
        size = crop_side(patch, encoder_strides(architecture))
        found = measure(encoder, store, size, network.two_dimensional, args.crops_per_case)
        label = provenance.stage if place else "random"
        print(f"| {label} | {' | '.join(f'{value:.3f}' for value in found)} |")


if __name__ == "__main__":
    main()
