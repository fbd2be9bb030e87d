"""Runs the stages of a pretext method in order, on one process or several, going on where an earlier run stopped."""

import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnssl.checkpoint import read_checkpoint
from nnssl.data.jobs import default_processes
from nnssl.data.raw import find_dataset
from nnssl.errors import UserError
from nnssl.export.source import open_source
from nnssl.files import read_json
from nnssl.methods import Method, Stage, find_method
from nnssl.methods.settings import resolve_stage, split_overrides
from nnssl.paths import Folders
from planners.plan import PLANS_NAME, Plan, read_plan
from trainers import pretext
from trainers.pretrain_trainer import FINAL, LATEST, PretrainTrainer, RunOptions, check_same_run, plain_settings
from trainers.probe_run import CASES, ProbeOptions, prepare_probe

LONGEST_WAIT = timedelta(hours=24)
"""Of processes for the first one, which alone pairs and examines whole scans."""


def pretrain(
    method_name: str,
    folders: Folders,
    dataset_name: str | None = None,
    configuration: str | None = None,
    plans_name: str = PLANS_NAME,
    overrides: Sequence[str] = (),
    init: Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008  a device is immutable
    processes: int = 1,
    restart: bool = False,
    stages: Sequence[str] | None = None,
    probe: str | int | None = None,
    probe_cases: int = CASES,
    probe_every: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Pretrain a planned data set with a method, all its stages in order.

    A finished stage with the same plan and settings is recognised and skipped; an unfinished one goes on from its last
    checkpoint. Results lie in ``<results>/<data set>/<Trainer>__<plans>__<configuration>/fold_all``, one folder per stage.

    Args:
        method_name: a key of ``nnssl.methods.METHODS``.
        folders: nnU-Net's folders.
        dataset_name: ``DatasetXXX_Name``; None for the data set that was planned last.
        configuration: of the plan; None for the first one of the plan that the method can use.
        plans_name: identifier of the plan.
        overrides: settings as ``key=value``, or ``stage.key=value`` for one stage only.
        init: checkpoint whose weights the first stage starts from, among those whose weights are handed on.
        seed: of weights and of every draw.
        workers: processes that read patches; None to choose.
        device: where to train.
        processes: number of processes (GPUs); the global batch stays that of the plan.
        restart: remove earlier results of the method's stages first.
        stages: names of the stages to run, None for all; one whose predecessor is not run starts from random weights.
        probe: labelled data set, number or name, for a linear probe during training; None for none.
        probe_cases: labelled cases that it learns from, and as many others that it is scored on.
        probe_every: epochs between two probes; None for about twenty in a stage.
        say: called with lines for the user.

    Returns:
        The last stage's ``checkpoint_final.pth``.

    Raises:
        UserError: method, data set, plan, configuration or a setting is not there or does not fit; a checkpoint belongs to
            another run.
    """
    method = find_method(method_name)
    path = find_plan(folders, dataset_name, plans_name, say)
    plan = read_plan(path)
    configuration = choose_configuration(method, plan, configuration)
    given = split_overrides(overrides, {stage.name: stage.load() for stage in method.stages})
    wanted = [stage for stage in method.stages if stages is None or stage.name in stages]
    chosen = needed_stages(wanted, plan, configuration, given)
    for stage in wanted:
        if stage not in chosen:
            say(f"{stage.name}: left out, nothing asks for it with these settings")
    if init is not None:
        open_source(init)
    # what only prepares another stage does not hand its weights on
    begun = next((stage for stage in reversed(chosen) if stage.fresh), chosen[0])
    if restart and (not launched() or os.environ["RANK"] == "0"):
        _remove([stage_folder(folders, plan, stage, configuration) for stage in chosen], say)
    probed = None
    if probe is not None:
        probed = _prepare_probe(probe, plan, configuration, folders, probe_cases, probe_every, say)
    for index, stage in enumerate(chosen):
        own = stage.runs_in(configuration)
        options = RunOptions(
            tuple(given[stage.name]),
            init if stage == begun else None,
            seed,
            workers,
            alone=index == 0 and stage != method.stages[0],
            probe=probed if own == configuration else None,
        )
        folder = stage_folder(folders, plan, stage, configuration)
        if is_finished(folder, plan, stage, configuration, options):
            say(f"{stage.name}: finished before, {folder / FINAL}")
            continue
        say(f"{stage.name}: {folder}")
        _launch(path, plan, stage, own, options, device, processes)
    return stage_folder(folders, plan, chosen[-1], configuration) / FINAL


def launched() -> bool:
    """Return whether torchrun started this process, perhaps on several nodes."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _remove(results: Sequence[Path], say: Callable[[str], None]) -> None:
    for folder in results:
        if folder.exists():
            say(f"--restart: removing {folder}")
            shutil.rmtree(folder)


def _prepare_probe(
    probe: str | int,
    plan: Plan,
    configuration: str,
    folders: Folders,
    cases: int,
    every: int | None,
    say: Callable[[str], None],
) -> ProbeOptions:
    if not plan.configuration(configuration).has_feature_maps:
        raise UserError(
            f"--probe {probe}: reads feature maps of a U-Net, which {configuration} has not; leave it out or take another -c"
        )
    name = find_dataset(probe, folders)
    return prepare_probe(name, plan, configuration, folders, cases, every, default_processes(), say)


def _launch(
    path: Path,
    plan: Plan,
    stage: Stage,
    configuration: str,
    options: RunOptions,
    device: torch.device,
    processes: int,
) -> None:
    """Run a stage in this process, in the group that torchrun made, or in processes of its own."""
    if launched():
        own_rank, local_rank, all_ranks = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        check_batch(plan, stage, configuration, options, all_ranks)
        run_in_group(own_rank, local_rank, all_ranks, path, stage.trainer, configuration, options, device)
    elif processes > 1:
        check_batch(plan, stage, configuration, options, processes)
        _spawn(processes, path, stage.trainer, configuration, options, device)
    else:
        run_stage(path, stage.trainer, configuration, options, device)


def find_plan(folders: Folders, dataset_name: str | None, plans_name: str, say: Callable[[str], None]) -> Path:
    """Return the plans file of a data set, or of the one that was planned last.

    Raises:
        UserError: there is no such plan.
    """
    if dataset_name is not None:
        path = folders.preprocessed / dataset_name / f"{plans_name}.json"
        if not path.exists():
            raise UserError(f"{path}: there is no such plan; run nnssl_plan_and_preprocess -d {dataset_name}")
        return path
    plans = [
        path
        for path in folders.preprocessed.glob(f"Dataset*/{plans_name}.json")
        if "pretext" in read_json(path, "plan")
    ]
    if not plans:
        raise UserError(f"{folders.preprocessed}: no data set was planned yet; run nnssl_plan_and_preprocess -d ID")
    newest = max(plans, key=lambda path: path.stat().st_mtime)
    say(f"no -d given: the data set planned last is {newest.parent.name}")
    return newest


def choose_configuration(method: Method, plan: Plan, wanted: str | None) -> str:
    """Return the configuration to pretrain: the wanted one if it has the method's backbone, or the first that has it.

    Raises:
        UserError: the plan has no configuration with that backbone, or the wanted one lacks it.
    """
    usable = [name for name in method.configurations if name in plan.pretext.configurations]
    if wanted is None:
        if not usable:
            known = ", ".join(sorted(plan.pretext.configurations))
            raise UserError(
                f"{method.name} needs {method.backbone}; plan {plan.name} of {plan.dataset_name} has only {known} "
                "(its reasons say why)"
            )
        return usable[0]
    plan.configuration(wanted)
    if wanted not in usable:
        raise UserError(
            f"{method.name} needs {method.backbone}, which configuration {wanted} does not have; "
            f"take -c {' or '.join(usable) or 'another method'}"
        )
    return wanted


def needed_stages(
    stages: Sequence[Stage], plan: Plan, configuration: str, given: Mapping[str, Sequence[str]]
) -> list[Stage]:
    """Return the stages without those that later ones have no use for under their settings.

    Args:
        stages: of one method, in order.
        plan: of the data set.
        configuration: that the method was asked to run in.
        given: overrides by stage.

    Raises:
        UserError: a setting is wrong, or the plan has no schedule for a stage.
    """
    spared: set[str] = set()
    for stage in stages:
        implementation = stage.load()
        planned = plan.configuration(stage.runs_in(configuration))
        settings, _ = resolve_stage(implementation, planned, stage.name, given[stage.name])
        spared.update(implementation.spares(settings))
    return [stage for stage in stages if stage.name not in spared]


def stage_folder(folders: Folders, plan: Plan, stage: Stage, configuration: str) -> Path:
    """Return the results folder of a stage of a method that was asked to run in a configuration."""
    name = f"{stage.trainer}__{plan.name}__{stage.runs_in(configuration)}"
    return folders.results / plan.dataset_name / name / "fold_all"


def is_finished(folder: Path, plan: Plan, stage: Stage, configuration: str, options: RunOptions) -> bool:
    """Return whether a stage's folder holds its final checkpoint; arguments as ``stage_folder``.

    Raises:
        UserError: it does, of a run with another plan or other settings.
    """
    final = folder / FINAL
    if not final.exists():
        return False
    _, provenance = read_checkpoint(final)
    own = stage.runs_in(configuration)
    settings = resolve_stage(stage.load(), plan.configuration(own), stage.name, options.overrides)
    check_same_run(final, provenance, plan, own, stage.name, plain_settings(*settings), options.seed)
    return True


def check_batch(plan: Plan, stage: Stage, configuration: str, options: RunOptions, processes: int) -> None:
    """Check that the global batch can be shared out evenly.

    Raises:
        UserError: it cannot.
    """
    settings, _ = resolve_stage(stage.load(), plan.configuration(configuration), stage.name, options.overrides)
    batch = settings.training.batch_size
    unit = processes * stage.batch_multiple
    if batch % unit:
        nearest = max(unit, batch - batch % unit)
        each = "" if stage.batch_multiple == 1 else f", a multiple of {stage.batch_multiple} for each"
        raise UserError(
            f"batch_size {batch} of {stage.name} cannot be shared evenly by {processes} processes{each}; "
            f"--set batch_size={nearest}"
        )


def run_stage(path: Path, trainer_name: str, configuration: str, options: RunOptions, device: torch.device) -> None:
    """Run one stage in this process, going on from its last checkpoint if there is one.

    Args:
        path: of the plan.
        trainer_name: class in ``trainers.pretext``.
        configuration: of the plan.
        options: of the run.
        device: where to train.
    """
    trainer_class: type[PretrainTrainer] = getattr(pretext, trainer_name)
    plans: dict[str, Any] = read_json(path, "plan")
    plans["continue_training"] = True
    dataset_json = read_json(path.parent / "dataset.json", "description of the data set")
    trainer = trainer_class(plans, configuration, "all", dataset_json, device)
    trainer.options = options
    latest = Path(trainer.output_folder) / LATEST
    if latest.exists():
        trainer.load_checkpoint(str(latest))
    trainer.run_training()


def _spawn(
    processes: int, path: Path, trainer: str, configuration: str, options: RunOptions, device: torch.device
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        _run_rank, args=(processes, port, path, trainer, configuration, replace(options), device), nprocs=processes
    )


def _run_rank(
    rank: int,
    processes: int,
    port: int,
    path: Path,
    trainer: str,
    configuration: str,
    options: RunOptions,
    device: torch.device,
) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    run_in_group(rank, rank, processes, path, trainer, configuration, options, device)


def run_in_group(
    rank: int,
    local_rank: int,
    processes: int,
    path: Path,
    trainer: str,
    configuration: str,
    options: RunOptions,
    device: torch.device,
) -> None:
    """Join the process group (``MASTER_ADDR`` and ``MASTER_PORT`` are set) and run one stage as one of its processes."""
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=processes, timeout=LONGEST_WAIT)
    try:
        run_stage(path, trainer, configuration, options, device)
        # the first process has written what the next stage reads
        dist.barrier()
    finally:
        dist.destroy_process_group()
