"""The arms of a study: how the user names them, and where their weights are or will be written."""

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nnssl.checkpoint import FINAL
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.files import content_digest, some
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.methods import AUTO, METHODS, Method, find_method, find_stage
from nnssl.paths import Folders
from nnssl.plan import Plan, plan_from_dict
from nnssl.study.table import SCRATCH
from nnssl.weights.download import local_weights
from nnssl.weights.opened_checkpoint import open_checkpoint
from trainers.pretraining.pretrain import choose_configuration, is_finished, needed_runs, pretrain
from trainers.pretraining.settings import PretrainSettings
from trainers.pretraining.stage_run import StageRun, replaced_cases, stage_folder

OWN_FOLDER = "nnssl_arms"
"""Folder below nnU-Net's results for arms with settings of their own or single stages, which must not use the method's folder."""

HYBRID = "_hybrid"
"""Suffix of the configurations whose hybrid network contains the U-Net of the configuration without the suffix."""


@dataclass(frozen=True)
class Arm:
    """One pretraining that is compared with training from scratch.

    Attributes:
        name: Name as typed by the user.
        method: Pretext method; None for a checkpoint; ``auto`` for one that is chosen on the pretraining data.
        stages: Names of the stages that are run; empty for a checkpoint.
        overrides: Settings as ``key=value``.
        checkpoint: File with the weights; None if the study pretrains them.
        budget_minutes: Wall time of the short runs by which a method is chosen; None for the default.
        candidates: Methods to choose among; empty for all.
        reason: Reason for which the method was chosen, in words; None if the user named it.
    """

    name: str
    method: str | None = None
    stages: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    checkpoint: Path | None = None
    budget_minutes: float | None = None
    candidates: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Source:
    """The data and settings that the methods of a study are pretrained with.

    Attributes:
        plan: Plan of the data set to pretrain on.
        configuration: Configuration that is fine-tuned.
        overrides: Settings of every method, as ``key=value``.
        folders: nnU-Net's folders.
        device: Device to train on.
        seed: Random seed of pretraining.
    """

    plan: Plan
    configuration: str
    overrides: tuple[str, ...]
    folders: Folders
    device: torch.device
    seed: int = 0


@dataclass(frozen=True)
class Pretraining:
    """The pretraining that makes the weights of an arm.

    Attributes:
        method: Pretext method.
        stages: Names of the stages that are run.
        configuration: Configuration of the plan.
        overrides: Settings as ``key=value``.
        results: nnU-Net's results folder for this pretraining.
        final: Checkpoint of the last stage.
    """

    method: Method
    stages: tuple[str, ...]
    configuration: str
    overrides: tuple[str, ...]
    results: Path
    final: Path

    @property
    def finished(self) -> bool:
        """Whether the checkpoint of the last stage exists."""
        return self.final.exists()

    @property
    def stage_folders(self) -> tuple[Path, ...]:
        """Results folders of the stages that are run."""
        base = self.final.parents[2]
        plans = self.final.parents[1].name.split("__")[1]
        chosen = [stage for stage in self.method.stages if stage.name in self.stages]
        names = (f"{stage.trainer}__{plans}__{stage.runs_in(self.configuration)}" for stage in chosen)
        return tuple(base / name / "fold_all" for name in names)


def parse_arm(text: str) -> Arm:
    """Read an arm: ``METHOD``, ``METHOD:KEY=VALUE:...``, ``auto``, ``STAGE``, ``STAGE:KEY=VALUE``, ``FILE`` or ``NAME=FILE``.

    Raises:
        ArgumentError: If it has none of these forms, or if the file does not exist.
    """
    name, equals, path = text.rpartition("=")
    if text.endswith(".pth"):
        file = Path(path if equals else text).expanduser().absolute()
        if not file.is_file():
            raise ArgumentError(
                f"arms: checkpoint {file} not found; check the path, or give the name of a method", "arms"
            )
        return Arm(name=name or f"{file.parent.parent.name}/{file.stem}", checkpoint=file)
    head, *overrides = text.split(":")
    if head == AUTO:
        return _parse_auto(text, overrides)
    stages = {stage.name for method in METHODS.values() for stage in method.stages}
    if head in stages:
        return Arm(text, find_stage(head)[0].name, (head,), tuple(overrides))
    if head == SCRATCH:
        raise ArgumentError("arms must not contain scratch, which is always trained; omit it", "arms")
    if head not in METHODS:
        raise ArgumentError(
            f"Unknown arm {text!r}: expected a method ({', '.join(METHODS)}), {AUTO}, a stage ({', '.join(sorted(stages))}) or a "
            ".pth file.",
            "arms",
        )
    return Arm(text, head, tuple(stage.name for stage in find_method(head).stages), tuple(overrides))


