"""The planner of pretraining: turns fingerprint and memory target into a plan.

nnU-Net's own planner chooses spacing, axis order, normalisation, patch, network and the batch size of fine-tuning. It is
subclassed only to replace its inputs (no labels, no ``dataset.json`` in the raw folder), so its rules are unchanged.
``planners.pretext_rules`` decides what pretraining needs in addition.
"""

import contextlib
import io
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncXL,
)
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnssl.data.dicom_series import stock_reader
from nnssl.data.raw import RawDataset
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json, write_json
from nnssl.log import logger
from nnssl.networks.backbone import weightless
from nnssl.paths import Folders
from nnssl.plan import PLANS_NAME, SCHEMA_VERSION, Plan, Pretext, plan_path, write_plan
from nnssl.sizes import in_mm
from nnssl.version import __version__
from planners.dense_rules import widen_last_stage
from planners.fingerprint import Fingerprint, check_set_aside, nnunet_fingerprint
from planners.presets import LENGTHS, Preset, find_preset
from planners.pretext_rules import PretextRules

COARSENING = 2 ** (1 / 2)
"""Factor by which the finest spacing grows until steps are computed in time."""
MOST_COARSENINGS = 2
"""Number of times that the spacing is made coarser, to twice the finest one at most."""
CONVOLUTIONAL = ("2d", "3d_fullres")
"""Configurations of nnU-Net that pretraining plans; each gets a hybrid configuration."""


class _WithoutLabels:
    """Differences from nnU-Net's planners: the source of the inputs and the names of the outputs."""

    reader_name: str
    plans_identifier: str

    def determine_reader_writer(self) -> Any:
        return recursive_find_reader_writer_by_name(self.reader_name)

    def generate_data_identifier(self, configuration_name: str) -> str:
        # nnU-Net's residual planners use the folder of nnUNetPlans, which would be wrong for another spacing
        return f"{self.plans_identifier}_{configuration_name}"


class PretrainPlanner(_WithoutLabels, ExperimentPlanner):
    """Planner of a plain U-Net."""


class PretrainPlannerResidualL(_WithoutLabels, nnUNetPlannerResEncL):
    """Planner of nnU-Net's residual encoder L."""


class PretrainPlannerResidualXL(_WithoutLabels, nnUNetPlannerResEncXL):
    """Planner of nnU-Net's residual encoder XL."""


PLANNERS: dict[str, type[ExperimentPlanner]] = {
    "plain": PretrainPlanner,
    "residual L": PretrainPlannerResidualL,
    "residual XL": PretrainPlannerResidualXL,
}


def plan_pretraining(
    dataset: RawDataset,
    fingerprint: Fingerprint,
    folders: Folders,
    preset_name: str,
    plans_name: str = PLANS_NAME,
    like: Path | None = None,
    spacing_mm: Sequence[float] | None = None,
    dense_width: int | None = None,
    length: str | None = None,
) -> Plan:
    """Plan the pretraining of a data set and write the plan.

    The same fingerprint and arguments give the same plan, byte for byte.

    Args:
        dataset: Raw data set; the content of its ``dataset.json`` is written next to the plan for nnU-Net.
        fingerprint: Measurements of the usable cases.
        folders: nnU-Net's folders; the plan is written to ``<preprocessed>/<data set>/<plans_name>.json``.
        preset_name: Memory target, a key of ``planners.presets.PRESETS``.
        plans_name: Name of the plan.
        like: nnU-Net plans file whose spacing, patch and networks are used; None to plan from the data.
        spacing_mm: Spacing in mm, (z, y, x) as stored, in place of the one chosen from the data; 2D uses the in-plane part.
        dense_width: Number of channels at full resolution in place of the preset's.
        length: Length of the pretext stages, a key of ``planners.presets.LENGTHS``; None for the preset's.

    Returns:
        The plan as read back from its file.

    Raises:
        UserError: If the plan ``like`` does not fit the data set, too many cases are unusable, or a file cannot be written.
        ArgumentError: If ``like`` is combined with ``spacing_mm`` or ``dense_width``, the spacing or the preset is invalid, or
            the width does not fit into memory.
    """
    preset = find_preset(preset_name)
    if like is not None and (spacing_mm is not None or dense_width is not None):
        raise ArgumentError(
            f"spacing_mm and dense_width cannot be combined with like, because the plan {like} determines both",
            "spacing_mm",
            "dense_width",
            "like",
        )
    if spacing_mm is not None and not (len(spacing_mm) == 3 and all(0 < mm < math.inf for mm in spacing_mm)):
        given = " ".join(f"{mm:g}" for mm in spacing_mm)
        raise ArgumentError(f"spacing_mm must be three lengths above 0, got {given}", "spacing_mm")
    check_set_aside(fingerprint)
    names = {str(i): name for i, name in enumerate(fingerprint.channel_names)}
    dataset_json = {**dataset.dataset_json, "channel_names": names}
    if length is not None and length not in LENGTHS:
        raise ArgumentError(f"length must be one of {', '.join(LENGTHS)}, got {length}", "length")
    request = _Request(
        dataset, dataset_json, fingerprint, preset, plans_name, like, dense_width, length or preset.length
    )
    chosen = {} if spacing_mm is None else dict.fromkeys(CONVOLUTIONAL, spacing_mm)
    rules = request.apply(chosen, dict.fromkeys(chosen, "set by the user"))
    if spacing_mm is None and like is None:
        rules = request.coarsen(rules)
    nnunet = rules.nnunet
    pretext = Pretext(
        schema_version=SCHEMA_VERSION,
        nnssl_version=__version__,
        preset=preset_name,
        memory_target_gb=preset.memory_gb,
        like=None if like is None else f"{like.parent.name}/{like.name}",
        modalities=rules.modalities,
        num_cases=len(fingerprint.cases),
        configurations=rules.configurations,
        decisions=tuple(rules.decisions),
    )
    folder = folders.preprocessed / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (dataset.folder / "labelsTr").exists() or not (folder / "dataset_fingerprint.json").exists():
        write_json(folder / "dataset_fingerprint.json", _plain(nnunet_fingerprint(fingerprint)))
    write_json(folder / "dataset.json", _plain(dataset_json))
    path = plan_path(folders, dataset.name, plans_name)
    plan = write_plan(path, _plain(nnunet), pretext)
    logger.info(f"plan: {path}")
    return plan


