"""Reasons for the decisions of nnU-Net's rules: spacing, axes, normalisation, patch and network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from nnunetv2.configuration import ANISO_THRESHOLD

from nnssl.plan import Reasons
from nnssl.sizes import in_mm, in_voxels
from planners.presets import Preset


def explain_data_set(
    nnunet: dict[str, Any],
    spacings_mm: Float[np.ndarray, "case 3"],
    modalities: Sequence[str],
    preset: Preset,
    like: Path | None,
    spacing_reasons: dict[str, str],
    single_slices: bool = False,
) -> Reasons:
    """Return the decisions that all configurations share, with their reasons.

    Args:
        nnunet: Content of the plans file.
        spacings_mm: Spacing of every case in mm, in the plan's order of axes.
        modalities: Modality of each channel.
        preset: Memory target.
        like: Plans file that this plan was built around; None for a plan from the data.
        spacing_reasons: Reason for every spacing that was not chosen from the data, by configuration.
        single_slices: Whether all images are single slices, which have no distance between slices: nnU-Net's readers give them
            one of 999 times the spacing in the plane.
    """
    source = f"taken from {like.parent.name}/{like.name}" if like else None
    configurations = nnunet["configurations"]
    finest = "3d_fullres" if "3d_fullres" in configurations else "2d"
    base = configurations[finest]
    median = np.median(spacings_mm, axis=0)
    if single_slices:
        spacings_mm = spacings_mm[:, 1:]
    low, high = spacings_mm.min(axis=0), spacings_mm.max(axis=0)
    cases = len(spacings_mm)
    if cases == 1:
        rule = "that of the only case"
    elif np.allclose(low, high):
        rule = f"the same in all {cases} cases"
    else:
        rule = f"median of {cases} cases ({in_mm(low)} to {in_mm(high)} mm)"
    if finest in spacing_reasons:
        rule = f"{spacing_reasons[finest]}; in the data: {rule}"
    elif not like and len(base["spacing"]) == 3 and base["spacing"][0] < 0.99 * median[0]:
        rule += "; 10th percentile along the thick slices, so that thin slices are not lost"
    forward = tuple(nnunet["transpose_forward"])
    order = "as stored" if forward == (0, 1, 2) else "axis of the largest spacing first"
    slices = f"spacings of {in_mm([median.max()])} mm and {in_mm([median.min()])} mm"
    if single_slices:
        axis = ("none", "every image is a single slice")
    elif float(median.max() / median.min()) > ANISO_THRESHOLD:
        axis = ("treated separately", f"thick slices: {slices} differ by more than a factor of {ANISO_THRESHOLD}")
    else:
        axis = ("treated like the others", f"{slices} are within a factor of {ANISO_THRESHOLD}")
    reasons = [
        ("spacing", f"{in_mm(base['spacing'])} mm", source or rule),
        ("axis order", str(forward), source or order),
        ("slice axis", *axis),
    ]
    for channel, (modality, scheme) in enumerate(zip(modalities, base["normalization_schemes"], strict=True)):
        why = {
            "CTNormalization": "clipped to percentiles 0.5 to 99.5 of the body; one mean and deviation for all images",
            "ZScoreNormalization": "arbitrary units, so each image is standardised by its own mean and deviation",
        }.get(scheme, "nnU-Net's rule for this channel name")
        reasons.append((f"normalisation of channel {channel}", scheme, source or f"{modality}: {why}"))
    features = f"{preset.encoder} encoder with {preset.base_features} features in the first stage"
    return [*reasons, ("memory target", f"{preset.memory_gb:g} GB", features)]


def explain_network(base: dict[str, Any], preset: Preset, like: Path | None, spacing_reason: str | None) -> Reasons:
    """Return the decisions on patch, network and batch size of a configuration, with their reasons.

    Args:
        base: Configuration in the plans file.
        preset: Memory target.
        like: Plans file that this plan was built around; None for a plan from the data.
        spacing_reason: Reason for a spacing of its own; None if it was chosen from the data.
    """
    source = f"taken from {like.parent.name}/{like.name}" if like else None
    own = [("spacing", f"{in_mm(base['spacing'])} mm", spacing_reason)] if spacing_reason else []
    arch = base["architecture"]["arch_kwargs"]
    median = in_voxels([round(float(v)) for v in base["median_image_size_in_voxels"]])
    thin = any(1 in (k if isinstance(k, (list, tuple)) else [k]) for k in arch["kernel_sizes"])
    patch = f"aspect ratio of the median image ({median} at this spacing), as large as the memory target allows"
    strides = "an axis is halved while its spacing is within a factor of 2 of the finest and at least 4 voxels remain"
    kernels = (
        "1 along the coarse axis until the spacings are within a factor of 2" if thin else "the spacings are similar"
    )
    backbone = f"{preset.encoder} encoder for a memory target of {preset.memory_gb:g} GB"
    batch = "nnU-Net's rule: as many as the memory target allows"
    if preset.encoder == "plain":
        batch += ", at most 5% of the data set's voxels per step"
    return own + [
        ("patch (fine-tuning)", in_voxels(base["patch_size"]), source or patch),
        ("strides", " ".join(_along_axes(s) for s in arch["strides"]), source or strides),
        ("kernels", " ".join(_along_axes(k) for k in arch["kernel_sizes"]), source or kernels),
        ("backbone", base["architecture"]["network_class_name"].rsplit(".", 1)[-1], source or backbone),
        ("batch size (fine-tuning)", str(base["batch_size"]), source or batch),
    ]


def _along_axes(sizes: Sequence[int] | int) -> str:
    """Return a stride or kernel as text; a single number applies to all axes."""
    return in_voxels(sizes) if isinstance(sizes, (list, tuple)) else str(sizes)
