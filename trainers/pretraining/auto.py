"""Pretraining with a method that the data choose: short runs of all methods that the plan allows, then the best one in full.

Everything is an ordinary run, in a folder of its own. ``auto.json`` holds what is known so far and is written before and after
each of them, so that an interrupted comparison ends in the same choice.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nnssl.data.case_store import complete_cases
from nnssl.data.raw import find_dataset
from nnssl.devices import find_device
from nnssl.errors import ArgumentError, DivergedError, UserError
from nnssl.files import content_digest
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.methods import Method, find_method
from nnssl.paths import PROBES_FOLDER, Folders, make_writable, use_folders
from nnssl.plan import Plan, read_plan
from nnssl.version import __version__
from nnssl.weights.opened_checkpoint import open_checkpoint
from trainers.launch import number_of_processes
from trainers.pace import format_duration
from trainers.pretraining.auto_record import (
    AUTO_JSON,
    SCHEMA_VERSION,
    Asked,
    AutoRecord,
    Candidate,
    check_asked,
    decide,
    describe_choice,
    read_record,
    table_lines,
    write_record,
)
from trainers.pretraining.candidate_scores import CandidateMeasures
from trainers.pretraining.candidates import (
    StageLength,
    check_lengths,
    configuration_to_probe,
    find_candidates,
    share_of_run,
    shorten,
)
from trainers.pretraining.pretrain import find_plan, needed_runs, prepare_cases, prepare_probe_of, pretrain_method
from trainers.pretraining.progress import METRICS_CSV, read_metrics
from trainers.pretraining.settings import PretrainSettings
from trainers.pretraining.stage_run import StageRun

TRIAL_EPOCHS, TRIAL_ITERATIONS = 4, 4
"""Length of the run that times the steps of a stage. The fastest epoch counts, since other work on the machine only adds time."""
FAILURES = (DivergedError, torch.cuda.OutOfMemoryError)
"""Errors of a short run that exclude its method and do not end the comparison."""
FEW_STEPS = 100
"""Number of steps below which a short run is announced as too short to say much."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of candidates that is about to start or to continue.

    Attributes:
        plan: Plan of the data set.
        configuration: Configuration that all candidates pretrain.
        methods: The candidates.
        left_out: Reasons for which other methods are not candidates.
        asked: Arguments of the comparison.
        settings: The user's settings.
        folders: nnU-Net's folders.
        folder: Folder of the short runs and their record.
    """

    plan: Plan
    configuration: str
    methods: tuple[Method, ...]
    left_out: dict[str, str]
    asked: Asked
    settings: PretrainSettings
    folders: Folders
    folder: Path

    def runs(self, method: Method) -> list[StageRun]:
        """Return the stages of a candidate with their full lengths."""
        overrides = self.settings.all_overrides(method)
        return needed_runs(method, self.plan, self.configuration, None, overrides, self.settings.seed)

    def run_short(self, method: Method, lengths: Sequence[str], results: Path) -> Path:
        """Run all stages of a candidate with changed lengths, or the part that is not finished; return the last checkpoint."""
        settings = replace(
            self.settings,
            configuration=self.configuration,
            epochs=None,
            iterations_per_epoch=None,
            overrides=(*self.settings.overrides, *lengths),
            restart=False,
            probe=None,
            retrieval_every=0,
            track=(),
        )
        results.mkdir(parents=True, exist_ok=True)
        with use_folders(replace(self.folders, results=results)) as folders:
            return pretrain_method(method.name, self.plan.dataset_name, settings, folders)


def pretrain_auto(dataset: str | int | None, settings: PretrainSettings, folders: Folders) -> Path:
    """Choose a method by short runs, or keep the choice that was made, and pretrain with it.

    Args:
        dataset: Number or name of a planned data set; None for the one planned last.
        settings: How to pretrain, and how to choose.
        folders: nnU-Net's folders.

    Returns:
        The last checkpoint of the chosen method.

    Raises:
        UserError: As ``open_comparison`` and ``choose_method``.
    """
    plan = read_plan(find_plan(folders, dataset, settings.plans_name))
    prepare_cases(plan, [configuration_to_probe(plan, settings.configuration)], folders)
    comparison = open_comparison(plan.dataset_name, settings, folders)
    record = choose_method(comparison)
    assert record.choice is not None
    chosen = describe_choice(record, comparison.folder / AUTO_JSON)
    settings = replace(settings, configuration=comparison.configuration)
    return pretrain_method(record.choice, comparison.plan.dataset_name, settings, folders, chosen)


def open_comparison(
    dataset: str | int | None, settings: PretrainSettings, folders: Folders, folder: Path | None = None
) -> Comparison:
    """Find the candidates and check everything that can be checked before the first run; write nothing.

    Args:
        dataset: Number or name of a planned data set; None for the one planned last.
        settings: How to pretrain, and how to choose.
        folders: nnU-Net's folders.
        folder: Folder of the short runs; None for the one below the results of the data set.

    Raises:
        UserError: If the plan allows fewer than two candidates, a setting does not exist in one of them, or an argument makes
            no sense for a choice.
    """
    if settings.init is not None:
        raise ArgumentError(
            "init must not be given for the method auto, which compares with random weights; name a method", "init"
        )
    if settings.stages is not None:
        raise ArgumentError("stages must not be given for the method auto; name a method", "stages")
    if number_of_processes(1) > 1:
        raise UserError(
            "the method auto cannot be started by torchrun; use --num-gpus, or start the chosen method by torchrun"
        )
    if not settings.budget_minutes > 0:
        raise ArgumentError(f"budget_minutes must be above 0, got {settings.budget_minutes:g}", "budget_minutes")
    check_lengths(settings.epochs)
    path = find_plan(folders, dataset, settings.plans_name)
    plan = read_plan(path)
    configuration = configuration_to_probe(plan, settings.configuration)
    methods, left_out = find_candidates(plan, configuration, settings.candidates)
    probe = None if settings.probe is None else find_dataset(settings.probe, folders)
    asked = Asked(
        budget_minutes=float(settings.budget_minutes),
        candidates=tuple(method.name for method in methods),
        seed=settings.seed,
        overrides=tuple(each for each in settings.overrides if not _is_length(each)),
        probe=probe,
        probe_cases=None if probe is None else settings.probe_cases,
        plan=_digest(plan, configuration, folders),
    )
    folder = folder or folders.results / plan.dataset_name / PROBES_FOLDER / f"{plan.name}__{configuration}"
    comparison = Comparison(plan, configuration, methods, left_out, asked, settings, folders, folder)
    for method in methods:
        comparison.runs(method)  # reports an unknown setting before the first run
    return comparison


def stored_record(comparison: Comparison) -> AutoRecord | None:
    """Return the record of a comparison with the same arguments; None if there is none yet.

    Raises:
        UserError: If the record there was made with other arguments, or cannot be read.
    """
    path = comparison.folder / AUTO_JSON
    if not path.exists():
        return None
    record = read_record(path)
    check_asked(path, record.asked, comparison.asked)
    return record


def choose_method(comparison: Comparison) -> AutoRecord:
    """Run what is left of the short runs, measure what leaves them, print the table, and choose; keep a choice that was made.

    Raises:
        UserError: If no candidate is above random weights, if the record there was made with other arguments, or if a run fails.
    """
    path = make_writable(comparison.folder) / AUTO_JSON
    with only_process(comparison.folder, "choosing a method", wait=not comparison.settings.restart):
        if comparison.settings.restart and path.exists():
            logger.info(f"Deleting earlier short runs in {comparison.folder}")
            _clear(comparison.folder)
        record = stored_record(comparison)
        if record is not None and record.reason is not None:
            logger.info(f"Keeping the choice in {path}; use --restart to choose again")
        else:
            record = _compare(comparison, record or _begin(comparison))
    for line in table_lines(record):
        logger.info(line)
    if record.choice is None:
        raise UserError(
            f"The method auto chose nothing after {record.asked.budget_minutes:g} minutes: {record.reason}; use a larger "
            "--budget with --restart, or name a method"
        )
    logger.info(f"Chosen: {record.reason}")
    return record


def _begin(comparison: Comparison) -> AutoRecord:
    asked, plan = comparison.asked, comparison.plan
    record = AutoRecord(
        schema_version=SCHEMA_VERSION,
        nnssl_version=__version__,
        dataset_name=plan.dataset_name,
        plans_name=plan.name,
        configuration=comparison.configuration,
        asked=asked,
        left_out=comparison.left_out,
        candidates=tuple(Candidate(method) for method in asked.candidates),
    )
    write_record(comparison.folder, record)
    return record


def _compare(comparison: Comparison, record: AutoRecord) -> AutoRecord:
    """Do what is left of a comparison and write its record after every step."""
    count = len(record.candidates)
    share = 60 * record.asked.budget_minutes / count
    logger.info(
        f"Choosing among {count} methods for {record.configuration} of {record.dataset_name}: "
        f"{', '.join(record.asked.candidates)}; each is trained for about {format_duration(share)}"
    )
    for name, reason in record.left_out.items():
        logger.info(f"{name}: not a candidate, {reason}")
    for candidate in record.candidates:
        if candidate.stages is None and not candidate.is_finished:
            record = record.with_candidate(_time(comparison, candidate, share))
            write_record(comparison.folder, record)
    measures = _open_measures(comparison)
    record = replace(record, random_weights=measures.random_scores(), chance=measures.chance)
    for number, candidate in enumerate(record.candidates, start=1):
        if candidate.is_finished:
            continue
        assert candidate.stages is not None
        length = ", ".join(f"{each.steps} steps of {each.stage}" for each in candidate.stages)
        logger.info(f"Candidate {number} of {count}: {length}")
        record = record.with_candidate(_try(comparison, candidate, measures))
        write_record(comparison.folder, record)
    record = decide(record)
    write_record(comparison.folder, record)
    return record


def _open_measures(comparison: Comparison) -> CandidateMeasures:
    plan, configuration, settings = comparison.plan, comparison.configuration, comparison.settings
    probe = None
    if settings.probe is not None:
        probe = prepare_probe_of(settings, plan, configuration, comparison.folders)
    device = find_device(settings.device)
    return CandidateMeasures(plan, configuration, comparison.folders, settings.seed, device, probe)


def _time(comparison: Comparison, candidate: Candidate, share_s: float) -> Candidate:
    """Fix the lengths of a candidate's stages by the duration of their steps; the candidate has failed if a step does."""
    try:
        return replace(candidate, stages=_lengths(comparison, find_method(candidate.method), share_s))
    except FAILURES as error:
        shutil.rmtree(comparison.folder / "timing", ignore_errors=True)
        return _failed(candidate, error)


