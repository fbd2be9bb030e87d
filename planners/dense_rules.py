"""Planner rules for dense methods: the features that describe a point, and the number of points that fit into memory."""

from collections.abc import Sequence
from copy import deepcopy
from math import prod
from typing import Any

from nnssl.errors import ArgumentError
from nnssl.log import logger
from nnssl.networks.backbone import measurable_network
from nnssl.networks.dense import DenseKind, dense_channels
from nnssl.plan import DenseSampling, Reasons
from nnssl.sizes import in_bytes

PAPER_WIDTH = 1024
"""Number of channels of Pix2Rep's last decoder stage."""
NARROW_WIDTH, NARROW_DICE, PAPER_DICE = 64, 51.2, 73.4
"""Pix2Rep's ablation (ACDC, five labelled cases, linear probe of the last stage): the only other width, its Dice in points, and
the Dice of ``PAPER_WIDTH``."""
WIDE_ENOUGH = PAPER_WIDTH
"""Smallest width with which the last decoder stage alone describes a point: the only width that the ablation found to suffice.
A narrower last stage is one part of a pyramid, so that widening never takes features away."""
BYTES = 4
"""Bytes of a value in float32."""
CONTRAST_POINTS = (125, 256, 512)
"""Numbers of points per image to choose from: 1,000 per batch of 8 in Pix2Rep's code, and larger ones for volumes."""
CONTRAST_SHARE = 0.1
"""Share of the memory target for the similarities between all points: logits, their softmax and its gradient."""
CORRELATION_POINTS = (512, 2048, 8192)
"""Numbers of points per image to choose from where only correlations of dimensions are computed."""
CORRELATION_SHARE = 0.25
"""Share of the memory target for features and embeddings of all points in both views, with their gradients."""
HEAD_WIDTHS = 4 * 256
"""Values per point in Pix2Rep's head: hidden layer before and after normalisation, embedding, standardised embedding."""


def decide_dense(
    features_per_stage: Sequence[int], patch: Sequence[int], batch: int, memory_gb: float, free_gb: float
) -> tuple[DenseSampling, Reasons]:
    """Choose the features of a point and the numbers of points per image.

    Args:
        features_per_stage: Number of features in each stage of the plan's network, full resolution first.
        patch: Size of the patch in voxels.
        batch: Patches per step.
        memory_gb: Memory target in GB.
        free_gb: Memory in GB that patch and batch leave for the points.

    Returns:
        The choice, and what, value and reason of every decision.
    """
    target, free = memory_gb * 1e9, free_gb * 1e9
    kind: DenseKind = "single" if features_per_stage[0] >= WIDE_ENOUGH else "pyramid"
    channels = dense_channels(list(features_per_stage), kind)
    contrast = _most(CONTRAST_POINTS, min(CONTRAST_SHARE * target, free), lambda n: _contrast_bytes(batch * n))
    correlation = _most(
        CORRELATION_POINTS, min(CORRELATION_SHARE * target, free), lambda n: _correlation_bytes(batch * n, channels)
    )
    sampling = DenseSampling(
        features=kind,
        channels=channels,
        contrast_points_per_image=contrast,
        correlation_points_per_image=correlation,
    )
    return sampling, [
        _explain_features(features_per_stage[0], sampling, patch, batch),
        (
            "points per image (contrast)",
            f"{contrast:,}",
            f"similarities between all points of {batch} images take {in_bytes(_contrast_bytes(batch * contrast))} (at most "
            f"{CONTRAST_SHARE:.0%} of the memory target, but no fewer points than the {CONTRAST_POINTS[0]:,} of Pix2Rep's code)",
        ),
        (
            "points per image (correlation)",
            f"{correlation:,}",
            f"features and embeddings of {batch} images take {in_bytes(_correlation_bytes(batch * correlation, channels))} (at "
            f"most {CORRELATION_SHARE:.0%} of the memory target)",
        ),
    ]


