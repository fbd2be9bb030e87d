"""The plan around a network from elsewhere: nnU-Net's own plan of the data with another network, patch and spacing."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.data.dataset_json import read_labelled_json
from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.networks.backbone import encoder_strides, weightless
from nnssl.paths import Folders
from nnssl.plan import TransformerSize
from nnssl.sizes import in_voxels
from planners.primus_rules import primus_architecture

CONFIGURATION = "3d_fullres"
BATCH_SIZE = 2
"""Batch size with which nnU-Net's main branch fine-tunes such weights."""


def plan_for_network(
    architecture: dict[str, Any],
    patch_vox: Sequence[int],
    spacing_mm: Sequence[float] | None,
    dataset_name: str,
    plans_name: str,
    folders: Folders,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """Plan a labelled data set around a given network, with nnU-Net's own planner.

    nnU-Net decides normalisation, reader and axes. The patch is that of the weights, shortened where the median image of the
    data set is shorter.

    Args:
        architecture: Architecture of the network, in the form of a plan's configuration.
        patch_vox: Patch that the authors of the weights recommend, (z, y, x), in voxels.
        spacing_mm: Spacing of pretraining in mm; None for the spacing that nnU-Net chooses.
        dataset_name: Name of the data set, whose preprocessed folder contains ``dataset_fingerprint.json``.
        plans_name: Name of the new plan.
        folders: nnU-Net's folders.
        batch_size: Batch size of the plan.

    Returns:
        The content of a plans file with the single configuration ``3d_fullres``.

    Raises:
        UserError: If the weights are for slices, nnU-Net plans no 3D configuration for the data set, or the patch is too small
            for the network.
    """
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    if len(patch_vox) != 3:
        raise UserError(
            f"{dataset_name}: cannot be planned around weights for {len(patch_vox)}D images; use weights for 3D images"
        )
    dataset_json = read_labelled_json(folders.raw / dataset_name / "dataset.json")
    # the planner overwrites existing files without asking, so it works in a temporary folder
    with tempfile.TemporaryDirectory(prefix="nnssl_plan_") as folder:
        target = Path(folder, dataset_name)
        target.mkdir()
        fingerprint = folders.preprocessed / dataset_name / "dataset_fingerprint.json"
        write_json(target / fingerprint.name, read_json(fingerprint, "fingerprint"))
        # the planner builds networks only to read their sizes
        with variables(nnUNet_preprocessed=folder), redirect_stdout(StringIO()), weightless():
            planner = ExperimentPlanner(dataset_name, plans_name=plans_name)
            planner.dataset_json = {"numTraining": len(planner.dataset), **dataset_json}
            planner.plan_experiment()
        plan: dict[str, Any] = read_json(target / f"{plans_name}.json", "plan")
    if CONFIGURATION not in plan["configurations"]:
        raise UserError(
            f"{dataset_name}: nnU-Net plans no configuration 3d_fullres, so weights for volumes cannot be used"
        )
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
            f"{dataset_name}: a patch of {in_voxels(patch_vox)} voxels is smaller than the network's strides, {in_voxels(steps)}"
        )
    configuration |= {"patch_size": patch, "batch_size": batch_size, "architecture": _planned(architecture, patch)}
    plan["configurations"] = {CONFIGURATION: configuration}
    return plan


def _steps(architecture: dict[str, Any]) -> list[int]:
    """Return the number of voxels along each axis of which a patch must be a multiple."""
    kwargs = architecture["arch_kwargs"]
    if "patch_embed_size" in kwargs:
        return list(kwargs["patch_embed_size"])
    return [math.prod(stride) for stride in zip(*encoder_strides(architecture), strict=True)]


def _planned(architecture: dict[str, Any], patch: Sequence[int]) -> dict[str, Any]:
    """Return the architecture for a plan; for Primus, the class whose last layer fits any number of classes."""
    kwargs = architecture["arch_kwargs"]
    if "patch_embed_size" not in kwargs:
        return architecture
    # decoder_depth matters only for pretraining
    size = TransformerSize(kwargs["embed_dim"], kwargs["eva_depth"], kwargs["eva_numheads"], decoder_depth=2)
    return primus_architecture(size, kwargs["patch_embed_size"], patch)
