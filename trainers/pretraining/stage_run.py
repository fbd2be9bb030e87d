"""One run of a pretext stage: everything that determines it, its results folder, and the check of its checkpoints."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.checkpoint import Provenance, to_plain
from nnssl.data.changed_cases import contents_of
from nnssl.errors import ArgumentError, UserError
from nnssl.files import some
from nnssl.methods import Method, Stage
from nnssl.methods.settings import resolve_stage, values_by_key
from nnssl.networks.backbone import encoder_strides, planned_configuration
from nnssl.paths import Folders
from nnssl.plan import Plan, StageConfiguration, plan_from_dict
from nnssl.sizes import in_voxels
from trainers.pretraining.probe_run import ProbeOptions


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that the plan does not contain.

    Attributes:
        overrides: Settings as ``key=value``.
        init: Checkpoint whose network weights the first stage starts from.
        seed: Random seed for weights and every draw.
        workers: Processes that read patches; None to choose automatically.
        alone: Whether a later stage starts from random weights instead of those of the previous stage.
        probe: Labelled cases of the online probe; None for no probe. The training does not depend on it.
        retrieval_every: Epochs between two measurements of the retrieval of views; None for about ten per stage, 0 for none.
        track: Trackers that curves and pictures are written to; the training does not depend on them.
        chosen: How the method was chosen, for the record of the run; None if the user named it.
    """

    overrides: tuple[str, ...] = ()
    init: Path | None = None
    seed: int = 0
    workers: int | None = None
    alone: bool = False
    probe: ProbeOptions | None = None
    retrieval_every: int | None = None
    track: tuple[str, ...] = ()
    chosen: dict[str, Any] | None = None


@dataclass(frozen=True)
class StageRun:
    """Everything that determines a run of a stage; a run must not resume from a checkpoint of a different one.

    Attributes:
        plan: Plan of the data set.
        stage: Stage of a method.
        configuration: Configuration of the plan that the stage runs in.
        overrides: Settings as ``key=value``.
        seed: Random seed for weights and every draw.
        settings: Resolved settings of the stage.
        origins: Origin of every setting, by key.
    """

    plan: Plan
    stage: Stage
    configuration: str
    overrides: tuple[str, ...]
    seed: int
    settings: Any
    origins: dict[str, str]

    @property
    def own(self) -> StageConfiguration:
        """Settings that the stage reads from the plan, for its patch."""
        return self.plan.configuration(self.configuration).for_stage(self.stage.name, self.settings.training.patch_size)

    def folder(self, results: Path) -> Path:
        """Return the results folder of the run, below nnU-Net's results folder."""
        return stage_folder(results, self.plan, self.stage, self.configuration)

    def cases_folder(self, folders: Folders) -> Path:
        """Return the folder of the preprocessed cases that the run reads."""
        return folders.preprocessed / self.plan.dataset_name / self.plan.configuration(self.configuration).case_folder


def resolve_run(plan: Plan, stage: Stage, configuration: str, overrides: Sequence[str], seed: int) -> StageRun:
    """Resolve the settings of a stage for the configuration that its method is run in.

    Raises:
        UserError: If a setting is wrong, or if the plan has no such configuration or no schedule for the stage.
    """
    own = stage.runs_in(configuration)
    settings, origins = resolve_stage(stage.load(), plan.configuration(own), stage.name, overrides)
    check_patch(settings.training.patch_size, plan.nnunet, own)
    return StageRun(plan, stage, own, tuple(overrides), seed, settings, origins)


def check_patch(patch: Sequence[int], plans: dict[str, Any], configuration: str) -> None:
    """Check that a network accepts a patch.

    Raises:
        UserError: If it does not.
    """
    arguments = planned_configuration(plans, configuration)["architecture"]["arch_kwargs"]
    if "patch_embed_size" in arguments:
        multiple = list(arguments["patch_embed_size"])
    else:
        multiple = [math.prod(axis) for axis in zip(*encoder_strides({"arch_kwargs": arguments}), strict=True)]
    if len(patch) != len(multiple) or any(n % m for n, m in zip(patch, multiple, strict=True)):
        raise UserError(
            f"patch_size must be a multiple of {in_voxels(multiple)} voxels, as the network of {configuration} requires, got "
            f"{in_voxels(patch)}"
        )


