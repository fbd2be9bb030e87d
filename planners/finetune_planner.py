"""The downstream nnU-Net plan that fits given weights: the plan they were pretrained with, moved to another data set.

Patch size, spacing, normalisation and network stay as pretrained, so that the weights fit; the data set's name and
reader become the target's. nnU-Net's own ``nnUNetv2_move_plans_between_datasets`` does the move. The result is a plain
nnU-Net plan without nnssl's ``pretext`` section: that one describes the pretraining data.
"""

import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.log import logger
from nnssl.paths import Folders
from nnssl.plan import plan_path


@dataclass(frozen=True)
class AdoptedPlan:
    """A plan in the target's preprocessed folder that fits the weights."""

    name: str
    """Name of the plans file without ``.json``; what ``-p`` of nnU-Net's commands takes."""
    path: Path
    content: dict[str, Any]


def adopt_plan(
    plan: Mapping[str, Any], target_dataset: str, folders: Folders, plans_name: str | None = None
) -> AdoptedPlan:
    """Write the plan of pretrained weights for a labelled data set, and say so; what is there is kept.

    Args:
        plan: as ``fit_plan``.
        target_dataset: as ``fit_plan``.
        folders: as ``fit_plan``.
        plans_name: as ``fit_plan``.

    Returns:
        The plan, written or found.

    Raises:
        UserError: as ``fit_plan``.
    """
    adopted = fit_plan(plan, target_dataset, folders, plans_name)
    if adopted.path.exists():
        logger.info(f"Plan {adopted.name} for {target_dataset}: there already and the same ({adopted.path})")
        return adopted
    adopted.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(adopted.path, adopted.content)
    logger.info(f"Plan {adopted.name} for {target_dataset}: that of {plan['dataset_name']}, written to {adopted.path}")
    return adopted


def fit_plan(
    plan: Mapping[str, Any], target_dataset: str, folders: Folders, plans_name: str | None = None
) -> AdoptedPlan:
    """Return the plan of pretrained weights for a labelled data set, and the file that it has or gets; nothing is written.

    The file keeps the plan's name if that is free for the target or holds the same plan already. Where another plan has
    that name, the file is called ``<name>From<id of the pretraining data set>``. No file is ever overwritten.

    Args:
        plan: content of the plans file the weights were pretrained with.
        target_dataset: name of the labelled data set, ``DatasetXXX_Name``.
        folders: nnU-Net's folders.
        plans_name: name of the file, to choose it oneself.

    Raises:
        UserError: the numbers of channels differ, the target has no ``dataset.json``, or other plans have the names.
    """
    dataset_json = read_json(folders.raw / target_dataset / "dataset.json", "dataset.json of a labelled data set")
    check_channels(plan, target_dataset, dataset_json)
    names = [plans_name] if plans_name else [plan["plans_name"], _name_by_source(plan)]
    for name in dict.fromkeys(names):
        path = plan_path(folders, target_dataset, name)
        content = moved_plan(plan, target_dataset, name)
        if not path.exists() or _without_pretext(read_json(path, "plan")) == content:
            return AdoptedPlan(name, path, content)
        logger.info(f"Plan {name} for {target_dataset}: there is another one with this name, kept as it is ({path})")
    raise UserError(
        f"{path}: is another plan than the one these weights need; choose a free name with --plans-name, or delete the "
        "file if it is no longer needed"
    )


def moved_plan(plan: Mapping[str, Any], target_dataset: str, name: str) -> dict[str, Any]:
    """Return a plan as nnU-Net moves it to another data set, under a name, without nnssl's section.

    Args:
        plan: content of the source's plans file.
        target_dataset: name of a raw data set; its ``dataset.json`` and first image decide the reader.
        name: the plan's new name; with another name than before, the folders of preprocessed data get other names too.

    Raises:
        UserError: nnU-Net finds no reader or no image.
    """
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )

    # nnU-Net moves files, unasked over what is there; it gets a folder of its own to do so. A source that is the target
    # itself would be the same file.
    with tempfile.TemporaryDirectory(prefix="nnssl_plan_") as folder:
        source = Path(folder, "Dataset000_Source")
        target = Path(folder, target_dataset)
        source.mkdir()
        target.mkdir()
        write_json(source / f"{plan['plans_name']}.json", _without_pretext(plan))
        try:
            with variables(nnUNet_preprocessed=folder), redirect_stdout(StringIO()):
                move_plans_between_datasets(source.name, target_dataset, plan["plans_name"], name)
        except (RuntimeError, StopIteration, OSError) as error:
            raise UserError(
                f"{target_dataset}: nnU-Net cannot read its images ({error}); check imagesTr and dataset.json"
            ) from error
        return read_json(target / f"{name}.json", "plan")


def check_channels(plan: Mapping[str, Any], target_dataset: str, dataset_json: Mapping[str, Any]) -> None:
    """Check that a data set has as many channels as a plan normalises.

    Raises:
        UserError: it has not, or its ``dataset.json`` names no channels or labels.
    """
    check_described(target_dataset, dataset_json)
    found = len(dataset_json["channel_names"])
    # a configuration that inherits has no schemes of its own
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
            f"({plan['dataset_name']}); take weights pretrained on as many channels, or make these fit the data set's own plans "
            "with nnssl_export --for-plans"
        )


def check_described(dataset_name: str, dataset_json: Mapping[str, Any]) -> None:
    """Check that a ``dataset.json`` names what nnU-Net needs to train.

    Raises:
        UserError: it does not.
    """
    for key in ("channel_names", "labels", "file_ending"):
        if key not in dataset_json:
            raise UserError(f"{dataset_name}: dataset.json has no {key!r}, so it cannot be trained on; add it")


def _name_by_source(plan: Mapping[str, Any]) -> str:
    """``nnsslPlansFrom501`` for plan nnsslPlans of Dataset501_Name."""
    return f"{plan['plans_name']}From{plan['dataset_name'].removeprefix('Dataset').split('_')[0]}"


def _without_pretext(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key != "pretext"}
