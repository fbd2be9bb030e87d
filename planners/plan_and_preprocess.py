"""From raw images to preprocessed cases in one call: fingerprint, plan, preprocessing; what is done is recognised."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.data.jobs import default_processes
from nnssl.data.preprocess import PreprocessReport, preprocess_dataset
from nnssl.data.raw import find_dataset, leave_out, read_dataset
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.methods import METHODS
from nnssl.paths import Folders
from nnssl.plan import PLANS_NAME, Plan, plan_path
from planners.fingerprint import Fingerprint, read_or_extract
from planners.presets import choose_preset
from planners.pretrain_planner import plan_pretraining
from planners.reasons import format_decisions

NNUNET_PLANS_NAME = "nnUNetPlans"
"""What nnU-Net calls a plan unless it is asked to call it otherwise."""


@dataclass(frozen=True)
class PreparedDataset:
    """A data set that was planned."""

    fingerprint: Fingerprint
    plan: Plan
    report: PreprocessReport | None
    """None where nothing was to be preprocessed."""

    def first_pretraining(self) -> tuple[str, str | None]:
        """Return the first method of the index that finds its cases, and the configuration to name if it is not the usual one.

        Raises:
            UserError: nothing was preprocessed that a method can use.
        """
        folders = {folder.name for folder in self.report.folders} if self.report else set()
        planned = self.plan.pretext.configurations
        for method in METHODS.values():
            usable = [name for name in method.configurations if name in planned]
            ready = [name for name in usable if planned[name].case_folder in folders]
            if ready:
                return method.name, None if ready[0] == usable[0] else ready[0]
        raise UserError(f"plan {self.plan.name} of {self.plan.dataset_name}: no method can use what was preprocessed")


def plan_and_preprocess(
    dataset: str | int,
    folders: Folders,
    *,
    configurations: Sequence[str] | None = None,
    plans_name: str = PLANS_NAME,
    preset: str | None = None,
    like: str | int | None = None,
    like_plans: str = NNUNET_PLANS_NAME,
    spacing_mm: Sequence[float] | None = None,
    dense_width: int | None = None,
    channel_names: Sequence[str] | None = None,
    exclude: Path | None = None,
    processes: int | None = None,
    dask_address: str | None = None,
    preprocess: bool = True,
    restart: bool = False,
) -> PreparedDataset:
    """Look at unlabelled images, plan their pretraining, and preprocess them.

    Args:
        dataset: number or name of a raw data set.
        folders: nnU-Net's folders.
        configurations: of the plan, to preprocess; None for all.
        plans_name: identifier of the plan.
        preset: memory target, a key of ``planners.presets.PRESETS``; None for that of the GPU.
        like: data set, number or name, whose nnU-Net plan is planned around; None to plan from the data.
        like_plans: identifier of that plan.
        spacing_mm: z, y, x as stored, in place of the one from the data.
        dense_width: channels at full resolution, in place of the preset's.
        channel_names: what the channels are; None for what ``dataset.json`` says.
        exclude: list of cases to leave out.
        processes: processes of this machine; None for one for each core, at most 8.
        dask_address: of a Dask scheduler to preprocess on instead.
        preprocess: False to plan only.
        restart: preprocess again what is there already.

    Returns:
        Fingerprint, plan and what preprocessing did.

    Raises:
        UserError: data set, plan, list or numbers do not fit; too many cases cannot be used; a file cannot be written.
    """
    processes = default_processes() if processes is None else processes
    raw = read_dataset(dataset, folders, None if channel_names is None else tuple(channel_names))
    if exclude is not None:
        raw = leave_out(raw, exclude)
    preset = choose_preset(preset)
    around = None if like is None else _find_nnunet_plan(like, like_plans, folders)
    fingerprint = read_or_extract(raw, folders, processes)
    plan = plan_pretraining(raw, fingerprint, folders, preset, plans_name, around, spacing_mm, dense_width)
    for line in format_decisions(plan):
        logger.info(line)
    report = None
    if preprocess:
        report = preprocess_dataset(
            raw, plan, fingerprint.usable, folders, configurations, processes, dask_address, restart
        )
    prepared = PreparedDataset(fingerprint, plan, report)
    for line in format_unused(prepared):
        logger.info(line)
    return prepared


def format_unused(prepared: PreparedDataset) -> list[str]:
    """Return a line for every case that is not used and why; empty when all are used."""
    fingerprint, report = prepared.fingerprint, prepared.report
    aside = [*fingerprint.set_aside, *(() if report is None else report.set_aside)]
    lines = [f"  {entry.case}: {entry.reason} ({entry.file})" for entry in aside]
    lines += [f"  {entry.case}: same voxels as {entry.same_as}" for entry in fingerprint.duplicates]
    return [f"{len(lines)} cases are not used:", *lines] if lines else []


def _find_nnunet_plan(like: str | int, plans_name: str, folders: Folders) -> Path:
    """Return the plans file of nnU-Net of a data set."""
    path = plan_path(folders, find_dataset(like, folders), plans_name)
    if not path.exists():
        raise UserError(f"--like {like}: {path} is missing; run nnUNetv2_plan_and_preprocess -d {like} first")
    return path
