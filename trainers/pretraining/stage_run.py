"""One run of a pretext stage: what decides it, where its results lie, and whether a checkpoint is of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.checkpoint import Provenance, to_plain
from nnssl.errors import UserError
from nnssl.methods import Stage
from nnssl.methods.settings import resolve_stage, values_by_key
from nnssl.plan import Plan, plan_from_dict
from trainers.pretraining.probe_run import ProbeOptions


@dataclass(frozen=True)
class RunOptions:
    """What the command line says of a run beyond the plan.

    Attributes:
        overrides: settings as ``key=value``.
        init: checkpoint whose network weights the first stage starts from.
        seed: of weights and of every draw.
        workers: processes that read patches; None to choose.
        alone: start a later stage from random weights, not from those of the stage before it.
        probe: labelled cases for the online probe; None for no probe. Changes nothing of the training.
    """

    overrides: tuple[str, ...] = ()
    init: Path | None = None
    seed: int = 0
    workers: int | None = None
    alone: bool = False
    probe: ProbeOptions | None = None


@dataclass(frozen=True)
class StageRun:
    """What decides a run of a stage; going on with a checkpoint of anything else would be a silent mixture.

    Attributes:
        plan: of the data set.
        stage: of a method.
        configuration: of the plan, in which the stage runs.
        overrides: settings as ``key=value``.
        seed: of weights and of every draw.
        settings: of the stage, resolved.
        origins: of every setting, by key.
    """

    plan: Plan
    stage: Stage
    configuration: str
    overrides: tuple[str, ...]
    seed: int
    settings: Any
    origins: dict[str, str]

    def folder(self, results: Path) -> Path:
        """Return where the run leaves its results, below nnU-Net's folder of results."""
        return stage_folder(results, self.plan, self.stage, self.configuration)


def resolve_run(plan: Plan, stage: Stage, configuration: str, overrides: Sequence[str], seed: int) -> StageRun:
    """Resolve the settings of a stage whose method was asked to run in a configuration.

    Raises:
        UserError: a setting is wrong, or the plan has no such configuration or no schedule for the stage.
    """
    own = stage.runs_in(configuration)
    settings, origins = resolve_stage(stage.load(), plan.configuration(own), stage.name, overrides)
    return StageRun(plan, stage, own, tuple(overrides), seed, settings, origins)


def stage_folder(results: Path, plan: Plan, stage: Stage, configuration: str) -> Path:
    """Return where a stage of a method that was asked to run in a configuration leaves its results, as nnU-Net names it.

    Args:
        results: nnU-Net's folder of results.
        plan: of the data set.
        stage: of the method.
        configuration: of the plan.
    """
    name = f"{stage.trainer}__{plan.name}__{stage.runs_in(configuration)}"
    return results / plan.dataset_name / name / "fold_all"


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return resolved settings by key as JSON knows them (lists for tuples), which is how a checkpoint holds them."""
    return json.loads(json.dumps(to_plain(values_by_key(settings))))


def check_same_run(path: Path, found: Provenance, run: StageRun) -> None:
    """Check that a checkpoint is of the run that is about to start.

    Args:
        path: of the checkpoint.
        found: where its weights come from.
        run: that is about to start.

    Raises:
        UserError: it is of another stage, data set, plan, configuration, seed, or was run with other settings.
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
            raise UserError(f"{path}: is of {key} {getattr(found, key)}, this run of {value}; --restart starts again")
    changes = [
        f"{key} {found.settings.get(key)} -> {value}"
        for key, value in plain_settings(run.settings).items()
        if key not in found.settings or found.settings[key] != value
    ]
    if changes:
        raise UserError(
            f"{path}: was run with other settings ({', '.join(changes)}); --restart starts again with the new ones"
        )
    earlier = plan_from_dict(found.plans, f"{path}: plan")
    if _decisive(earlier, run.configuration) != _decisive(run.plan, run.configuration):
        raise UserError(
            f"{path}: was run with an earlier plan {run.plan.name}; --restart starts again with the new one"
        )


def _decisive(plan: Plan, configuration: str) -> tuple[Any, Any]:
    """Return what of a plan decides a run in one of its configurations."""
    return plan.pretext.configurations.get(configuration), plan.nnunet["configurations"]
