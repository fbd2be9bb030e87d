"""Measure whether Pixel-global learned to align views: teacher and student before and after pretraining.

Both are compared on the same new crops of the pretraining images. The table shows the cross-entropy between teacher and student
per voxel, whose lower bound is the teacher's entropy, and the retrieval of the same voxel among 256 points of a batch: by the
predictions of the head, and by the student's last decoder stage, whose weights are handed over::

    python -m tools.view_alignment --weights CHECKPOINT CHECKPOINT
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from nnssl.checkpoint import read_checkpoint
from nnssl.collapse import retrieval_top1
from nnssl.data.case_store import CaseStore
from nnssl.data.loader import make_loader
from nnssl.distributed import standardise_over_ranks
from nnssl.draws import sample_generators
from nnssl.methods.pixelglobal import MONITORED_POINTS, CorrespondingViews, PixelGlobal
from nnssl.networks.dense import decoder_maps
from nnssl.paths import resolve_folders
from nnssl.views.points import interpolate_at
from nnssl.weights.restored_method import restore_method

NAMES = ("voxel_cross_entropy", "target_entropy", "head_retrieval", "decoder_retrieval")
NEW_SEED = 20_261


def decoder_retrieval(method: PixelGlobal, views: CorrespondingViews) -> torch.Tensor:
    """Return how often the nearest point in the other crop is the same point, by the student's last decoder stage."""
    sides = []
    for images, points in ((views.student, views.points_student), (views.teacher, views.points_teacher)):
        features = interpolate_at(decoder_maps(method.network, images)[-1], points, images.shape[2:])
        every = max(1, features.shape[0] * features.shape[1] // MONITORED_POINTS)
        sides.append(F.normalize(standardise_over_ranks(features.flatten(0, 1)[::every].float()), dim=1))
    valid = views.valid.flatten()[::every] > 0
    return retrieval_top1(sides[0][valid], sides[1][valid])


def measure(path: Path, trained: bool, steps: int) -> dict[str, float]:
    """Return the means over several batches with new random crops."""
    method, provenance = restore_method(path, torch.device("cpu"), trained)
    configuration = method.configuration
    store = CaseStore(resolve_folders().preprocessed / provenance.dataset_name / configuration.case_folder)
    batch = method.settings.training.batch_size
    sums = dict.fromkeys(NAMES, 0.0)
    for patches in make_loader(store, configuration.patch_size, batch, NEW_SEED, "alignment", 0, steps):
        views = method.make_views(patches.volumes, sample_generators(NEW_SEED, "views", patches.step, patches.samples))
        found = {**method.losses(views, 0.0).monitors, "decoder_retrieval": decoder_retrieval(method, views)}
        for name in NAMES:
            sums[name] += float(found[name]) / steps
    return sums


def main() -> None:
    """Print one row for the initial weights and one for the final weights of each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="checkpoints of the method pixelglobal")
    parser.add_argument("--steps", type=int, default=20, help="number of batches (default: 20)")
    args = parser.parse_args()
    print(f"| weights | {' | '.join(NAMES)} |\n|{'---|' * (len(NAMES) + 1)}")
    for trained, path in [(False, args.weights[0]), *((True, path) for path in args.weights)]:
        found = measure(path, trained, args.steps)
        label = read_checkpoint(path)[1].settings["stabilizer"] if trained else "before"
        print(f"| {label} | {' | '.join(f'{found[name]:.3f}' for name in NAMES)} |")


if __name__ == "__main__":
    main()
