"""Runs the stages of a pretext method in order and resumes where an earlier run stopped."""

import shutil
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nnssl.checkpoint import FINAL
from nnssl.data.changed_cases import preprocess_changed_cases
from nnssl.data.jobs import default_processes
from nnssl.data.raw import find_dataset
from nnssl.devices import find_device
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.methods import AUTO, Method, find_method
from nnssl.methods.settings import split_overrides
from nnssl.networks.pieces import check_pieces
from nnssl.paths import Folders, use_folders
from nnssl.plan import Plan, existing_plan, read_plan
from nnssl.weights.download import is_address, local_weights
from nnssl.weights.opened_checkpoint import open_checkpoint
from trainers.launch import is_first_process, launch, number_of_processes
from trainers.pretraining.probe_run import ProbeOptions, prepare_probe
from trainers.pretraining.settings import PretrainSettings
from trainers.pretraining.stage_job import StageJob, run_stage
from trainers.pretraining.stage_run import RunOptions, StageRun, check_same_run, resolve_run
from trainers.tracking import check_trackers


def pretrain(
    method_name: str,
    dataset: str | int | None = None,
    settings: PretrainSettings | None = None,
    folders: Folders | None = None,
) -> Path:
    """Pretrain a planned data set with a method, all its stages in order.

    A finished stage with the same plan and settings is recognised and skipped; an unfinished one continues from its last
    checkpoint. Results are written to ``<results>/<data set>/<Trainer>__<plans>__<configuration>/fold_all``, one folder per
    stage.

    Args:
        method_name: A key of ``nnssl.methods.METHODS``; or ``"auto"`` to choose one by short runs of those that the plan allows.
        dataset: Number or name of a planned data set; None for the one planned last.
        settings: How to pretrain; None for the defaults.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        The last stage's ``checkpoint_final.pth``.

    Raises:
        UserError: If the method, data set, plan, configuration or a setting is unknown or does not fit, or if a checkpoint
            belongs to another run.

    Examples:
        >>> settings = nnssl.PretrainSettings(
        ...     configuration="3d_fullres", epochs=1, iterations_per_epoch=2, overrides=["batch_size=2"], workers=0
        ... )
        >>> weights = nnssl.pretrain("pix2rep", 501, settings)
        >>> weights.name
        'checkpoint_final.pth'
    """
    settings = settings or PretrainSettings()
    with use_folders(folders) as used:
        if method_name == AUTO:
            from trainers.pretraining.auto import pretrain_auto  # runs several methods by the function below

            return pretrain_auto(dataset, settings, used)
        return pretrain_method(method_name, dataset, settings, used)


def pretrain_method(
    method_name: str,
    dataset: str | int | None,
    settings: PretrainSettings,
    folders: Folders,
    chosen: dict[str, Any] | None = None,
) -> Path:
    """Run the stages of one method, or the part of them that is not finished, as ``pretrain`` does.

    Args:
        method_name: A key of ``nnssl.methods.METHODS``.
        dataset: Number or name of a planned data set; None for the one planned last.
        settings: How to pretrain.
        folders: nnU-Net's folders, which its code uses, too.
        chosen: How the method was chosen, for the record of the run; None if the user named it.

    Raises:
        UserError: As ``pretrain``.
    """
    method = find_method(method_name)
    overrides = settings.all_overrides(method)
    check_trackers(settings.track)
    path = find_plan(folders, dataset, settings.plans_name)
    plan = read_plan(path)
    configuration = choose_configuration(method, plan, settings.configuration)
    device = find_device(settings.device)
    runs = needed_runs(method, plan, configuration, settings.stages, overrides, settings.seed)
    for stage in method.stages:
        asked = settings.stages is None or stage.name in settings.stages
        if asked and stage not in [run.stage for run in runs]:
            logger.info(f"{stage.name}: skipped, these settings do not need it")
    init = None if settings.init is None else _open_init(settings.init, folders)
    prepare_cases(plan, {run.configuration for run in runs}, folders)
    if settings.restart and is_first_process():
        _remove([run.folder(folders.results) for run in runs])
    probed = None if settings.probe is None else prepare_probe_of(settings, plan, configuration, folders)
    # A stage that only prepares another one does not hand on its weights.
    begun = next((run for run in reversed(runs) if run.stage.fresh), runs[0])
    for run in runs:
        options = RunOptions(
            run.overrides,
            init if run is begun else None,
            settings.seed,
            settings.workers,
            alone=run is runs[0] and run.stage != method.stages[0],
            probe=probed if run.configuration == configuration else None,
            retrieval_every=settings.retrieval_every,
            track=tuple(settings.track),
            chosen=chosen,
        )
        with _only_run(run.folder(folders.results)):
            _run(run, StageJob(path, run.stage.trainer, run.configuration, options, device), settings.num_gpus, folders)
    return runs[-1].folder(folders.results) / FINAL


def _open_init(init: Path | str, folders: Folders) -> Path:
    """Return the path of the weights that a pretraining starts from, once they are here and can be read.

    Raises:
        UserError: If they cannot be downloaded or read.
    """
    path = local_weights(init, folders) if is_address(init) else Path(init)
    open_checkpoint(path).check_tensors()
    return path


def _run(run: StageRun, job: StageJob, num_gpus: int, folders: Folders) -> None:
    """Run a stage, or the part of it that is not finished."""
    folder = run.folder(folders.results)
    if is_finished(folders, run):
        logger.info(f"{run.stage.name}: already finished, {folder / FINAL}")
        return
    logger.info(f"{run.stage.name}: {folder}")
    count = number_of_processes(num_gpus)
    if count > 1:
        check_batch(run, count)
    launch(run_stage, job, count)