def _explain_features(last: int, sampling: DenseSampling, patch: Sequence[int], batch: int) -> tuple[str, str, str]:
    """Return what, value and reason of the features of a point, given the channels of the last decoder stage."""
    ablation = f"Dice was {PAPER_DICE} with {PAPER_WIDTH:,} channels and {NARROW_DICE} with {NARROW_WIDTH}"
    if sampling.features == "single":
        value = f"single: {last:,} channels of the last decoder stage"
        return "dense features", value, f"the last decoder stage is as wide as Pix2Rep's, in whose ablation {ablation}"
    pairs = batch * sampling.contrast_points_per_image
    added = in_bytes(pairs * 2 * (sampling.channels - last) * BYTES)
    paper = in_bytes(prod(patch) * PAPER_WIDTH * BYTES)
    reason = (
        f"the last stage has only {last} channels, and in Pix2Rep's ablation of the last stage, {ablation}; the other stages add "
        f"{added} for {pairs:,} pairs of points; Pix2Rep's {PAPER_WIDTH:,} full-resolution maps would take {paper} per patch and "
        "pass (dense_width widens the last stage)"
    )
    return "dense features", f"pyramid: {sampling.channels:,} channels of all decoder stages", reason


def bytes_of_points(setting: str | None, sampling: DenseSampling, batch: int) -> float:
    """Return the memory of the points that a step of a stage compares, in bytes.

    Args:
        setting: ``contrast`` or ``correlation``, whichever the stage compares; None if it compares no points.
        sampling: Features and numbers of points per image.
        batch: Patches per step.
    """
    if setting is None:
        return 0.0
    if setting == "contrast":
        return _contrast_bytes(batch * sampling.contrast_points_per_image)
    return _correlation_bytes(batch * sampling.correlation_points_per_image, sampling.channels)


def widen_last_stage(nnunet: dict[str, Any], width: int, channels: int, budgets: dict[str, float]) -> None:
    """Set the width of the first encoder and last decoder stage of every configuration that has the memory for it, in place.

    The batch size is reduced by nnU-Net's rule if necessary. A configuration for which fewer than two patches would fit
    keeps its width, and a message is logged.

    Args:
        nnunet: Content of the plans file.
        width: Number of channels at full resolution.
        channels: Number of input channels.
        budgets: Number of feature values that fit into memory, by configuration.

    Raises:
        ArgumentError: If no configuration has the memory.
    """
    too_large = []
    for name, budget in budgets.items():
        configuration = nnunet["configurations"][name]
        wide = deepcopy(configuration["architecture"])
        features = wide["arch_kwargs"]["features_per_stage"]
        wide["arch_kwargs"]["features_per_stage"] = [width, *features[1:]]
        network = measurable_network(wide, channels)
        fits = int(budget // network.compute_conv_feature_map_size(tuple(configuration["patch_size"])))
        if fits < 2:
            too_large.append((name, features[0]))
            continue
        configuration["architecture"] = wide
        configuration["batch_size"] = min(configuration["batch_size"], fits)
    if len(too_large) == len(budgets):
        names = ", ".join(name for name, _ in too_large)
        raise ArgumentError(
            f"dense_width must leave memory for two patches of {names}, got {width}; choose a smaller width or a larger preset",
            "dense_width",
            "preset",
        )
    for name, kept in too_large:
        logger.info(
            f"{name} keeps {kept} channels at full resolution: with {width:,}, two patches do not fit into memory"
        )


def _contrast_bytes(points: int) -> int:
    return 3 * (2 * points) ** 2 * BYTES


def _correlation_bytes(points: int, channels: int) -> int:
    return 2 * 2 * points * (channels + HEAD_WIDTHS) * BYTES


def _most(choices: Sequence[int], memory: float, needed: Any) -> int:
    return max((n for n in choices if needed(n) <= memory), default=choices[0])
