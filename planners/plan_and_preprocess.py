"""Fingerprint, plan and preprocessing of a raw data set in one call, without repeating finished work."""

from dataclasses import dataclass
from pathlib import Path

from nnssl.data.cluster import check_cluster
from nnssl.data.jobs import default_processes
from nnssl.data.preprocess import PreprocessReport, preprocess_dataset
from nnssl.data.raw import RawDataset, find_dataset, leave_out, read_dataset
from nnssl.errors import ArgumentError, UserError
from nnssl.files import write_atomically
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.methods import METHODS
from nnssl.paths import Folders, make_writable, use_folders
from nnssl.plan import Plan, plan_path
from planners.fingerprint import Fingerprint, read_or_extract
from planners.machine_speed import measure_speed
from planners.presets import choose_preset
from planners.pretrain_planner import plan_pretraining
from planners.reasons import format_decisions, reasons_page, summarise
from planners.settings import PlanSettings


@dataclass(frozen=True)
class PreparedDataset:
    """Result of planning and preprocessing a data set."""

    fingerprint: Fingerprint
    plan: Plan
    report: PreprocessReport | None
    """Report of the preprocessing; None if only the plan was requested."""

    def first_pretraining(self) -> tuple[str, str | None]:
        """Return the first method whose cases are preprocessed, and its configuration, or None for the method's default.

        Raises:
            UserError: If no method can use the preprocessed cases.
        """
        folders = {folder.name for folder in self.report.folders} if self.report else set()
        planned = self.plan.pretext.configurations
        for method in METHODS.values():
            usable = [name for name in method.configurations if name in planned]
            ready = [name for name in usable if planned[name].case_folder in folders]
            if ready:
                return method.name, None if ready[0] == usable[0] else ready[0]
        raise UserError(
            f"plan {self.plan.name} of {self.plan.dataset_name}: no method can use the preprocessed configurations; "
            "preprocess others"
        )


def plan_and_preprocess(
    dataset: str | int, settings: PlanSettings | None = None, folders: Folders | None = None
) -> PreparedDataset:
    """Measure unlabelled images, plan their pretraining, and preprocess them. Finished work is skipped.

    Args:
        dataset: Number or name of a raw data set in nnU-Net's format.
        settings: What to plan and preprocess; None for the defaults.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        The fingerprint, the plan and a report of the preprocessing.

    Raises:
        UserError: If the data set, a plan or a list does not fit, too many cases are unusable, or a file cannot be written.
        ArgumentError: If a setting has a wrong value.

    Examples:
        >>> settings = nnssl.PlanSettings(preset="cpu", configurations=["3d_fullres"], processes=1)
        >>> prepared = nnssl.plan_and_preprocess(501, settings)
        >>> prepared.plan.dataset_name
        'Dataset501_Scans'
    """
    with use_folders(folders) as used:
        return _plan_and_preprocess(dataset, settings or PlanSettings(), used)


def _plan_and_preprocess(dataset: str | int, settings: PlanSettings, folders: Folders) -> PreparedDataset:
    if settings.exclude_mask is not None and not settings.preprocess:
        raise ArgumentError(
            "exclude_mask must not be given without preprocessing, which applies it; leave one of them out",
            "exclude_mask",
            "no_preprocessing",
        )
    if settings.dask_address is not None:
        check_cluster(settings.dask_address)
    processes = default_processes() if settings.processes is None else settings.processes
    channels = settings.channel_names
    raw = read_dataset(dataset, folders, None if channels is None else tuple(channels))
    if settings.exclude is not None:
        raw = leave_out(raw, settings.exclude)
    with only_process(make_writable(folders.preprocessed / raw.name), "planning and preprocessing"):
        return _plan_and_preprocess_raw(raw, settings, folders, processes)


def _plan_and_preprocess_raw(
    raw: RawDataset, settings: PlanSettings, folders: Folders, processes: int
) -> PreparedDataset:
    preset = choose_preset(settings.preset)
    around = None if settings.like is None else _find_nnunet_plan(settings.like, settings.like_plans, folders)
    fingerprint = read_or_extract(raw, folders, processes, settings.dask_address)
    plan = plan_pretraining(
        raw,
        fingerprint,
        folders,
        preset,
        settings.plans_name,
        around,
        settings.spacing_mm,
        settings.dense_width,
        settings.length,
    )
    page = plan_path(folders, plan.dataset_name, plan.name).with_name(f"{plan.name}_reasons.md")
    write_atomically(page, lambda file: file.write(reasons_page(plan).encode()))
    axes = {len(each.patch_size) for each in plan.pretext.configurations.values()}
    speeds = {each: measure_speed(each) for each in axes}
    for line in summarise(plan, settings.configurations, settings.methods, speeds):
        logger.info(line)
    for line in format_decisions(plan) if settings.verbose else [f"reasons: {page} (set verbose to print them)"]:
        logger.info(line)
    report = None
    if settings.preprocess:
        report = preprocess_dataset(
            raw,
            plan,
            fingerprint.usable,
            folders,
            settings.configurations,
            processes,
            settings.dask_address,
            settings.restart,
            settings.exclude_mask,
        )
    prepared = PreparedDataset(fingerprint, plan, report)
    for line in format_unused(prepared):
        logger.info(line)
    return prepared


def format_unused(prepared: PreparedDataset) -> list[str]:
    """Return one line for every case that is not used, with the reason; an empty list if all cases are used."""
    fingerprint, report = prepared.fingerprint, prepared.report
    aside = [*fingerprint.set_aside, *(() if report is None else report.set_aside)]
    lines = [f"  {entry.case}: {entry.reason} ({entry.file})" for entry in aside]
    lines += [f"  {entry.case}: same voxels as {entry.same_as}" for entry in fingerprint.duplicates]
    return [f"{len(lines)} cases are not used:", *lines] if lines else []


def _find_nnunet_plan(like: str | int, plans_name: str, folders: Folders) -> Path:
    """Return the path of an nnU-Net plan.

    Raises:
        ArgumentError: If the data set has no such plan.
    """
    path = plan_path(folders, find_dataset(like, folders), plans_name)
    if not path.exists():
        raise ArgumentError(
            f"like must be a data set with an nnU-Net plan, got {like}: {path} does not exist; run "
            f"nnUNetv2_plan_and_preprocess -d {like} first",
            "like",
        )
    return path
