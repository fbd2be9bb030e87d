"""Measure whether dense embeddings find the same tissue in other patients; labels are used only for evaluation.

For points of each class in the middle slice of each case, all voxels in the middle slices of the other cases are ranked by cosine
similarity. The table shows the area under the ROC curve for the voxels of the class, how often the most similar voxel belongs to
the class, and the share of the voxels that belong to the class, which is the chance level. Only for 2D configurations::

    python -m tools.dense_retrieval --weights CHECKPOINT --labelled 27 --plans nnsslPlans --cases CASE CASE CASE
"""

import argparse
from itertools import permutations
from pathlib import Path

import blosc2
import numpy as np
import torch
import torch.nn.functional as F

from nnssl.checkpoint import read_checkpoint
from nnssl.data.raw import find_dataset
from nnssl.distributed import standardise_over_ranks
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import dense_maps
from nnssl.paths import resolve_folders
from nnssl.views.points import interpolate_at

POINTS_PER_CLASS = 6


def read_slice(folder: Path, case: str, patch: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the middle slice of a case preprocessed by nnU-Net and its labels, padded or cropped to the patch."""
    volume, labels = (np.asarray(blosc2.open(str(folder / f"{case}{end}.b2nd"))[:]) for end in ("", "_seg"))
    middle = volume.shape[1] // 2
    pad = [side for n, wanted in zip(volume.shape[:1:-1], patch[::-1], strict=True) for side in (0, max(0, wanted - n))]
    cut = (slice(patch[0]), slice(patch[1]))
    image = F.pad(torch.from_numpy(volume[:, middle]).float(), pad)[(slice(None), *cut)]
    return image, F.pad(torch.from_numpy(labels[0, middle].astype(np.int64)), pad)[cut].flatten()


def roc_area(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Return the area under the ROC curve of scores, given which samples are positive."""
    rank = scores.argsort().argsort().double() + 1
    count = int(positive.sum())
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def main() -> None:
    """Print one row for each class and each kind of features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of nnssl_pretrain")
    parser.add_argument("--labelled", required=True, help="labelled data set that nnssl_finetune has prepared")
    parser.add_argument("--plans", required=True, help="name of the plan of that data set")
    parser.add_argument("--cases", nargs="+", required=True, help="names of the cases to compare")
    args = parser.parse_args()
    folders = resolve_folders()
    content, provenance = read_checkpoint(args.weights)
    planned = provenance.plans["configurations"][provenance.configuration]
    network = build_network(planned["architecture"], len(planned["normalization_schemes"]), 2, seed=0)
    network.load_state_dict(
        {k: v for k, v in content["network_weights"].items() if ".seg_layers." not in k}, strict=False
    )
    patch = tuple(planned["patch_size"])
    dataset = folders.preprocessed / find_dataset(args.labelled, folders)
    data = dataset / f"{args.plans}_{provenance.configuration}"
    slices = {case: read_slice(data, case, patch) for case in args.cases}
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in patch))[None]
    print("| features | class | ROC area | nearest voxel in the class | share of the class |\n|---|---|---|---|---|")
    for kind in ("pyramid", "single"):
        embedded = {}
        for case, (image, _) in slices.items():
            with torch.no_grad():
                maps = dense_maps(network.eval(), image[None], kind)
                features = torch.cat([interpolate_at(each, places, patch)[0] for each in maps], dim=1)
            embedded[case] = F.normalize(standardise_over_ranks(features), dim=1)
        for label in sorted({int(v) for _, labels in slices.values() for v in labels.unique() if v > 0}):
            rng = np.random.default_rng(0)
            areas, hits, shares = [], [], []
            for query, key in permutations(args.cases, 2):
                own, other = slices[query][1] == label, slices[key][1] == label
                if not own.any() or not other.any():
                    continue
                for place in rng.choice(own.nonzero()[:, 0].numpy(), POINTS_PER_CLASS):
                    cosine = embedded[key] @ embedded[query][place]
                    areas.append(roc_area(cosine, other))
                    hits.append(bool(other[cosine.argmax()]))
                    shares.append(float(other.float().mean()))
            print(f"| {kind} | {label} | {np.mean(areas):.3f} | {np.mean(hits):.2f} | {np.mean(shares):.3f} |")


if __name__ == "__main__":
    main()
