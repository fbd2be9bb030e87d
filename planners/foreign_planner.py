"""The plan for a network that was not planned here: nnU-Net's own for the data, but for network, patch and spacing."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.networks.backbone import encoder_strides
from nnssl.paths import Folders
from nnssl.plan import TransformerSize
from planners.primus_rules import primus_architecture

CONFIGURATION = "3d_fullres"
BATCH_SIZE = 2
"""As nnU-Net's main branch fine-tunes such weights."""


def plan_for_network(
    architecture: dict[str, Any],
    patch_vox: Sequence[int],
    spacing_mm: Sequence[float] | None,
    dataset_name: str,
    plans_name: str,
    folders: Folders,
) -> dict[str, Any]:
    """Plan a labelled data set with nnU-Net's own planner, around a given network.

    Normalisation, reader and axes are those that nnU-Net decides for the data set. The patch is the weights', but no longer
    than the data set's images along any axis.

    Args:
        architecture: of the network, as a configuration of a plan names it.
        patch_vox: that the weights' authors recommend, (z, y, x).
        spacing_mm: of pretraining; None for what nnU-Net decides.
        dataset_name: with ``dataset_fingerprint.json`` in its preprocessed folder.
        plans_name: of the new plan.
        folders: nnU-Net's folders.

    Returns:
        The content of a plans file with the one configuration ``3d_fullres``.

    Raises:
        UserError: the weights are for slices, or nnU-Net has no 3D configuration for the data set.
    """
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    if len(patch_vox) != 3:
        raise UserError(
            f"{dataset_name}: the weights are for {len(patch_vox)}D images; only 3D ones can be planned around"
        )
    # the planner writes, unasked over what is there; it gets a folder of its own to do so
    with tempfile.TemporaryDirectory(prefix="nnssl_plan_") as folder:
        target = Path(folder, dataset_name)
        target.mkdir()
        fingerprint = folders.preprocessed / dataset_name / "dataset_fingerprint.json"
        write_json(target / fingerprint.name, read_json(fingerprint, "fingerprint"))
        # torch's device: the planner builds networks, of which it looks at the sizes alone
        with variables(nnUNet_preprocessed=folder), redirect_stdout(StringIO()), torch.device("meta"):
            ExperimentPlanner(dataset_name, plans_name=plans_name).plan_experiment()
        plan: dict[str, Any] = read_json(target / f"{plans_name}.json", "plan")
    if CONFIGURATION not in plan["configurations"]:
        raise UserError(f"{dataset_name}: nnU-Net plans no 3d_fullres for it, so weights for volumes have no use")
    configuration = plan["configurations"][CONFIGURATION]
    if spacing_mm is not None:
        scale = np.array(configuration["spacing"]) / np.array(spacing_mm)
        shape = np.array(configuration["median_image_size_in_voxels"]) * scale
        configuration["median_image_size_in_voxels"] = [float(n) for n in np.round(shape, 2)]
        configuration["spacing"] = [float(mm) for mm in spacing_mm]
    steps = _steps(architecture)
    median = configuration["median_image_size_in_voxels"]
    patch = [
        min(n // step, math.ceil(size / step)) * step for n, size, step in zip(patch_vox, median, steps, strict=True)
    ]
    if min(patch) < 1:
        raise UserError(
            f"{dataset_name}: a patch of {list(patch_vox)} voxels is shorter than the network's strides, {steps}"
        )
    configuration |= {"patch_size": patch, "batch_size": BATCH_SIZE, "architecture": _planned(architecture, patch)}
    plan["configurations"] = {CONFIGURATION: configuration}
    return plan


def _steps(architecture: dict[str, Any]) -> list[int]:
    """Return what a patch is a multiple of, per axis."""
    kwargs = architecture["arch_kwargs"]
    if "patch_embed_size" in kwargs:
        return list(kwargs["patch_embed_size"])
    return [math.prod(stride) for stride in zip(*encoder_strides(architecture), strict=True)]


def _planned(architecture: dict[str, Any], patch: Sequence[int]) -> dict[str, Any]:
    """Return the network as nnU-Net builds it from a plan: of Primus, the one whose last layer fits any number of classes."""
    kwargs = architecture["arch_kwargs"]
    if "patch_embed_size" not in kwargs:
        return architecture
    size = TransformerSize(
        kwargs["embed_dim"], kwargs["eva_depth"], kwargs["eva_numheads"], decoder_depth=2
    )  # the last is of pretraining
    return primus_architecture(size, kwargs["patch_embed_size"], patch)