def _parse_or_download(text: str, folders: Folders | None) -> Arm:
    """Read an arm; weights that are given as an address are downloaded."""
    match = re.fullmatch(r"(?:([^:/=]+)=)?((?:https?|hf)://.+)", text)
    if match is None:
        return parse_arm(text)
    path = local_weights(match[2], folders)
    return Arm(name=match[1] or path.stem, checkpoint=path)


def _parse_auto(text: str, options: Sequence[str]) -> Arm:
    """Read ``auto``, ``auto:budget=MINUTES`` and ``auto:candidates=METHOD,METHOD``; other settings are those of the runs."""
    arm = Arm(text, AUTO)
    for option in options:
        key, _, value = option.partition("=")
        if key == "budget":
            try:
                minutes = float(value)
            except ValueError:
                minutes = math.nan
            if not 0 < minutes < math.inf:
                raise ArgumentError(
                    f"arms: budget must be a number of minutes above 0, got {value!r} in {text}", "arms"
                )
            arm = replace(arm, budget_minutes=minutes)
        elif key == "candidates":
            arm = replace(arm, candidates=tuple(value.split(",")))
        else:
            arm = replace(arm, overrides=(*arm.overrides, option))
    return arm


def parse_arms(texts: Sequence[str], folders: Folders | None = None) -> tuple[Arm, ...]:
    """Read the arms of a study. A checkpoint at an address is downloaded.

    Args:
        texts: Arms as in ``parse_arm``, whose files may also be ``https://...`` or ``hf://OWNER/REPO/FILE``.
        folders: nnU-Net's folders; None for those of the environment.

    Raises:
        ArgumentError: If an arm is wrong, or if two have the same name.
        UserError: If a checkpoint cannot be downloaded.
    """
    arms = tuple(_parse_or_download(text, folders) for text in texts)
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ArgumentError(
            f"arms must have different names, got {twice} more than once; name checkpoints with NAME=FILE", "arms"
        )
    return arms


def locate(arm: Arm, source: Source) -> Pretraining:
    """Return where the weights of an arm are, or will be once it is pretrained.

    A method without settings of its own uses the method's results folder as it is. With settings, and for a stage that is
    not the method's first, that folder is used only if it contains exactly this run; otherwise the arm gets a folder of
    its own.

    Raises:
        UserError: If the plan has no configuration for the method, or if a setting is wrong.
    """
    assert arm.method is not None
    method = find_method(arm.method)
    configuration = configuration_for(method, source.plan, source.configuration)
    overrides = (*source.overrides, *arm.overrides)
    last = find_stage(arm.stages[-1])[1]
    shared = stage_folder(source.folders.results, source.plan, last, configuration) / FINAL
    whole = arm.stages == tuple(stage.name for stage in method.stages[: len(arm.stages)])
    taken = Pretraining(method, arm.stages, configuration, overrides, source.folders.results, shared)
    if whole and not overrides:
        return taken
    if whole and shared.exists() and _same_run(arm, method, source, overrides):
        return taken
    digest = content_digest([arm.stages, overrides, configuration, source.plan.name])
    root = source.folders.results / OWN_FOLDER / f"{re.sub(r'[^A-Za-z0-9.=-]+', '-', arm.name)}-{digest}"
    final = stage_folder(root, source.plan, last, configuration) / FINAL
    return Pretraining(method, arm.stages, configuration, overrides, root, final)


