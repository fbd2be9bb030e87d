"""The nnU-Net plan for fine-tuning given weights: the plan that they were pretrained with, moved to another data set.

Patch size, spacing, normalisation and network stay the same so that the weights fit; the data set's name and reader become
those of the target. nnU-Net's own ``nnUNetv2_move_plans_between_datasets`` moves the plan. The result is a plain nnU-Net plan
without nnssl's ``pretext`` section, which describes the pretraining data.
"""

import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.inline_pool import without_workers
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json, write_json
from nnssl.log import logger
from nnssl.networks.backbone import planned_configuration
from nnssl.networks.pyramid import PYRAMID_CLASSES
from nnssl.paths import Folders
from nnssl.plan import plan_path


@dataclass(frozen=True)
class AdoptedPlan:
    """Plan in the target's preprocessed folder that fits the weights."""

    name: str
    """Name of the plans file without ``.json``, as nnU-Net's commands expect after ``-p``."""
    path: Path
    """Path of the plans file."""
    content: dict[str, Any]
    """Content of the plans file."""


def adopt_plan(
    plan: Mapping[str, Any], target_dataset: str, folders: Folders, plans_name: str | None = None
) -> AdoptedPlan:
    """Write the plan of pretrained weights for a labelled data set, unless it exists already.

    Args:
        plan: See ``fit_plan``.
        target_dataset: See ``fit_plan``.
        folders: See ``fit_plan``.
        plans_name: See ``fit_plan``.

    Returns:
        The plan that was written or found.

    Raises:
        UserError: See ``fit_plan``.
    """
    adopted = fit_plan(plan, target_dataset, folders, plans_name)
    if adopted.path.exists():
        logger.info(f"Plan {adopted.name} of {target_dataset} exists and fits the weights ({adopted.path})")
        return adopted
    adopted.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(adopted.path, adopted.content)
    logger.info(f"Plan {adopted.name} of {plan['dataset_name']} copied to {target_dataset}: {adopted.path}")
    return adopted


def fit_plan(
    plan: Mapping[str, Any], target_dataset: str, folders: Folders, plans_name: str | None = None
) -> AdoptedPlan:
    """Return the plan of pretrained weights for a labelled data set, with the path of its file, without writing it.

    The file keeps the plan's name unless a different plan of the target has that name. Then, the file is called
    ``<name>From<id of the pretraining data set>``. Files are never overwritten.

    Args:
        plan: Content of the plans file that the weights were pretrained with.
        target_dataset: Name of the labelled data set, ``DatasetXXX_Name``.
        folders: nnU-Net's folders.
        plans_name: Name of the plans file; None to choose it as described above.

    Raises:
        UserError: If the numbers of channels differ, or the target has no ``dataset.json``.
        ArgumentError: If other plans have these names.
    """
    dataset_json = read_labelled_json(folders.raw / target_dataset / "dataset.json")
    check_channels(plan, target_dataset, dataset_json)
    names = [plans_name] if plans_name else [plan["plans_name"], _name_by_source(plan)]
    for name in dict.fromkeys(names):
        path = plan_path(folders, target_dataset, name)
        content = moved_plan(plan, target_dataset, name)
        if not path.exists() or _without_pretext(read_json(path, "plan")) == content:
            return AdoptedPlan(name, path, content)
        logger.info(f"{target_dataset} already has a different plan named {name}, which is kept ({path})")
    raise ArgumentError(
        f"{path}: differs from the plan that these weights need; choose another name with plans_name, or delete the file "
        "if it is no longer needed",
        "plans_name",
    )


def moved_plan(plan: Mapping[str, Any], target_dataset: str, name: str) -> dict[str, Any]:
    """Return a plan as nnU-Net moves it to another data set, without nnssl's section.

    Args:
        plan: Content of the source's plans file.
        target_dataset: Name of a raw data set, whose ``dataset.json`` and first image determine the reader.
        name: New name of the plan. If it changes, so do the names of the folders with preprocessed data.

    Raises:
        UserError: If nnU-Net finds no reader or no image.
    """
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )
    from nnunetv2.utilities import utils

    # nnU-Net overwrites existing files without asking, so it works in a temporary folder. The source gets a name of its own,
    # because source and target may be the same data set.
    with tempfile.TemporaryDirectory(prefix="nnssl_plan_") as folder:
        source = Path(folder, "Dataset000_Source")
        target = Path(folder, target_dataset)
        source.mkdir()
        target.mkdir()
        write_json(source / f"{plan['plans_name']}.json", _without_pretext(plan))
        try:
            with variables(nnUNet_preprocessed=folder), redirect_stdout(StringIO()), without_workers(utils):
                move_plans_between_datasets(source.name, target_dataset, plan["plans_name"], name)
        except (RuntimeError, StopIteration, OSError) as error:
            raise UserError(
                f"{target_dataset}: nnU-Net cannot read its images ({error}); check imagesTr and dataset.json"
            ) from error
        return read_json(target / f"{name}.json", "plan")


def with_pyramid_segmentation(plan: AdoptedPlan, configuration: str) -> AdoptedPlan | None:
    """Return a plan in which the segmentation of a configuration reads all decoder stages and the bottleneck.

    The plan's file does not change; preprocessed data are the same.

    Args:
        plan: Plan of the data set.
        configuration: Name of the configuration.

    Returns:
        The plan; None if the network is no U-Net of nnU-Net.
    """
    architecture = planned_configuration(plan.content, configuration)["architecture"]
    name = PYRAMID_CLASSES.get(architecture["network_class_name"])
    if name is None:
        return None
    configurations = plan.content["configurations"]
    changed = {**configurations[configuration], "architecture": {**architecture, "network_class_name": name}}
    return replace(plan, content={**plan.content, "configurations": {**configurations, configuration: changed}})


def check_channels(plan: Mapping[str, Any], target_dataset: str, dataset_json: Mapping[str, Any]) -> None:
    """Check that a data set has the number of channels that a plan normalises.

    Raises:
        UserError: If the number differs.
    """
    found = len(dataset_json["channel_names"])
    # a configuration that inherits from another one has no schemes of its own
    planned = {
        len(configuration["normalization_schemes"])
        for configuration in plan["configurations"].values()
        if "normalization_schemes" in configuration
    }
    if planned != {found}:
        names = ", ".join(dataset_json["channel_names"].values())
        pretrained = " or ".join(map(str, sorted(planned)))
        raise UserError(
            f"{target_dataset}: has {found} channel(s) ({names}), but the weights were pretrained on {pretrained} "
            f"({plan['dataset_name']}); use weights pretrained on {found} channel(s), or fit these weights to the data set's "
            "own plans with nnssl_export --for-plans"
        )


def _name_by_source(plan: Mapping[str, Any]) -> str:
    """Return, for example, ``nnsslPlansFrom501`` for the plan nnsslPlans of Dataset501_Name."""
    return f"{plan['plans_name']}From{plan['dataset_name'].removeprefix('Dataset').split('_')[0]}"


def _without_pretext(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key != "pretext"}