def _failed(candidate: Candidate, error: Exception) -> Candidate:
    reason = str(error).partition("\n")[0]
    logger.info(f"{candidate.method}: {reason}; it is not chosen")
    return replace(candidate, failure=reason)


def _lengths(comparison: Comparison, method: Method, share_s: float) -> tuple[StageLength, ...]:
    """Return the lengths of a candidate's stages, so that together they take its share of the budget."""
    seconds = time_steps(comparison, method)
    runs = comparison.runs(method)
    durations = [seconds[run.stage.name] for run in runs]
    share = share_of_run(share_s, runs, durations)
    lengths = tuple(shorten(run, share, each) for run, each in zip(runs, durations, strict=True))
    for each in lengths:
        logger.info(f"{each.stage}: {each.seconds_per_step:.3g} s per step, {each.steps} steps")
    if min(each.steps for each in lengths) < FEW_STEPS:
        logger.info(f"{method.name}: fewer than {FEW_STEPS} steps say little about a method; use a larger --budget")
    return lengths


def time_steps(comparison: Comparison, method: Method) -> dict[str, float]:
    """Return the measured seconds per step of each stage of a candidate, by a few steps of a run that is deleted afterwards."""
    results = comparison.folder / "timing" / method.name
    shutil.rmtree(results, ignore_errors=True)
    logger.info(f"{method.name}: timing a few steps ...")
    lengths = [f"epochs={TRIAL_EPOCHS}", f"iterations_per_epoch={TRIAL_ITERATIONS}"]
    comparison.run_short(method, lengths, results)
    found = {}
    for run in comparison.runs(method):
        epochs = read_metrics(run.folder(results) / METRICS_CSV)["epoch_seconds"]
        found[run.stage.name] = min(epochs) / TRIAL_ITERATIONS
    shutil.rmtree(results.parent)
    return found


