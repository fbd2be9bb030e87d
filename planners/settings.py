"""Settings of planning and preprocessing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.plan import PLANS_NAME

NNUNET_PLANS_NAME = "nnUNetPlans"
"""Default name of nnU-Net's own plans."""


@dataclass(frozen=True)
class PlanSettings:
    """Settings of ``plan_and_preprocess``.

    Attributes:
        configurations: Configurations of the plan to preprocess; None for all.
        plans_name: Name of the plan.
        preset: Memory target, a key of ``planners.presets.PRESETS``; None for the preset of the detected GPU.
        like: Data set (number or name) whose nnU-Net plan the pretraining is planned around; None to plan from the data.
        like_plans: Name of that nnU-Net plan.
        spacing_mm: Spacing (z, y, x) in place of the one chosen from the data.
        dense_width: Number of channels at full resolution in place of the preset's.
        length: Length of the pretext stages relative to the papers': ``short`` (a tenth), ``medium`` (a third) or ``full``;
            None for the preset's.
        channel_names: Names of the channels; None for those in ``dataset.json``.
        exclude: File that lists cases to leave out, one name per line.
        exclude_mask: Folder of masks, one for each case, in whose nonzero voxels nothing may be learned; None for none.
        processes: Worker processes for reading and preprocessing; None for one per core, at most 8.
        dask_address: Address of a Dask scheduler whose workers read and preprocess cases in place of local processes.
        methods: Methods whose stages are printed; None for all.
        preprocess: Whether to preprocess after planning.
        restart: Whether to repeat preprocessing that is already complete.
        verbose: Whether to print every decision with its reason.
    """

    configurations: Sequence[str] | None = None
    plans_name: str = PLANS_NAME
    preset: str | None = None
    like: str | int | None = None
    like_plans: str = NNUNET_PLANS_NAME
    spacing_mm: Sequence[float] | None = None
    dense_width: int | None = None
    length: str | None = None
    channel_names: Sequence[str] | None = None
    exclude: Path | None = None
    exclude_mask: Path | None = None
    processes: int | None = None
    dask_address: str | None = None
    methods: Sequence[str] | None = None
    preprocess: bool = True
    restart: bool = False
    verbose: bool = False