def _remove(results: Sequence[Path]) -> None:
    for folder in results:
        if folder.exists():
            with only_process(folder, "deleting earlier results", wait=False):
                logger.info(f"Deleting earlier results in {folder}")
                shutil.rmtree(folder)


def _only_run(folder: Path) -> AbstractContextManager[None]:
    """Return a context in which no other run writes to the results folder of a stage.

    A run that torchrun started does not wait for another one, because its other processes do not see that it waits.
    """
    if not is_first_process():
        return nullcontext()
    folder.parent.mkdir(parents=True, exist_ok=True)
    return only_process(folder, "pretraining", wait=number_of_processes(1) == 1)


def prepare_probe_of(settings: PretrainSettings, plan: Plan, configuration: str, folders: Folders) -> ProbeOptions:
    """Choose and preprocess the labelled cases of the probe that the settings name.

    Raises:
        UserError: As ``prepare_probe``, or if the network has no feature maps.
    """
    assert settings.probe is not None
    if not plan.configuration(configuration).has_feature_maps:
        raise ArgumentError(
            f"probe needs the feature maps of a U-Net, which {configuration} does not have; omit probe or choose another "
            "configuration",
            "probe",
            "configuration",
        )
    dataset_name = find_dataset(settings.probe, folders)
    cases, every = settings.probe_cases, settings.probe_every
    return prepare_probe(dataset_name, plan, configuration, folders, cases, every, default_processes())


def find_plan(folders: Folders, dataset: str | int | None, plans_name: str) -> Path:
    """Return the plans file of a data set (number or name), or of the data set that was planned last.

    Raises:
        UserError: If there is no such plan.
    """
    if dataset is not None:
        return existing_plan(folders, find_dataset(dataset, folders), plans_name)
    plans = [
        path
        for path in folders.preprocessed.glob(f"Dataset*/{plans_name}.json")
        if "pretext" in read_json(path, "plan")
    ]
    if not plans:
        raise UserError(f"{folders.preprocessed}: contains no planned data set; run nnssl_plan_and_preprocess -d ID")
    newest = max(plans, key=lambda path: path.stat().st_mtime)
    logger.info(f"Using the data set that was planned last: {newest.parent.name}")
    return newest


def choose_configuration(method: Method, plan: Plan, wanted: str | None) -> str:
    """Return the configuration to pretrain: the wanted one, or else the first one with the method's backbone.

    Raises:
        UserError: If the plan has no configuration with the method's backbone, or if the wanted one has another.
    """
    usable = [name for name in method.configurations if name in plan.pretext.configurations]
    if wanted is not None:
        plan.configuration(wanted)
    if not usable:
        known = ", ".join(sorted(plan.pretext.configurations))
        raise UserError(
            f"{method.name} needs {method.backbone}, but plan {plan.name} of {plan.dataset_name} has only {known}; "
            "nnssl_info prints the reasons of a plan"
        )
    if wanted is not None and wanted not in usable:
        raise ArgumentError(
            f"{method.name} needs {method.backbone}; configuration must be {' or '.join(usable)}, got {wanted}",
            "configuration",
        )
    return wanted or usable[0]


def needed_runs(
    method: Method,
    plan: Plan,
    configuration: str,
    stages: Sequence[str] | None,
    overrides: Sequence[str],
    seed: int,
) -> list[StageRun]:
    """Return the runs of a method's stages, without stages that the settings of later ones do not need.

    Args:
        method: Method whose stages are run.
        plan: Plan of the data set.
        configuration: Configuration that the method is run in.
        stages: Names of the stages to run; None for all.
        overrides: Settings as ``key=value``, or ``stage.key=value`` for one stage only.
        seed: Random seed of the runs.

    Raises:
        UserError: If a setting is wrong, or if the plan has no schedule for a stage.
    """
    given = split_overrides(overrides, {stage.name: stage.load() for stage in method.stages})
    wanted = [stage for stage in method.stages if stages is None or stage.name in stages]
    runs = [resolve_run(plan, stage, configuration, given[stage.name], seed) for stage in wanted]
    spared = {name for run in runs for name in run.stage.load().spares(run.settings)}
    return [run for run in runs if run.stage.name not in spared]


def prepare_cases(plan: Plan, configurations: Collection[str], folders: Folders) -> list[str]:
    """Preprocess cases again whose images or masks were replaced, and return their names."""
    return preprocess_changed_cases(plan, configurations, folders, default_processes())


def is_finished(folders: Folders, run: StageRun) -> bool:
    """Return whether nnU-Net's results folder contains the final checkpoint of a run.

    Raises:
        UserError: If the checkpoint there was made with another plan, with other settings, or from images or masks that were
            replaced since.
    """
    final = run.folder(folders.results) / FINAL
    if not final.exists():
        return False
    check_same_run(final, open_checkpoint(final).own_provenance, run, run.cases_folder(folders))
    return True


def check_batch(run: StageRun, processes: int) -> None:
    """Check that the global batch can be divided evenly among processes, and the part of a process into pieces.

    Raises:
        UserError: If it cannot.
    """
    batch = run.settings.training.batch_size
    unit = processes * run.stage.batch_multiple
    if batch % unit:
        nearest = max(unit, batch - batch % unit)
        each = "" if run.stage.batch_multiple == 1 else f", with a multiple of {run.stage.batch_multiple} in each"
        raise UserError(
            f"batch_size of {run.stage.name} must be a multiple of {unit} for {processes} processes{each}, got {batch}; set "
            f"batch_size={nearest}"
        )
    check_pieces(run.settings.training.pieces, batch // processes)