def _try(comparison: Comparison, candidate: Candidate, measures: CandidateMeasures) -> Candidate:
    """Run a candidate, or the part of its run that is not finished, and measure the network that leaves it."""
    assert candidate.stages is not None
    method = find_method(candidate.method)
    results = comparison.folder / "candidates" / method.name
    lengths = [override for each in candidate.stages for override in each.overrides]
    try:
        final = comparison.run_short(method, lengths, results)
    except FAILURES as error:
        return _failed(candidate, error)
    tables = [read_metrics(run.folder(results) / METRICS_CSV) for run in comparison.runs(method)]
    minutes = sum(sum(table["epoch_seconds"]) for table in tables) / 60
    return replace(candidate, minutes=minutes, scores=measures.scores(open_checkpoint(final)))


def _clear(folder: Path) -> None:
    """Delete everything in a folder; the record goes first."""
    (folder / AUTO_JSON).unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_length(override: str) -> bool:
    """Return whether a setting is a length, which the short runs replace by their own."""
    return override.partition("=")[0].rpartition(".")[2] in ("epochs", "iterations_per_epoch")


def _digest(plan: Plan, configuration: str, folders: Folders) -> str:
    """Return a digest of what the short runs read: parts of the plan, and which cases were preprocessed from which images."""
    pretext = plan.nnunet["pretext"]["configurations"]
    folder = folders.preprocessed / plan.dataset_name / plan.configuration(configuration).case_folder
    cases = [(name, (folder / f"{name}.json").read_text()) for name in complete_cases(folder)]
    return content_digest([pretext[configuration], pretext.get("3d_fullres"), plan.nnunet["configurations"], cases])
