"""Compare the planner's estimate of a step's memory with the memory that the step takes, for every pretext stage.

Each stage runs in a process of its own, on random volumes, with the patch, batch and pieces of the plan. On the CPU, the peak of
the resident memory over that before the network was built is measured; on a GPU, the peak of torch's allocator::

    python -m tools.step_memory --kinds BTCV --encoders plain residual            # CPU: plans for 2 GB
    python -m tools.step_memory --kinds BTCV ACDC --presets 24gb --device cuda    # GPU: the presets' own plans

The last column is the time of a step relative to the bare U-Net: as many passes with a graph through encoder and decoder, forward
and backward, without views, teacher, heads, losses and optimizer. Stages that differentiate a transformer have none.
"""

import argparse
import math
import multiprocessing
import re
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from nnssl.draws import sample_generators
from nnssl.log import print_line, silence
from nnssl.methods import Stage, find_stage
from nnssl.methods.settings import resolve_stage
from nnssl.momentum import update_teacher
from nnssl.networks.backbone import build_network, planned_configuration, seeded
from nnssl.networks.primus_positions import architecture_of_patch
from nnssl.plan import Plan
from planners import presets
from planners.presets import PRESETS, PRIMUS_SIZES, VIT_SIZES, Preset
from tools.synthetic_fingerprints import KINDS
from tools.table_of_steps import plan_of
from trainers.precision import Precision, choose_precision
from trainers.pretraining.optimisation import make_optimizer, step_optimizer

STEPS = 3
SMALL = {
    encoder: Preset(2.0, kind, 16, (128, 128), VIT_SIZES[0], PRIMUS_SIZES[0], 4e11, "short")
    for encoder, kind in (("plain", "plain"), ("residual", "residual L"))
}
"""Plans for the CPU, by encoder: large enough that a step takes much more than the fluctuation of a process."""


def measure(plan: Plan, name: str, stage_name: str, device_name: str) -> dict[str, float]:
    """Run some steps of a stage and return their peak memory in GB and the seconds of the last one, and of the bare network."""
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(1)
    stage = find_stage(stage_name)[1]
    configuration = plan.configuration(name)
    implementation = stage.load()
    overrides = ["partners=body_box"] if stage_name == "alice.alignment" else []
    settings, _ = resolve_stage(implementation, configuration, stage_name, overrides)
    own = configuration.for_stage(stage_name)
    planned = planned_configuration(plan.nnunet, name)
    channels = len(planned["normalization_schemes"])
    base = _start_peak(device)
    network = build_network(architecture_of_patch(planned["architecture"], own.patch_size), channels, 2, 0)
    method = seeded(lambda: implementation(network, settings, own), 0, stage_name).to(device).train()
    network.to(device)
    precision = choose_precision(device)
    precision.lay_out(method, len(own.patch_size))
    optimizer = make_optimizer(method.parameter_groups(), settings.training)
    batch = settings.training.batch_size
    seconds = 0.0
    for step in range(STEPS):
        started = perf_counter()
        volumes: Any = torch.randn(batch, channels, *own.patch_size).to(device)
        volumes = precision.lay_out(volumes, len(own.patch_size))
        with torch.no_grad():
            views = method.make_views(volumes, sample_generators(0, stage_name, step, list(range(batch))))
            if method.supervoxel_edges_mm():
                shape = (batch, *own.patch_size)
                views = method.partitioned(views, torch.randint(1, 64, shape, dtype=torch.int32).to(device))
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(device):
            output = method(views, 0.5)
        step_optimizer(torch.stack([each.float() for each in output.losses.values()]).sum(), optimizer, None, 12.0)
        for student, teacher in method.momentum_pairs():
            update_teacher(student, teacher, 0.99)
        method.after_step(output.carry)
        del views, output, volumes
        _wait_for(device)
        seconds = perf_counter() - started
    peak = _peak(device, base)
    ratio = seconds / _bare_seconds(stage, method, network, own.patch_size, batch, device, precision)
    return {"peak_gb": peak, "seconds": seconds, "ratio": ratio}


def _bare_seconds(
    stage: Stage,
    method: torch.nn.Module,
    network: Any,
    patch: tuple[int, ...],
    batch: int,
    device: torch.device,
    precision: Precision,
) -> float:
    """Return the seconds of a stage's passes with a graph through encoder and decoder alone; NaN for a transformer."""
    if not stage.encoder_graphs or not hasattr(network, "encoder"):
        return math.nan
    network.requires_grad_(True)
    channels = next(network.encoder.parameters()).shape[1]
    volumes = precision.lay_out(torch.randn(batch, channels, *patch).to(device), len(patch))
    del method
    seconds = math.nan
    for _ in range(2):
        started = perf_counter()
        for index in range(max(stage.encoder_graphs, stage.decoder_graphs)):
            with precision.autocast(device):
                features = network.encoder(volumes)
                if index < stage.decoder_graphs:
                    features = [network.decoder(features)[0]]
            features[-1].float().square().mean().backward()
        _wait_for(device)
        seconds = perf_counter() - started
    return seconds


def _start_peak(device: torch.device) -> float:
    """Forget the peak so far and return the memory in bytes that is used now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device, base: float) -> float:
    """Return the peak in GB since ``_start_peak``; 0 if other memory was freed meanwhile and no more was needed."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM") - base
    return max(0.0, peak) / 1e9


def _status(key: str) -> float:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024.0


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _job(arguments: tuple[Any, ...]) -> dict[str, float] | str:
    try:
        with silence():
            return measure(*arguments)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["BTCV"], help="kinds of data")
    parser.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), help="presets (default: small plans for the CPU)"
    )
    parser.add_argument(
        "--encoders", nargs="+", choices=list(SMALL), default=list(SMALL), help="encoders of small plans"
    )
    parser.add_argument("--configurations", nargs="+", help="configurations (default: all)")
    parser.add_argument("--stages", nargs="+", help="stages (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    presets.PRESETS.update(SMALL)  # so that plans are made for them
    print_line(
        "| data | preset | configuration | stage | patch, batch | estimate, GB | measured, GB | ratio | s | over bare network |"
    )
    print_line("|---|---|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for kind in args.kinds:
        for preset in args.presets or args.encoders:
            plan = plan_of(kind, preset)
            for name, configuration in plan.pretext.configurations.items():
                for stage, planned in configuration.stages.items():
                    if stage not in (args.stages or [stage]) or name not in (args.configurations or [name]):
                        continue
                    with context.Pool(1) as pool:
                        found = pool.apply(_job, ((plan, name, stage, args.device),))
                    step, estimate = planned.schedule, planned.cost.memory_gb
                    what = f"{step.batch_size} of {'x'.join(map(str, step.patch_size))}, {step.pieces} piece(s)"
                    row = [kind, preset, name, stage, what, f"{estimate:.2f}"]
                    if isinstance(found, str):
                        row += [found, "-", "-", "-"]
                    else:
                        peak = found["peak_gb"]
                        row += [
                            f"{peak:.2f}",
                            f"{peak / estimate:.2f}",
                            f"{found['seconds']:.2f}",
                            f"{found['ratio']:.2f}",
                        ]
                    print_line(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
