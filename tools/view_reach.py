"""Measure how much of every intensity change of every method reaches the features of a network with random weights.

A change that a network removes is no view. Convolutions with instance normalisation remove ``a x + b``, for example. For each
method and modality, every change is applied alone, as the method draws it, to patches of phantoms as nnU-Net normalises them.
The reach is the root mean square of what changes, relative to that of what is there: of the voxels, and of the map of a plain
U-Net's last encoder stage. Run ``python -m tools.view_reach`` for the table of ``documentation/views.md``.
"""

import argparse
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnssl.data.phantoms import Modality, make_phantom
from nnssl.log import print_line
from nnssl.methods import find_stage
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network
from nnssl.plan import Plan
from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity, restrict_to
from planners.view_rules import decide_intensity
from tools.table_of_steps import plan_of

PATCHES = 3
SHAPE, SPACING_MM = (16, 40, 40), (6.0, 3.0, 3.0)
MODALITIES = ("MR", "CT", "X-ray")
STAGES = (
    "reprec.contrastive",
    "simclr.contrast",
    "pix2rep.dense",
    "pix2rep_v2.dense",
    "pcrl.contexts",
    "pixelglobal.distillation",
    "sam.embedding",
    "alice.alignment",
)
VOLUMES_ONLY = ("sam.embedding", "alice.alignment")
WIDTHS = (8, 16, 32, 64)
CHANGES = ("bias_field", "inversion", "window", "contrast", "brightness", "gamma", "blur", "noise")
"""Names of all intensity changes, in the order in which they are applied."""


def phantom_patches(modality: str) -> Tensor:
    """Return normalised patches (patch, 1, z, y, x) of phantoms; those of X-ray are projections (patch, 1, y, x)."""
    kind: Modality = "MR" if modality == "MR" else "CT"
    volumes = np.stack([make_phantom(seed, SHAPE, SPACING_MM, kind)[0] for seed in range(PATCHES)])
    if modality == "X-ray":
        volumes = (volumes + 1000.0).mean(axis=1)  # attenuation along the rays
    if modality == "CT":
        inside = volumes[volumes > -500]
        low, high = np.percentile(inside, (0.5, 99.5))
        volumes = (volumes.clip(low, high) - inside.mean()) / inside.std()
    else:
        axes = tuple(range(1, volumes.ndim))
        volumes = (volumes - volumes.mean(axis=axes, keepdims=True)) / volumes.std(axis=axes, keepdims=True)
    return torch.from_numpy(volumes[:, None].astype(np.float32))


def random_encoder(axes: int, seed: int = 0) -> nn.Module:
    """Return the encoder of a plain U-Net with random weights, padded by repeating the border."""
    network: Any = build_network(
        {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": len(WIDTHS),
                "features_per_stage": list(WIDTHS),
                "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
                "kernel_sizes": [[3] * axes] * len(WIDTHS),
                "strides": [[1] * axes, *[[2] * axes] * (len(WIDTHS) - 1)],
                "n_conv_per_stage": [2] * len(WIDTHS),
                "n_conv_per_stage_decoder": [2] * (len(WIDTHS) - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        1,
        2,
        seed,
    )
    encoder: nn.Module = network.encoder
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.padding_mode = "replicate"  # zeros beside a shifted image would be seen as an edge
    return encoder.eval()


def ranges_of(stage: str, plan: Plan, modality: str, axes: int) -> tuple[IntensityRange, list[str]]:
    """Return the range of a stage's intensity changes for a modality, and the names of those that are drawn.

    Args:
        stage: Name of a stage.
        plan: Plan of volumes, of which all but the modality is used.
        modality: Modality of all channels.
        axes: Number of axes of the patches.
    """
    implementation = find_stage(stage)[1].load()
    names = [name for name, each in plan.pretext.configurations.items() if stage in each.stages]
    name = min(names, key=lambda each: abs(len(plan.configuration(each).spacing_mm) - axes))
    planned = replace(plan.configuration(name), intensity_views=decide_intensity((modality,))[0])
    overrides = ["partners=body_box"] if stage == "alice.alignment" else []
    settings, _ = resolve_stage(implementation, planned, stage, overrides)
    function = importlib.import_module(implementation.__module__).intensity_range
    has_spacing = len(inspect.signature(function).parameters) > 1
    ranges = function(settings, (1.0,) * axes) if has_spacing else function(settings)
    return ranges, [each for each in CHANGES if getattr(ranges, f"{each}_probability") > 0]


def reach(patches: Tensor, encoder: nn.Module, ranges: IntensityRange, names: Sequence[str]) -> tuple[float, float]:
    """Return the reach of changes that are always drawn, in the voxels and in the features of the encoder.

    Args:
        patches: Patches (patch, channel, *shape).
        encoder: Encoder that returns the maps of its stages.
        ranges: Ranges from which the changes are drawn.
        names: Names of the changes, which are made together.
    """
    always: dict[str, Any] = {f"{name}_probability": 1.0 for name in names}
    only = restrict_to(replace(ranges, **always), names)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(patches))]
    changed = apply_intensity(patches, draw_intensity(generators, only, patches.shape[1]))
    with torch.no_grad():
        before, after = encoder(patches)[-1], encoder(changed)[-1]

    def relative(first: Tensor, second: Tensor) -> float:
        middle = first.mean(dim=tuple(range(2, first.ndim)), keepdim=True)
        return float((second - first).square().mean().sqrt() / (first - middle).square().mean().sqrt())

    return relative(patches, changed), relative(before, after)


def table() -> list[str]:
    """Return the lines of a Markdown table: a row per stage, the changes of every modality with their reach."""
    lines = ["| stage | " + " | ".join(MODALITIES) + " |", "|---" * (1 + len(MODALITIES)) + "|"]
    cells: dict[str, list[str]] = {stage: [] for stage in STAGES}
    plan = plan_of("BTCV", "8gb")
    for modality in MODALITIES:
        patches = phantom_patches(modality)
        axes = patches.ndim - 2
        encoder = random_encoder(axes)
        for stage in STAGES:
            if axes == 2 and stage in VOLUMES_ONLY:
                cells[stage].append("-")
                continue
            ranges, names = ranges_of(stage, plan, modality, axes)
            found = [(name, reach(patches, encoder, ranges, [name])[1]) for name in names]
            cells[stage].append(", ".join(f"{name} {share:.0%}" for name, share in found))
    return [*lines, *(f"| `{stage}` | {' | '.join(row)} |" for stage, row in cells.items())]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for line in table():
        print_line(line)


if __name__ == "__main__":
    main()