def check_configuration(method: Method, configuration: str) -> None:
    """Check that a method can be run in a configuration.

    Raises:
        ArgumentError: If the configuration has another backbone.
    """
    if configuration not in method.configurations:
        known, needed = " or ".join(method.configurations), method.backbone
        message = f"{method.name} needs {needed}; configuration must be {known}, got {configuration}"
        raise ArgumentError(message, "configuration")


def stage_folder(results: Path, plan: Plan, stage: Stage, configuration: str) -> Path:
    """Return the results folder of a stage, named as nnU-Net names it.

    Args:
        results: nnU-Net's results folder.
        plan: Plan of the data set.
        stage: Stage of a method.
        configuration: Configuration that the method is run in.
    """
    name = f"{stage.trainer}__{plan.name}__{stage.runs_in(configuration)}"
    return results / plan.dataset_name / name / "fold_all"


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return resolved settings by key as JSON represents them (tuples as lists), which is how a checkpoint stores them."""
    return json.loads(json.dumps(to_plain(values_by_key(settings))))


def check_same_run(path: Path, found: Provenance, run: StageRun, cases_folder: Path) -> None:
    """Check that a checkpoint belongs to the run that is about to start.

    Args:
        path: Path of the checkpoint.
        found: Provenance of its weights.
        run: The run that is about to start.
        cases_folder: Folder of the preprocessed cases that it reads.

    Raises:
        UserError: If it belongs to another stage, data set, plan, configuration or seed, was made with other settings, or was
            trained on images or masks that were replaced since.
    """
    expected = {
        "stage": run.stage.name,
        "dataset_name": run.plan.dataset_name,
        "plans_name": run.plan.name,
        "configuration": run.configuration,
        "seed": run.seed,
    }
    for key, value in expected.items():
        if getattr(found, key) != value:
            raise ArgumentError(
                f"{path}: made with {key} {getattr(found, key)}, but this run has {value}; use restart to start over",
                "restart",
            )
    changes = [
        f"{key} {found.settings.get(key)} -> {value}"
        for key, value in plain_settings(run.settings).items()
        if key not in found.settings or found.settings[key] != value
    ]
    if changes:
        raise ArgumentError(
            f"{path}: made with other settings ({', '.join(changes)}); use restart to start over with the new ones",
            "restart",
        )
    earlier = plan_from_dict(found.plans, f"{path}: plan")
    if _decisive(earlier, run) != _decisive(run.plan, run):
        raise ArgumentError(
            f"{path}: made with an earlier plan {run.plan.name}; use restart to start over with the new one", "restart"
        )
    replaced = replaced_cases(found, cases_folder)
    if replaced:
        raise ArgumentError(
            f"{path}: trained on images or masks that were replaced since ({some(replaced)}); use restart to delete it and "
            "pretrain on the new ones, after copying the file if its weights are still needed",
            "restart",
        )


def replaced_cases(found: Provenance, folder: Path) -> list[str]:
    """Return the cases that weights were trained on and whose images or mask were replaced since, sorted.

    Cases that have been added or removed since, and checkpoints of earlier versions, are not compared.

    Args:
        found: Provenance of the weights.
        folder: Folder of the preprocessed cases.
    """
    before = found.case_contents or {}
    return sorted(case for case, content in contents_of(folder, list(before)).items() if content != before[case])


def _decisive(plan: Plan, run: StageRun) -> tuple[Any, Any]:
    """Return the parts of a plan that determine a run."""
    configuration = plan.pretext.configurations.get(run.configuration)
    planned = configuration is not None and run.stage.name in configuration.stages
    patch = run.settings.training.patch_size
    own = configuration.for_stage(run.stage.name, patch) if configuration is not None and planned else None
    return own, plan.nnunet["configurations"]
