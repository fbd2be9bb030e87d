"""Measure memory and time of one Pix2Rep step for several numbers of points per step.

Each number of points runs in its own process, and the peak resident memory of that process is reported. The first row is the bare
network on both views, without points::

    python -m tools.dense_memory --dataset 501
"""

import argparse
import multiprocessing
import resource
from time import perf_counter
from typing import Any

import torch

from nnssl.methods import METHODS
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import decoder_maps
from nnssl.paths import resolve_folders
from nnssl.plan import read_plan
from tools.machine import describe
from trainers.precision import choose_precision
from trainers.pretraining.pretrain import find_plan

STEPS = 4


def run(path: Any, configuration_name: str, method: str, batch_size: int, points: int) -> tuple[float, float]:
    """Return the seconds of the last step and the peak memory of this process in GB; 0 points measure the bare network."""
    plan = read_plan(path)
    configuration = plan.configuration(configuration_name)
    stage = METHODS[method].stages[0]
    overrides = [f"batch_size={batch_size}", f"points_per_image={max(points // batch_size, 2)}"]
    settings, _ = resolve_stage(stage.load(), configuration, stage.name, overrides)
    planned = plan.nnunet["configurations"][configuration_name]
    channels = len(planned["normalization_schemes"])
    network = build_network(planned["architecture"], channels, 2, seed=0)
    instance = stage.load()(network, settings, configuration)
    precision = choose_precision(torch.device("cpu"))
    volumes = torch.randn(batch_size, channels, *configuration.patch_size)
    for step in range(STEPS):
        started = perf_counter()
        generators = [torch.Generator().manual_seed(step * batch_size + i) for i in range(batch_size)]
        with torch.no_grad():
            views = instance.make_views(volumes, generators)
        with precision.autocast(torch.device("cpu")):
            if points:
                loss = sum(instance.losses(views, 0.0).losses.values())
            else:
                loss = decoder_maps(network, torch.cat([views.before, views.warped]))[-1].float().square().mean()
        loss.backward()
        instance.zero_grad()
        seconds = perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    """Print one row for each number of points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="planned data set, number or name")
    parser.add_argument("--method", default="pix2rep", choices=("pix2rep", "pix2rep_v2"), help="(default: pix2rep)")
    parser.add_argument("--configuration", default="2d", help="configuration of the plan (default: 2d)")
    parser.add_argument("--batch-size", type=int, default=4, help="patches per step (default: 4)")
    parser.add_argument(
        "--points",
        type=int,
        nargs="+",
        default=[250, 1000, 2048, 4096],
        help="numbers of points to measure (default: 250 1000 2048 4096)",
    )
    args = parser.parse_args()
    folders = resolve_folders()
    path = find_plan(folders, args.dataset, "nnsslPlans")
    print(describe())
    print("| points | step (s) | peak memory (GB) | above the bare network (GB) |\n|---|---|---|---|")
    bare = None
    for points in [0, *args.points]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(run, (path, args.configuration, args.method, args.batch_size, points))
        bare = memory if bare is None else bare
        print(f"| {points or 'none: bare network'} | {seconds:.3f} | {memory:.2f} | {memory - bare:.2f} |", flush=True)


if __name__ == "__main__":
    main()
