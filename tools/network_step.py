"""Time a forward and backward pass of a U-Net on the CPU in number formats, memory layouts, and with fused norms.

The network is nnU-Net's plain one, 2D, with deep supervision. All variants take turns, and the shares of a step are those of the
profiler for the last one::

    python -m tools.network_step --batch-size 16 --patch 128 112
"""

import argparse
import copy
import statistics
from time import perf_counter
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nnssl.networks.fused_norm import fuse_norms
from tools.machine import describe

FEATURES = (16, 32, 64, 128, 128)


def make_network() -> nn.Module:
    """Return the U-Net that a plan of the preset ``cpu`` has for slices of this size."""
    stages = len(FEATURES)
    norm, activation = {"eps": 1e-5, "affine": True}, {"inplace": True}
    strides = [[1, 1]] + [[2, 2]] * (stages - 1)
    return PlainConvUNet(
        *(1, stages, FEATURES, nn.Conv2d, [[3, 3]] * stages, strides, [2] * stages, 4, [2] * (stages - 1), True),
        *(nn.InstanceNorm2d, norm, None, None, nn.LeakyReLU, activation),
        deep_supervision=True,
    )


def step(network: nn.Module, volumes: Tensor, half: bool) -> None:
    """Run one forward and backward pass."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        outputs = network(volumes)
    torch.stack([each.float().square().mean() for each in outputs]).sum().backward()


def main() -> None:
    """Print a table of the variants and one of the operations of the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="slices per step (default: 16)")
    parser.add_argument("--patch", type=int, nargs=2, default=(128, 112), help="pixels of a slice (default: 128 112)")
    parser.add_argument("--repeats", type=int, default=6, help="timed steps of each variant (default: 6)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network: Any = make_network()
    last, fused = (copy.deepcopy(network).to(memory_format=torch.channels_last) for _ in range(2))
    fuse_norms(fused)
    volumes = torch.randn(args.batch_size, 1, *args.patch)
    variants = {
        "float32": (network, volumes, False),
        "bfloat16": (copy.deepcopy(network), volumes, True),
        "bfloat16, channels-last": (last, volumes.to(memory_format=torch.channels_last), True),
        "bfloat16, channels-last, fused norms": (fused, volumes.to(memory_format=torch.channels_last), True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.repeats + 1):
        for name, variant in variants.items():
            started = perf_counter()
            step(*variant)
            seconds[name].append(perf_counter() - started)
    print(describe())
    print("| variant | step (s) | relative to the last |\n|---|---|---|")
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    final = list(medians.values())[-1]
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {value / final:.2f} |")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(*list(variants.values())[-1])
    events = sorted(found.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in events)
    print("\n| operation | share of the last variant |\n|---|---|")
    for each in events[:8]:
        print(f"| `{each.key}` | {each.self_cpu_time_total / total:.0%} |")


if __name__ == "__main__":
    main()