@dataclass(frozen=True)
class _Request:
    """What a plan is made from, without the spacing."""

    dataset: RawDataset
    dataset_json: dict[str, Any]
    fingerprint: Fingerprint
    preset: Preset
    plans_name: str
    like: Path | None
    dense_width: int | None
    length: str
    _plans: dict[tuple[float, ...] | None, tuple[dict[str, Any], dict[str, float]]] = field(default_factory=dict)

    def apply(self, spacings_mm: dict[str, Sequence[float]], reasons: dict[str, str]) -> PretextRules:
        """Return the rules after all decisions.

        Args:
            spacings_mm: Spacing (z, y, x) as stored, by configuration; nnU-Net chooses the others from the data.
            reasons: Reason for each of these spacings.
        """
        budgets: dict[str, float] = {}
        if self.like is not None:
            nnunet = _plan_like(self.like, self.dataset, self.fingerprint, self.plans_name)
        else:
            nnunet, budgets = self._plan(None)
            for name, spacing in spacings_mm.items():
                if name in nnunet["configurations"]:
                    other = self._plan(tuple(float(mm) for mm in spacing))[0]["configurations"]
                    nnunet["configurations"][name] = other.get(name, nnunet["configurations"][name])
            if self.dense_width is not None:
                widen_last_stage(nnunet, self.dense_width, len(self.dataset_json["channel_names"]), budgets)
        rules = PretextRules(self.fingerprint, self.preset, nnunet, budgets, self.like, reasons, self.length)
        rules.decide()
        return rules

    def _plan(self, spacing_mm: tuple[float, ...] | None) -> tuple[dict[str, Any], dict[str, float]]:
        """Return nnU-Net's plan for a spacing and the budget of each configuration."""
        if spacing_mm not in self._plans:
            plans, planner = _plan_from_data(
                self.dataset, self.dataset_json, self.fingerprint, self.preset, self.plans_name, spacing_mm
            )
            budgets = {name: _budget(planner, len(each["spacing"])) for name, each in plans["configurations"].items()}
            self._plans[spacing_mm] = plans, budgets
        return deepcopy(self._plans[spacing_mm])

    def coarsen(self, rules: PretextRules) -> PretextRules:
        """Return rules for coarser configurations, until the least step of every stage is computed in time."""
        spacings: dict[str, Sequence[float]] = {}
        reasons: dict[str, str] = {}
        for step in range(1, MOST_COARSENINGS + 1):
            if not rules.slow:
                break
            for name in rules.slow:
                spacing = _stored_spacing(self._plan(None)[0], name)
                finest = float(f"{min(spacing) * COARSENING**step:.3g}")
                spacings[name] = [max(mm, finest) for mm in spacing]
                measured = spacing[1:] if rules.single_slices else spacing
                reasons[name] = (
                    f"coarser than the {in_mm(measured)} mm of the data, because the least useful steps would take more than "
                    "about two seconds on two CPU cores"
                )
            rules = self.apply(spacings, reasons)
        return rules


def _stored_spacing(nnunet: dict[str, Any], name: str) -> list[float]:
    """Return the spacing of a configuration, (z, y, x) as stored; that of 2D is completed by the distance of the slices."""
    spacing = nnunet["configurations"][name]["spacing"]
    if len(spacing) == 2:
        spacing = [nnunet["original_median_spacing_after_transp"][0], *spacing]
    return [float(spacing[axis]) for axis in nnunet["transpose_backward"]]


