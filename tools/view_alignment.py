"""Did Pixel-global learn to align views? Teacher and student before and after pretraining, on the same new draws.

Patches of the pretraining images, crops that pretraining has not drawn. Per voxel: the cross-entropy between teacher and
student, which cannot be lower than the teacher's own entropy. Same-voxel retrieval among 256 points of a batch: by the head's
predictions, and by the features of the last decoder stage of the student alone, which are what leaves::

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

NAMES = ("voxel_cross_entropy", "target_entropy", "retrieval_top1", "decoder_retrieval")
NEW_SEED = 20_261


def decoder_retrieval(method: PixelGlobal, views: CorrespondingViews) -> torch.Tensor:
    """Return how often a point's nearest in the other crop is itself, by the student's last decoder stage."""
    sides = []
    for images, points in ((views.student, views.points_student), (views.teacher, views.points_teacher)):
        features = interpolate_at(decoder_maps(method.network, images)[-1], points, images.shape[2:])
        every = max(1, features.shape[0] * features.shape[1] // MONITORED_POINTS)
        sides.append(F.normalize(standardise_over_ranks(features.flatten(0, 1)[::every].float()), dim=1))
    valid = views.valid.flatten()[::every] > 0
    return retrieval_top1(sides[0][valid], sides[1][valid])


def measure(path: Path, trained: bool, steps: int) -> dict[str, float]:
    """Return the means over some batches of new draws."""
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
    """Print one row for the start, and one for the end of each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=20, help="batches that are measured")
    args = parser.parse_args()
    print(f"| weights | {' | '.join(NAMES)} |\n|{'---|' * (len(NAMES) + 1)}")
    for trained, path in [(False, args.weights[0]), *((True, path) for path in args.weights)]:
        found = measure(path, trained, args.steps)
        label = read_checkpoint(path)[1].settings["stabilizer"] if trained else "before"
        print(f"| {label} | {' | '.join(f'{found[name]:.3f}' for name in NAMES)} |")


if __name__ == "__main__":
    main()
