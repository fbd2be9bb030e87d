"""What decides the voxels of a preprocessed case: the plan's part of it, the image files, and a digest of both.

Configurations of a plan that share a spacing share a folder of cases.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnssl.data.case_error import CaseError
from nnssl.data.case_store import SCHEMA_VERSION, SourceFile, read_properties
from nnssl.data.image_files import find_source_state
from nnssl.data.raw import RawCase
from nnssl.errors import UserError
from nnssl.plan import Plan

FOREGROUND_POINTS = 4000
"""Coordinates inside the body that are kept of a case."""

IGNORE_STATISTICS = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
"""Schemes of nnU-Net that do not read the intensities of the data set."""


@dataclass(frozen=True)
class Recipe:
    """What of a plan decides the voxels of a preprocessed case."""

    transpose_forward: tuple[int, int, int]
    spacing_mm: tuple[float, ...]
    """(z, y, x) after transposition; (y, x) where slices keep their distance."""
    normalization_schemes: tuple[str, ...]
    """Per channel, nnU-Net's class names."""
    use_mask_for_norm: tuple[bool, ...]
    """Per channel."""
    intensity_statistics: tuple[dict[str, float], ...]
    """Per channel, over the data set; empty for schemes that ignore them, so that new cases do not outdate old ones."""
    resampling: str
    """nnU-Net's function."""
    resampling_settings: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One folder of preprocessed cases."""

    folder: Path
    recipe: Recipe
    patch_size: tuple[int, ...]
    """What is usually read at once; it decides how voxels are laid out on disk, not what they are."""


def plan_targets(plan: Plan, folder: Path, configurations: Sequence[str] | None) -> tuple[Target, ...]:
    """Return the folders that configurations of a plan need.

    Args:
        plan: the plan.
        folder: of the preprocessed data set.
        configurations: names; None for all of the plan.

    Returns:
        One target for each distinct ``case_folder``, in the plan's order.

    Raises:
        UserError: the plan has no such configuration, asks for another preprocessor than nnU-Net's default, or has
            configurations that share a folder and do not agree on its voxels.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # slow to import

    manager = PlansManager(plan.nnunet)
    wanted = {plan.configuration(name).case_folder for name in configurations or plan.pretext.configurations}
    targets: dict[str, Target] = {}
    for name, section in plan.pretext.configurations.items():
        if section.case_folder not in wanted:
            continue
        manager_of_one = manager.get_configuration(name)
        if manager_of_one.preprocessor_name != "DefaultPreprocessor":
            raise UserError(
                f"plan {plan.name}, {name}: asks for {manager_of_one.preprocessor_name}; nnssl preprocesses as "
                "nnU-Net's DefaultPreprocessor does"
            )
        identifiers = {entry.get("data_identifier") for entry in plan.nnunet["configurations"].values()}
        if section.case_folder in identifiers or Path(section.case_folder).name != section.case_folder:
            raise UserError(
                f"plan {plan.name}, {name}: case_folder {section.case_folder!r} is a folder of nnU-Net or no plain "
                "name; choose another"
            )
        target = Target(folder / section.case_folder, _recipe_of(manager, manager_of_one), section.patch_size)
        targets[section.case_folder] = _join(targets.get(section.case_folder, target), target, plan.name)
    return tuple(targets.values())


def _recipe_of(manager: Any, configuration: Any) -> Recipe:
    """Return the recipe of one configuration of nnU-Net's plans."""
    statistics = manager.foreground_intensity_properties_per_channel
    return Recipe(
        transpose_forward=tuple(manager.transpose_forward),
        spacing_mm=tuple(float(mm) for mm in configuration.spacing),
        normalization_schemes=tuple(configuration.normalization_schemes),
        use_mask_for_norm=tuple(bool(use) for use in configuration.use_mask_for_norm),
        intensity_statistics=tuple(
            {} if scheme in IGNORE_STATISTICS else dict(statistics[str(channel)])
            for channel, scheme in enumerate(configuration.normalization_schemes)
        ),
        resampling=configuration.configuration["resampling_fn_data"],
        resampling_settings=dict(configuration.configuration["resampling_fn_data_kwargs"]),
    )


def _join(first: Target, second: Target, plan_name: str) -> Target:
    """Return the target that serves two configurations with one folder; a 3D one decides over a 2D one."""
    first, second = sorted((first, second), key=lambda target: len(target.patch_size), reverse=True)
    mine, other = asdict(first.recipe), asdict(second.recipe)
    # slices that keep their distance have that of the 3D configuration, or the planner would not share the folder
    mine["spacing_mm"] = mine["spacing_mm"][-len(other["spacing_mm"]) :]
    if mine != other:
        differing = ", ".join(key for key in mine if mine[key] != other[key])
        raise UserError(
            f"plan {plan_name}: configurations that share {first.folder.name} differ in {differing}; "
            "give them folders of their own (case_folder)"
        )
    return first


def find_sources(case: RawCase) -> tuple[SourceFile, ...]:
    """Return the image files of a case as they are now.

    Raises:
        CaseError: a file, or a slice of a series, is not there.
    """
    sources = []
    for image in case.images:
        try:
            state = find_source_state(image)
        except OSError as error:
            raise CaseError(str(image), f"cannot be found ({error.strerror})") from error
        sources.append(SourceFile(str(image), *state))
    return tuple(sources)


def digest_case(recipe: Recipe, reader: str, sources: Iterable[SourceFile]) -> str:
    """Return a digest of everything that decides the voxels of a case; the folder of its images does not."""
    files = [(Path(source.path).name, source.size_bytes, source.mtime_ns) for source in sources]
    decisive = [SCHEMA_VERSION, FOREGROUND_POINTS, asdict(recipe), reader, files]
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=16).hexdigest()


def find_outdated(case: RawCase, reader: str, targets: Sequence[Target]) -> tuple[Target, ...]:
    """Return the targets in which a case is missing, half-written or outdated."""
    try:
        sources = find_sources(case)
    except CaseError:
        return tuple(targets)
    return tuple(
        target for target in targets if not _is_current(case.name, digest_case(target.recipe, reader, sources), target)
    )


def _is_current(name: str, digest: str, target: Target) -> bool:
    try:
        return read_properties(target.folder, name).digest == digest
    except UserError:
        return False
