"""Everything that determines a preprocessed case: settings of the plan, image files, the user's mask, and their digest.

Configurations of a plan that share a spacing share a folder of cases.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnssl.data.case_error import CaseError
from nnssl.data.case_store import SCHEMA_VERSION, CaseProperties, SourceFile, read_properties
from nnssl.data.image_files import find_source_state
from nnssl.data.learnable import LEARNABLE_VERSION
from nnssl.data.raw import RawCase
from nnssl.errors import UserError
from nnssl.plan import Plan

FOREGROUND_POINTS = 4000
"""Number of coordinates inside the body that are stored for a case."""

IGNORE_STATISTICS = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
"""nnU-Net's schemes that do not use intensity statistics of the data set."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a plan that determine the voxels of a preprocessed case."""

    transpose_forward: tuple[int, int, int]
    spacing_mm: tuple[float, ...]
    """Target spacing (z, y, x) in mm after transposition, or (y, x) if the slice distance is kept."""
    normalization_schemes: tuple[str, ...]
    """nnU-Net's class name for each channel."""
    use_mask_for_norm: tuple[bool, ...]
    """Whether each channel is normalised inside the nonzero mask."""
    intensity_statistics: tuple[dict[str, float], ...]
    """Statistics of each channel over the data set; empty for schemes that ignore them, so that new cases do not make existing
    ones outdated.
    """
    resampling: str
    """Name of nnU-Net's resampling function."""
    resampling_settings: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A folder of preprocessed cases."""

    folder: Path
    recipe: Recipe
    patch_size: tuple[int, ...]
    """Typical patch to read, which determines only how voxels are arranged on disk."""


def plan_targets(plan: Plan, folder: Path, configurations: Sequence[str] | None) -> tuple[Target, ...]:
    """Return the folders that configurations of a plan need.

    Args:
        plan: Plan.
        folder: Folder of the preprocessed data set.
        configurations: Names of configurations; None for all configurations of the plan.

    Returns:
        One target for each distinct ``case_folder``, in the plan's order.

    Raises:
        UserError: If the plan has no such configuration, requires a preprocessor other than nnU-Net's default, or has
            configurations that share a folder but need different voxels.
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
                f"plan {plan.name}, {name}: preprocessor_name must be DefaultPreprocessor, the only one that nnssl supports, "
                f"got {manager_of_one.preprocessor_name}"
            )
        identifiers = {entry.get("data_identifier") for entry in plan.nnunet["configurations"].values()}
        if section.case_folder in identifiers or Path(section.case_folder).name != section.case_folder:
            raise UserError(
                f"plan {plan.name}, {name}: case_folder must be a plain name that nnU-Net does not use, "
                f"got {section.case_folder!r}"
            )
        target = Target(folder / section.case_folder, _recipe_of(manager, manager_of_one), section.patch_size)
        targets[section.case_folder] = _join(targets.get(section.case_folder, target), target, plan.name)
    return tuple(targets.values())


def _recipe_of(manager: Any, configuration: Any) -> Recipe:
    """Return the recipe of a configuration in nnU-Net's plans."""
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
    """Return the target for two configurations that share a folder; a 3D one takes precedence over a 2D one."""
    first, second = sorted((first, second), key=lambda target: len(target.patch_size), reverse=True)
    mine, other = asdict(first.recipe), asdict(second.recipe)
    # a 2D configuration has the slice distance of the 3D one, otherwise the planner would not share the folder
    mine["spacing_mm"] = mine["spacing_mm"][-len(other["spacing_mm"]) :]
    if mine != other:
        differing = ", ".join(key for key in mine if mine[key] != other[key])
        raise UserError(
            f"plan {plan_name}: configurations that share {first.folder.name} differ in {differing}; "
            "give each its own case_folder"
        )
    return first


def find_sources(case: RawCase, digests: Mapping[Path, str]) -> tuple[SourceFile, ...]:
    """Return the current state of the image files of a case.

    Args:
        case: The case.
        digests: Digests of its files, from ``nnssl.data.contents``.

    Raises:
        CaseError: If a file or a slice of a series does not exist.
    """
    sources = []
    for image in case.images:
        try:
            state = find_source_state(image)
        except OSError as error:
            raise CaseError(str(image), f"cannot be found ({error.strerror})") from error
        sources.append(SourceFile(str(image), *state, digests.get(image, "")))
    return tuple(sources)


def find_mask_state(mask: Path | None, digests: Mapping[Path, str]) -> SourceFile | None:
    """Return the current state of the user's mask of a case; None if it has none.

    Args:
        mask: File of the mask.
        digests: Digests of files, from ``nnssl.data.contents``.

    Raises:
        UserError: If the file does not exist.
    """
    if mask is None:
        return None
    try:
        return SourceFile(str(mask), *find_source_state(mask), digests.get(mask, ""))
    except OSError as error:
        raise UserError(f"exclusion mask {mask} cannot be found ({error.strerror}); run the command again") from error


def digest_case(
    recipe: Recipe, reader: str, sources: Iterable[SourceFile], exclude_mask: SourceFile | None = None
) -> str:
    """Return a digest of everything that determines the voxels and the mask of a case, whatever the folder of its files."""
    masks = [] if exclude_mask is None else [exclude_mask]
    files = [[_identity(each) for each in group] for group in (sources, masks)]
    decisive = [SCHEMA_VERSION, LEARNABLE_VERSION, FOREGROUND_POINTS, asdict(recipe), reader, files]
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=16).hexdigest()


def _identity(file: SourceFile) -> tuple[Any, ...]:
    """Return what two states of a file differ in."""
    name = Path(file.path).name
    return (name, file.digest) if file.digest else (name, file.size_bytes, file.mtime_ns)


def content_of(properties: CaseProperties) -> str | None:
    """Return a digest of the images and the mask that a case was preprocessed from; None if only their times are known."""
    files = [*properties.sources, *([] if properties.exclude_mask is None else [properties.exclude_mask])]
    if not files or not all(file.digest for file in files):
        return None
    content = [len(properties.sources), [_identity(file) for file in files]]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def find_outdated(
    case: RawCase,
    reader: str,
    targets: Sequence[Target],
    digests: Mapping[Path, str],
    exclude_mask: Path | None = None,
) -> tuple[Target, ...]:
    """Return the targets in which a case is missing, incomplete or outdated.

    Args:
        case: The case.
        reader: Name of the reader class.
        targets: Folders of preprocessed cases.
        digests: Digests of its files, from ``nnssl.data.contents``.
        exclude_mask: The user's mask of the case; None if it has none.
    """
    try:
        sources = find_sources(case, digests)
    except CaseError:
        return tuple(targets)
    mask = find_mask_state(exclude_mask, digests)
    return tuple(target for target in targets if not _is_current(case.name, reader, sources, mask, target))


def _is_current(name: str, reader: str, sources: Sequence[SourceFile], mask: SourceFile | None, target: Target) -> bool:
    try:
        stored = read_properties(target.folder, name)
    except UserError:
        return False
    if not any(source.digest for source in stored.sources):  # earlier versions compared sizes and times
        sources = [replace(source, digest="") for source in sources]
        mask = None if mask is None else replace(mask, digest="")
    return stored.digest == digest_case(target.recipe, reader, sources, mask)
