"""Planner rules for dense methods: the features that describe a point, and the number of points that fit into memory."""

from collections.abc import Sequence
from math import prod
from typing import Any

from nnssl.errors import ArgumentError
from nnssl.networks.backbone import measurable_network
from nnssl.networks.dense import DenseKind, dense_channels
from nnssl.plan import DenseSampling, Reasons
from nnssl.sizes import in_bytes

PAPER_WIDTH = 1024
"""Number of channels of Pix2Rep's last decoder stage."""
WIDE_ENOUGH = 64
"""Smallest width with which the last decoder stage alone describes a point: that of Pix2Rep's baseline, below which its results
fell most (widths of 64 to 1,024)."""
BYTES = 4
"""Bytes of a value in float32."""
CONTRAST_POINTS = (1000, 2048, 4096)
"""Numbers of points to choose from: Pix2Rep's number in 2D, and larger ones for volumes."""
CONTRAST_SHARE = 0.1
"""Share of the memory target for the similarities between all points: logits, their softmax and its gradient."""
CORRELATION_POINTS = (4096, 16_384, 65_536)
"""Numbers of points to choose from where only correlations of dimensions are computed."""
CORRELATION_SHARE = 0.25
"""Share of the memory target for features and embeddings of all points in both views, with their gradients."""
HEAD_WIDTHS = 4 * 256
"""Values per point in Pix2Rep's head: hidden layer before and after normalisation, embedding, standardised embedding."""


def decide_dense(
    features_per_stage: Sequence[int], patch: Sequence[int], memory_gb: float, free_gb: float
) -> tuple[DenseSampling, Reasons]:
    """Choose the features of a point and the numbers of points.

    Args:
        features_per_stage: Number of features in each stage of the plan's network, full resolution first.
        patch: Size of the patch in voxels.
        memory_gb: Memory target in GB.
        free_gb: Memory in GB that patch and batch leave for the points.

    Returns:
        The choice, and what, value and reason of every decision.
    """
    target, free = memory_gb * 1e9, free_gb * 1e9
    last = features_per_stage[0]
    kind: DenseKind = "single" if last >= WIDE_ENOUGH else "pyramid"
    channels = dense_channels(list(features_per_stage), kind)
    paper = in_bytes(prod(patch) * PAPER_WIDTH * BYTES)
    contrast = _most(CONTRAST_POINTS, min(CONTRAST_SHARE * target, free), _contrast_bytes)
    correlation = _most(
        CORRELATION_POINTS, min(CORRELATION_SHARE * target, free), lambda n: _correlation_bytes(n, channels)
    )
    if kind == "single":
        value = f"single: {last} channels of the last decoder stage"
        reason = f"the last decoder stage has at least {WIDE_ENOUGH} channels"
    else:
        value = f"pyramid: {channels:,} channels of all decoder stages"
        reason = (
            f"the last stage has only {last} channels (fewer than {WIDE_ENOUGH}); the other stages add "
            f"{in_bytes(contrast * 2 * (channels - last) * BYTES)} for {contrast:,} pairs of points"
        )
    reason += (
        f"; Pix2Rep's {PAPER_WIDTH:,} full-resolution maps would take {paper} per patch and pass "
        "(dense_width widens the last stage)"
    )
    sampling = DenseSampling(features=kind, channels=channels, contrast_points=contrast, correlation_points=correlation)
    return sampling, [
        ("dense features", value, reason),
        (
            "points (contrast)",
            f"{contrast:,}",
            f"similarities between all points take {in_bytes(_contrast_bytes(contrast))} (at most {CONTRAST_SHARE:.0%} of the "
            f"memory target, but no fewer points than Pix2Rep's {CONTRAST_POINTS[0]:,})",
        ),
        (
            "points (correlation)",
            f"{correlation:,}",
            f"features and embeddings take {in_bytes(_correlation_bytes(correlation, channels))} (at most "
            f"{CORRELATION_SHARE:.0%} of the memory target)",
        ),
    ]


def bytes_of_points(setting: str | None, sampling: DenseSampling) -> float:
    """Return the memory of the points that a stage compares, in bytes.

    Args:
        setting: ``contrast`` or ``correlation``, whichever the stage compares; None if it compares no points.
        sampling: Features and numbers of points.
    """
    if setting is None:
        return 0.0
    if setting == "contrast":
        return _contrast_bytes(sampling.contrast_points)
    return _correlation_bytes(sampling.correlation_points, sampling.channels)


def widen_last_stage(nnunet: dict[str, Any], width: int, channels: int, budgets: dict[str, float]) -> None:
    """Set the width of the first encoder and last decoder stage of every configuration, in place.

    The batch size is reduced by nnU-Net's rule if necessary.

    Args:
        nnunet: Content of the plans file.
        width: Number of channels at full resolution.
        channels: Number of input channels.
        budgets: Number of feature values that fit into memory, by configuration.

    Raises:
        ArgumentError: If fewer than two patches fit into memory.
    """
    for name, budget in budgets.items():
        configuration = nnunet["configurations"][name]
        features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
        configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [width, *features[1:]]
        network = measurable_network(configuration["architecture"], channels)
        fits = int(budget // network.compute_conv_feature_map_size(tuple(configuration["patch_size"])))
        if fits < 2:
            raise ArgumentError(
                f"dense_width must leave memory for two patches of {name}, got {width}; choose a smaller width or a larger "
                "preset",
                "dense_width",
                "preset",
            )
        configuration["batch_size"] = min(configuration["batch_size"], fits)


def _contrast_bytes(points: int) -> int:
    return 3 * (2 * points) ** 2 * BYTES


def _correlation_bytes(points: int, channels: int) -> int:
    return 2 * 2 * points * (channels + HEAD_WIDTHS) * BYTES


def _most(choices: Sequence[int], memory: float, needed: Any) -> int:
    return max((n for n in choices if needed(n) <= memory), default=choices[0])
