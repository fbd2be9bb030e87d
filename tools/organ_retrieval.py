"""Measure whether matched points lie in the same organ; labels are used only for evaluation.

Points are drawn in every organ of each case and matched to every other case: by SAM's embeddings, by the position in the body's
box, and by embeddings with shuffled places (chance). The table shows the share of matches with the label of their point, the
median distance of matches from the organ, and the median distance from the point after matching back::

    python -m tools.organ_retrieval --weights CHECKPOINT --labelled 17 --dataset 518
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813  the usual name
import torch
import torch.nn.functional as F
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from scipy.ndimage import distance_transform_edt

from nnssl.data.case_store import CaseStore
from nnssl.data.raw import find_dataset
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddingMatcher
from nnssl.matching.points import Matches, PointMatcher, cycle_error_mm
from nnssl.paths import resolve_folders
from nnssl.pictures.matches import matcher_of
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases

POINTS = 10
"""Number of points for each organ and pair of cases."""


class ShuffledMatcher:
    """Embeddings whose places in the other case are shuffled, which gives the chance level."""

    def __init__(self, matcher: EmbeddingMatcher) -> None:
        self.matcher = matcher

    def match_points(self, query: str, points_mm: np.ndarray, key: str) -> Matches:
        """Return a random place inside the other case for every point, with NaN as score."""
        case = self.matcher.embedded(key)
        inside = case.inside.nonzero().numpy()
        cells = np.random.default_rng(0).permutation(inside)[np.arange(len(points_mm)) % len(inside)]
        centres_vox = (cells + 0.5) * np.array(case.cell_vox) - 0.5
        return Matches(centres_vox * np.array(self.matcher.store.case(key).spacing_mm), np.full(len(cells), np.nan))


def read_labels(folder: Path, name: str, shape: tuple[int, ...], axes: list[int]) -> np.ndarray:
    """Return the labels of a raw case on the grid of the preprocessed case, by nearest-neighbour interpolation."""
    image, labels = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(axes)
        for path in (folder / "imagesTr" / f"{name}_0000.nii.gz", folder / "labelsTr" / f"{name}.nii.gz")
    )
    _, _, bounds = crop_to_nonzero(image[None].astype(np.float32))
    cut = labels[tuple(slice(low, high) for low, high in bounds)].astype(np.float32)
    return F.interpolate(torch.from_numpy(cut)[None, None], shape, mode="nearest-exact")[0, 0].numpy().astype(int)


Found = dict[int, np.ndarray]
"""For each organ: whether matches lie in it, their distance from it in mm, and the distance after matching back in mm."""


def count(matchers: dict[str, PointMatcher], store: CaseStore, labels: dict[str, np.ndarray]) -> dict[str, Found]:
    """Return the results of every matcher for points of every organ, matched to every other case."""
    found: dict[str, dict[int, list[np.ndarray]]] = {name: {} for name in matchers}
    away_from = DistanceMaps(store, labels)
    # both directions of a pair follow each other, because only a few embedded scans are kept
    for pair in combinations(store.names, 2):
        for query, key in (pair, pair[::-1]):
            rng = np.random.default_rng([store.names.index(query), store.names.index(key)])
            spacing, other = (np.array(store.case(name).spacing_mm) for name in (query, key))
            last = np.array(labels[key].shape) - 1
            organs = sorted(set(np.unique(labels[query])) & set(np.unique(labels[key])) - {0})
            inside = [np.argwhere(labels[query] == organ) for organ in organs]
            points_mm = np.concatenate([each[rng.integers(len(each), size=POINTS)] for each in inside]) * spacing
            for name, matcher in matchers.items():
                # all organs at once, because a search reads every cell of the other case
                matches = matcher.match_points(query, points_mm, key)
                back = cycle_error_mm(matcher, query, points_mm, key, matches).reshape(-1, POINTS)
                voxels = np.clip(np.round(matches.points_mm / other).astype(int), 0, last).reshape(-1, POINTS, 3)
                for organ, (z, y, x), way in zip(organs, voxels.transpose(0, 2, 1), back, strict=True):
                    rows = np.stack([labels[key][z, y, x] == organ, away_from(key, organ)[z, y, x], way], axis=1)
                    found[name].setdefault(int(organ), []).append(rows)
    return {name: {organ: np.concatenate(rows).T for organ, rows in each.items()} for name, each in found.items()}


class DistanceMaps:
    """Distance of every voxel of a case from an organ in mm; each map is computed once."""

    def __init__(self, store: CaseStore, labels: dict[str, np.ndarray]) -> None:
        self.store = store
        self.labels = labels
        self.maps: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, case: str, organ: int) -> np.ndarray:
        """Return the distance map of a case and an organ, (z, y, x), in float32."""
        if (case, organ) not in self.maps:
            away = distance_transform_edt(self.labels[case] != organ, sampling=self.store.case(case).spacing_mm)
            self.maps[case, organ] = away.astype(np.float32)
        return self.maps[case, organ]


def main() -> None:
    """Print one row for each organ and one for the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the method sam")
    parser.add_argument("--labelled", required=True, help="data set with labels of the same cases, number or name")
    parser.add_argument("--dataset", help="data set with the preprocessed cases (default: that of the weights)")
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: cpu)")
    args = parser.parse_args()
    folders = resolve_folders()
    weights = open_checkpoint(args.weights)
    provenance = weights.own_provenance
    dataset = find_dataset(args.dataset, folders) if args.dataset else provenance.dataset_name
    store = open_cases(provenance, dataset, folders)
    matcher, _ = matcher_of(weights, store, torch.device(args.device))
    raw = folders.raw / find_dataset(args.labelled, folders)
    axes = provenance.plans["transpose_forward"]
    labels = {name: read_labels(raw, name, store.case(name).shape, axes) for name in store.names}
    matchers = {"embeddings": matcher, "body's box": BodyBoxMatcher(store), "shuffled": ShuffledMatcher(matcher)}
    results = count(matchers, store, labels)
    print(
        f"{len(store.names)} cases: share of matches in the organ, median distance from it, and median distance after matching "
        f"back, for {', '.join(matchers)}"
    )
    columns = [f"{name}: {what}" for name in matchers for what in ("in organ", "mm from organ", "mm back")]
    print(f"| organ | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    rows = []
    for organ in results["embeddings"]:
        row = [value for each in results.values() for value in _summary(each[organ])]
        rows.append(row)
        print(f"| {organ} | {_line(row)} |")
    print(f"| mean | {_line(np.mean(rows, axis=0))} |")


def _summary(columns: np.ndarray) -> tuple[float, float, float]:
    same, away, back = columns
    return float(same.mean()), float(np.median(away)), float(np.median(back))


def _line(row: np.ndarray) -> str:
    return " | ".join(f"{value:.2f}" if place % 3 == 0 else f"{value:.1f}" for place, value in enumerate(row))


if __name__ == "__main__":
    main()
