"""Did Pixel-global learn to align views? Teacher and student before and after pretraining, on the same new draws.

Patches of the pretraining images, crops that pretraining has not drawn. Per voxel: the cross-entropy between teacher and
student, which cannot be lower than the teacher's own entropy. Same-voxel retrieval among 256 points of a batch: by the head's
predictions, and by the features of the last decoder stage of the student alone, which are what leaves::

    python -m tests.benchmarks.view_alignment --weights CHECKPOINT CHECKPOINT
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nnssl.checkpoint import read_checkpoint
from nnssl.collapse import retrieval_top1
from nnssl.data.case_store import CaseStore
from nnssl.data.loader import make_loader
from nnssl.distributed import standardise_over_ranks
from nnssl.draws import sample_generators
from nnssl.evaluation.dense_network import planned_configuration
from nnssl.methods import find_stage
from nnssl.methods.pixelglobal import MONITORED_POINTS, CorrespondingViews, PixelGlobal
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network, seeded
from nnssl.networks.dense import decoder_maps
from nnssl.paths import resolve_folders
from nnssl.views.points import interpolate_at
from planners.plan import plan_from_dict

NAMES = ("voxel_cross_entropy", "target_entropy", "retrieval_top1", "decoder_retrieval")
NEW_SEED = 20_261


def build(path: Path, trained: bool) -> tuple[PixelGlobal, Any, Any]:
    """Return the method of a checkpoint, as it started or as it ended, its plan and where its weights are from."""
    content, provenance = read_checkpoint(path)
    plan = plan_from_dict(provenance.plans, str(path))
    configuration = plan.configuration(provenance.configuration)
    stage = find_stage(provenance.stage)[1]
    given = [f"{name}={_typed(value)}" for name, value in provenance.settings.items()]
    settings, _ = resolve_stage(stage.load(), configuration, stage.name, given)
    planned = planned_configuration(plan, provenance.configuration)
    weights = content["network_weights"]
    classes = weights["decoder.seg_layers.0.weight"].shape[0]
    network = build_network(planned["architecture"], len(planned["normalization_schemes"]), classes, provenance.seed)
    method = seeded(lambda: PixelGlobal(network, settings, configuration), provenance.seed, stage.name)
    if trained:
        network.load_state_dict(weights)
        missing = method.load_state_dict(content["nnssl"]["state"]["method"], strict=False)
        assert all(name.startswith("network.") or "seg_layers" in name for name in missing.missing_keys)
    return method.eval().requires_grad_(False), plan, provenance


def _typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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
    method, plan, provenance = build(path, trained)
    configuration = plan.configuration(provenance.configuration)
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
