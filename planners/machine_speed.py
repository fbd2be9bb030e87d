"""The speed of this machine, from which the time of a plan is estimated. It is printed, and never part of a plan."""

from time import perf_counter

import torch
from torch import nn

REPEATS = 3


def measure_speed(axes: int) -> float:
    """Return the multiply-adds per second of a convolution as in a plan's network, forward and backward.

    Args:
        axes: Number of axes of the patches, 2 or 3.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels, side = 16, (96 if axes == 2 else 24)
    if device.type != "cpu":
        channels, side = 32, (256 if axes == 2 else 64)
    layer = (nn.Conv2d if axes == 2 else nn.Conv3d)(channels, channels, 3, padding=1).to(device)
    norm = (nn.InstanceNorm2d if axes == 2 else nn.InstanceNorm3d)(channels, affine=True).to(device)
    volumes = torch.zeros(4, channels, *(side,) * axes, device=device, requires_grad=True)
    fastest = float("inf")
    for _ in range(REPEATS):
        started = perf_counter()
        nn.functional.leaky_relu(norm(layer(volumes))).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, perf_counter() - started)
    work = 3 * 4 * channels * channels * 3**axes * side**axes
    return work / fastest