def make_weights(pretraining: Pretraining, source: Source) -> None:
    """Run the pretraining of an arm, or the part of it that is not finished."""
    pretraining.results.mkdir(parents=True, exist_ok=True)
    if pretraining.results != source.folders.results:
        for run in runs_of(pretraining.method, pretraining.stages, pretraining.overrides, source):
            if run.stage.configuration is not None and len(pretraining.stages) > 1:
                _share_stage(pretraining, run, source)
    with variables(nnUNet_results=str(pretraining.results)):
        pretrain(
            pretraining.method.name,
            source.plan.dataset_name,
            PretrainSettings(
                configuration=pretraining.configuration,
                plans_name=source.plan.name,
                overrides=pretraining.overrides,
                seed=source.seed,
                device=source.device,
                stages=pretraining.stages,
            ),
            replace(source.folders, results=pretraining.results),
        )


def check_up_to_date(arm: str, pretraining: Pretraining, folders: Folders) -> None:
    """Check that the images and masks of finished weights are still those that they were pretrained on.

    Raises:
        UserError: If some were replaced; the message names their cases.
    """
    if not pretraining.finished:
        return
    made = open_checkpoint(pretraining.final).own_provenance
    plan = plan_from_dict(made.plans, f"{pretraining.final}: plan")
    replaced = replaced_cases(
        made, folders.preprocessed / made.dataset_name / plan.configuration(made.configuration).case_folder
    )
    if replaced:
        raise UserError(
            f"{pretraining.final}: the weights of {arm} were trained on images or masks that were replaced since "
            f"({some(replaced)}); delete {pretraining.final.parent} to pretrain again, or name the file as an arm to compare "
            "them as they are"
        )


def _share_stage(pretraining: Pretraining, run: StageRun, source: Source) -> None:
    """Run a preparing stage once for all arms that need it with the same settings."""
    own = run.folder(pretraining.results)
    if (own / FINAL).exists():
        return
    name = run.stage.name
    digest = content_digest([name, run.overrides, source.plan.name, source.seed])
    root = source.folders.results / OWN_FOLDER / f"{name}-{digest}"
    root.mkdir(parents=True, exist_ok=True)
    with only_process(root, "pretraining a shared stage"), variables(nnUNet_results=str(root)):
        pretrain(
            find_stage(name)[0].name,
            source.plan.dataset_name,
            PretrainSettings(
                configuration=run.configuration,
                plans_name=source.plan.name,
                overrides=run.overrides,
                seed=source.seed,
                device=source.device,
                stages=(name,),
            ),
            replace(source.folders, results=root),
        )
    shared = run.folder(root)
    logger.info(f"{name}: copied from {shared}")
    shutil.copytree(shared, own, dirs_exist_ok=True)


def configuration_for(method: Method, plan: Plan, wanted: str) -> str:
    """Return the configuration to pretrain: the one that is fine-tuned, or else the hybrid whose weights fit it.

    Raises:
        ArgumentError: If the method or the plan has neither.
    """
    for name in (wanted, f"{wanted}{HYBRID}"):
        if name in method.configurations and name in plan.pretext.configurations:
            return choose_configuration(method, plan, name)
    raise ArgumentError(
        f"{method.name} needs {method.backbone} ({', '.join(method.configurations)}), whose weights do not fit {wanted}; "
        f"plan {plan.name} of {plan.dataset_name} has {', '.join(sorted(plan.pretext.configurations))}; choose another "
        "configuration",
        "configuration",
    )


def _same_run(arm: Arm, method: Method, source: Source, overrides: tuple[str, ...]) -> bool:
    """Return whether the method's own results folder contains finished stages with exactly these settings."""
    try:
        return all(is_finished(source.folders, run) for run in runs_of(method, arm.stages, overrides, source))
    except UserError:
        return False


def runs_of(method: Method, stages: Sequence[str], overrides: Sequence[str], source: Source) -> list[StageRun]:
    """Return the runs of a method's stages that are needed."""
    configuration = configuration_for(method, source.plan, source.configuration)
    return needed_runs(method, source.plan, configuration, stages, overrides, source.seed)