def _plan_from_data(
    dataset: RawDataset,
    dataset_json: dict[str, Any],
    fingerprint: Fingerprint,
    preset: Preset,
    plans_name: str,
    spacing_mm: Sequence[float] | None,
) -> tuple[dict[str, Any], ExperimentPlanner]:
    planner_class = PLANNERS[preset.encoder]
    quiet = contextlib.redirect_stdout(io.StringIO())
    with _staged(dataset, dataset_json, fingerprint), quiet:
        with _without_warnings():
            planner = planner_class(
                dataset.name,
                gpu_memory_target_in_gb=preset.memory_gb,
                plans_name=plans_name,
                overwrite_target_spacing=None if spacing_mm is None else [float(mm) for mm in spacing_mm],
            )
        planner.reader_name = stock_reader(dataset.reader)
        planner.UNet_base_num_features = preset.base_features
        planner.UNet_max_features_2d, planner.UNet_max_features_3d = preset.max_features
        with weightless():  # it builds networks only to read their sizes
            plans = planner.plan_experiment()
    for name in ("3d_lowres", "3d_cascade_fullres"):
        plans["configurations"].pop(name, None)
    # nnU-Net searches its own planners for this name
    plans["experiment_planner_used"] = planner_class.__mro__[2].__name__
    return _plain(plans), planner


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # nnU-Net warns about memory targets other than those of its residual presets, which are intended here
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _staged(dataset: RawDataset, dataset_json: dict[str, Any], fingerprint: Fingerprint) -> Iterator[None]:
    """Present a data set to nnU-Net's planner in a temporary folder with ``dataset.json`` and fingerprint.

    The user's folders stay unchanged: the raw folder may be read-only or lack a ``dataset.json``, and nnU-Net's own fingerprint
    of a labelled data set must not be overwritten.
    """
    paths = {case.name: [str(image) for image in case.images] for case in dataset.cases}
    listed = {case.name: {"images": paths[case.name], "label": ""} for case in fingerprint.cases}
    with tempfile.TemporaryDirectory(prefix="nnssl_plan_") as folder:
        stage = Path(folder) / "raw" / dataset.name
        stage.mkdir(parents=True)
        out = Path(folder) / "preprocessed" / dataset.name
        out.mkdir(parents=True)
        write_json(stage / "dataset.json", _plain({**dataset_json, "dataset": listed, "numTraining": len(listed)}))
        write_json(out / "dataset_fingerprint.json", _plain(nnunet_fingerprint(fingerprint)))
        with variables(nnUNet_raw=str(stage.parent), nnUNet_preprocessed=str(out.parent)):
            yield


def _budget(planner: ExperimentPlanner, dimensions: int) -> float:
    """Return the number of feature values that fit into the memory target, by nnU-Net's rule for the batch size."""
    reference = planner.UNet_reference_val_2d if dimensions == 2 else planner.UNet_reference_val_3d
    batch = planner.UNet_reference_val_corresp_bs_2d if dimensions == 2 else planner.UNet_reference_val_corresp_bs_3d
    return reference * batch * planner.UNet_vram_target_GB / planner.UNet_reference_val_corresp_GB


def _plan_like(like: Path, dataset: RawDataset, fingerprint: Fingerprint, plans_name: str) -> dict[str, Any]:
    """Return a plan of this data set with spacing, patch, normalisation and networks of an existing nnU-Net plan."""
    source = read_json(like, "nnU-Net plan")
    if not isinstance(source, dict) or "configurations" not in source:
        raise UserError(
            f"{like}: is not a plans file of nnU-Net; run nnUNetv2_plan_and_preprocess for that data set first"
        )
    plans = deepcopy(source)
    plans.pop("pretext", None)
    kept = {name: plans["configurations"][name] for name in CONVOLUTIONAL if name in plans["configurations"]}
    if not kept:
        raise UserError(f"{like}: has no configuration {' or '.join(CONVOLUTIONAL)}; choose another nnU-Net plan")
    for name, configuration in kept.items():
        channels = len(configuration["normalization_schemes"])
        if channels != len(fingerprint.channel_names):
            raise UserError(
                f"{like}: expects {channels} channel(s), but {dataset.name} has {len(fingerprint.channel_names)}; "
                "pretrain on images with the same channels"
            )
        configuration["data_identifier"] = f"{plans_name}_{name}"
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])[:, plans["transpose_forward"]]
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases])[:, plans["transpose_forward"]]
    plans.update(
        dataset_name=dataset.name,
        plans_name=plans_name,
        configurations=kept,
        image_reader_writer=stock_reader(dataset.reader),
        original_median_spacing_after_transp=[float(value) for value in np.median(spacings, axis=0)],
        original_median_shape_after_transp=[round(float(value)) for value in np.median(shapes, axis=0)],
    )
    return plans


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    content = deepcopy(content)
    recursive_fix_for_json_export(content)
    return content
