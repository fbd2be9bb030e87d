"""Carry the labels of annotated cases to others by matching every place, the baselines of ``nnssl_propagate``.

Every place of a case gets the label of its match in the annotated cases: by SAM's embeddings the most similar match of all
annotated cases, by the body's box the most frequent label at the same relative position. Places are the centres of cells of
``--cell`` voxels. Label maps are written in nnU-Net's format, to be scored by ``nnssl_evaluate``::

    python -m tools.carry_by_matches --weights SAM.pth --dataset 117 --from BTCV_000 --cases held_out.txt --output drafts
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.data.image_files import write_segmentation
from nnssl.data.raw import find_dataset, read_dataset
from nnssl.files import read_names
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.points import PointMatcher
from nnssl.paths import resolve_folders
from nnssl.pictures.matches import matcher_of
from nnssl.plan import existing_plan, read_plan
from nnssl.propagation.grids import read_grid, resampling_of, to_image
from nnssl.propagation.references import Reference, read_references
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases
from trainers.precision import choose_precision


def matched_labels(
    matcher: PointMatcher, store: CaseStore, name: str, references: Sequence[Reference], cell: Sequence[int]
) -> Int[np.ndarray, "z y x"]:
    """Return the labels of a case on its preprocessed grid, one for each cell of voxels.

    Args:
        matcher: Matcher of places.
        store: Store of the preprocessed cases.
        name: Name of the case.
        references: The annotated cases.
        cell: Size (z, y, x) of a cell in voxels.
    """
    case = store.case(name)
    counts = [-(-length // size) for length, size in zip(case.shape, cell, strict=True)]
    centres = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3)
    points_mm = ((centres + 0.5) * np.array(cell) - 0.5) * np.array(case.spacing_mm)
    labels, scores = [], []
    for each in references:
        matches = matcher.match_points(name, points_mm, each.name)
        last = np.array(each.labels.shape) - 1
        spacing_mm = np.array(store.case(each.name).spacing_mm)
        z, y, x = np.clip(np.rint(matches.points_mm / spacing_mm), 0, last).astype(int).T
        labels.append(each.labels[z, y, x])
        scores.append(matches.score)
    chosen = choose(np.stack(labels), np.stack(scores))
    whole = chosen.reshape(counts)
    for axis, size in enumerate(cell):
        whole = whole.repeat(size, axis=axis)
    return whole[tuple(slice(length) for length in case.shape)]


def choose(labels: Int[np.ndarray, "case point"], scores: Float[np.ndarray, "case point"]) -> Int[np.ndarray, " point"]:
    """Return the label of the most similar case for each point; without scores the most frequent, of equals the smallest."""
    if not np.isnan(scores).any():
        return labels[scores.argmax(axis=0), np.arange(labels.shape[1])]
    values = np.unique(labels)
    return values[np.stack([(labels == value).sum(axis=0) for value in values]).argmax(axis=0)]


def smoothed(labels: Int[np.ndarray, "z y x"], values: Sequence[int], case: StoredCase, sigma_mm: float) -> np.ndarray:
    """Return the share of each label in a Gaussian neighbourhood, (label, z, y, x)."""
    sigma_vox = [sigma_mm / mm for mm in case.spacing_mm]
    return np.stack([gaussian_filter((labels == value).astype(np.float32), sigma_vox) for value in values])


def matcher_in_mixed_precision(weights: OpenedCheckpoint, store: CaseStore) -> PointMatcher:
    """Return SAM's matcher on the CPU, computed as in training: four times as fast on AMX as in float32."""
    device = torch.device("cpu")
    precision = choose_precision(device)
    matcher, _ = matcher_of(weights, store, device, partial(precision.autocast, device))
    precision.lay_out(matcher.embedding, 3)
    return matcher


def main() -> None:
    """Write the label map of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, required=True, help="checkpoint of the plan; for embeddings, of the method sam"
    )
    parser.add_argument("--dataset", required=True, help="data set with the cases and their labels, number or name")
    parser.add_argument("--from", dest="annotated", nargs="+", required=True, help="names of the annotated cases")
    parser.add_argument(
        "--cases", type=Path, required=True, help="file that lists the cases to label, one name per line"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the label maps")
    parser.add_argument(
        "--by", choices=("embeddings", "box"), default="embeddings", help="matcher (default: embeddings)"
    )
    parser.add_argument(
        "--cell", type=int, nargs=3, default=(1, 1, 1), help="size of a cell in voxels (default: 1 1 1)"
    )
    parser.add_argument("--smoothing-mm", type=float, default=0.0, help="Gaussian over the labels in mm (default: 0)")
    args = parser.parse_args()
    folders = resolve_folders()
    weights = open_checkpoint(args.weights)
    provenance = weights.own_provenance
    dataset = find_dataset(args.dataset, folders)
    store = open_cases(provenance, dataset, folders)
    raw = read_dataset(dataset, folders)
    resampling = resampling_of(
        read_plan(existing_plan(folders, dataset, provenance.plans_name)), provenance.configuration
    )
    references = read_references(args.annotated, raw, store, resampling)
    matcher = BodyBoxMatcher(store) if args.by == "box" else matcher_in_mixed_precision(weights, store)
    args.output.mkdir(parents=True, exist_ok=True)
    raw_cases = {case.name: case for case in raw.cases}
    for name in read_names(args.cases):
        case = store.case(name)
        grid = read_grid(raw_cases[name], raw.reader, resampling)
        labels = matched_labels(matcher, store, name, references.cases, args.cell)
        shares = smoothed(labels, references.values, case, args.smoothing_mm)
        found = np.array(references.values)[to_image(shares, grid, case, resampling)]
        write_segmentation(
            args.output / f"{name}{raw.file_ending}", found.astype(np.uint8), grid.properties, raw.reader
        )
        print(f"{name}: {args.output / f'{name}{raw.file_ending}'}", flush=True)


if __name__ == "__main__":
    main()
