"""Preprocessing of raw images into the case store, with the same voxel values as nnU-Net's preprocessor.

Source: nnU-Net's ``DefaultPreprocessor`` (Isensee et al., Nature Methods 2021): transpose, crop to nonzero voxels,
normalise and resample, all with nnU-Net's own functions.
Deviations: There is no segmentation to resample. Voxels are stored as float16. Holes in the nonzero mask are filled only
if a channel is normalised inside that mask, since they cannot change the crop.

Beside the voxels, a mask is stored of those that a method may learn from (``nnssl.data.learnable``).

A case is read once for all folders that need it. Each folder serves all configurations that share its spacing.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from nnssl.data.body import body_mask
from nnssl.data.bounding_box import find_box
from nnssl.data.case_error import MOST_SET_ASIDE, TOO_LARGE, CaseError, SetAside, describe
from nnssl.data.case_store import (
    SCHEMA_VERSION,
    CaseProperties,
    complete_cases,
    read_properties,
    remove_case,
    remove_leftovers,
    write_case,
)
from nnssl.data.contents import digest_files
from nnssl.data.exclusion import check_exclusion_mask, find_exclusion_masks, read_exclusion_mask
from nnssl.data.image_files import PICTURE_ENDINGS, ending_of, read_file_header
from nnssl.data.jobs import follow_jobs, run_jobs
from nnssl.data.learnable import learnable_mask, resample_mask
from nnssl.data.normalise import normalise
from nnssl.data.raw import RawCase, RawDataset, read_volume
from nnssl.data.recipe import (
    FOREGROUND_POINTS,
    Recipe,
    Target,
    digest_case,
    find_mask_state,
    find_outdated,
    find_sources,
    plan_targets,
)
from nnssl.draws import draw_seed
from nnssl.errors import UserError
from nnssl.files import some
from nnssl.log import logger
from nnssl.paths import Folders, make_writable
from nnssl.plan import Plan


@dataclass(frozen=True)
class Job:
    """A case and the folders in which it is missing or outdated."""

    case: RawCase
    reader: str
    targets: tuple[Target, ...]
    exclude_mask: Path | None = None
    """The user's mask of the case; None if it has none."""
    digests: Mapping[Path, str] = field(default_factory=dict)
    """Digests of the files of the case."""


@dataclass(frozen=True)
class PreprocessReport:
    """Result of preprocessing."""

    folders: tuple[Path, ...]
    """Folders of the cases."""
    done: int
    """Number of cases that were preprocessed."""
    skipped: int
    """Number of cases that were already complete and up to date."""
    set_aside: tuple[SetAside, ...]
    """Cases that failed, sorted by name."""


def preprocess_dataset(
    dataset: RawDataset,
    plan: Plan,
    usable: Collection[str],
    folders: Folders,
    configurations: Sequence[str] | None,
    processes: int,
    dask_address: str | None,
    restart: bool = False,
    exclude_mask: Path | None = None,
) -> PreprocessReport:
    """Preprocess the usable cases of a data set for configurations of a plan.

    Cases are written to ``<nnUNet_preprocessed>/<data set>/<case_folder>``. Complete cases whose images, masks and recipe
    have not changed are skipped. Outdated cases, and cases that the data set no longer has, are deleted first, so that a
    folder never mixes plans. A killed run resumes where it stopped.

    Args:
        dataset: Raw data set.
        plan: Plan of the data set.
        usable: Names of the cases to preprocess, those of the fingerprint.
        folders: nnU-Net's folders.
        configurations: Names of configurations; None for all configurations of the plan.
        processes: Number of processes on this machine; up to 1 works in this process.
        dask_address: Address of a Dask scheduler to use instead; None for local processes.
        restart: Whether to preprocess complete cases again.
        exclude_mask: Folder of masks in which nothing may be learned (``nnssl.data.exclusion``); None for none.

    Returns:
        The result of preprocessing.

    Raises:
        UserError: If more than a tenth of the cases failed, a worker was killed, a file cannot be written, the plan or the
            cluster cannot be used, or a mask does not fit its image.
    """
    masks = find_exclusion_masks(exclude_mask, dataset)
    targets = plan_targets(plan, folders.preprocessed / dataset.name, configurations)
    cases = [case for case in dataset.cases if case.name in usable]
    for target in targets:
        remove_leftovers(make_writable(target.folder))
        _remove_foreign(target, usable, restart)
    files = [file for case in cases for file in case.images]
    digests = digest_files([*files, *masks.values()], dataset.name, folders, processes)
    jobs = [_job_of(case, dataset.reader, targets, masks.get(case.name), digests) for case in cases]
    jobs = [job for job in jobs if job.targets]
    for job in jobs:
        if job.exclude_mask is not None:
            check_exclusion_mask(job.case, job.exclude_mask, job.reader)
    _tell_dropped_masks(jobs)
    for job in jobs:
        for target in job.targets:
            remove_case(target.folder, job.case.name)
    skipped = len(cases) - len(jobs)
    logger.info(f"preprocessing {dataset.name}: {len(jobs)} cases to preprocess, {skipped} already done")
    processes = min(processes, len(jobs))
    outcomes: Iterable[SetAside | None] = ()
    if jobs:
        outcomes = run_jobs(preprocess_case, jobs, processes, dask_address, _set_aside_dead)
        outcomes = follow_jobs(outcomes, "preprocessing", "preprocessed", len(jobs))
    set_aside = sorted((outcome for outcome in outcomes if outcome is not None), key=lambda entry: entry.case)
    for target in targets:
        remove_leftovers(target.folder)  # of workers that were killed
    for entry in set_aside:
        logger.info(f"set aside {entry.case}: {entry.file} {entry.reason}")
    if len(set_aside) > MOST_SET_ASIDE * len(cases):
        raise UserError(
            f"{dataset.name}: {len(set_aside)} of {len(cases)} cases cannot be preprocessed "
            f"(first: {Path(set_aside[0].file).name} {set_aside[0].reason}); fix or remove them and run the command again"
        )
    done = len(jobs) - len(set_aside)
    return PreprocessReport(tuple(target.folder for target in targets), done, skipped, tuple(set_aside))


def _job_of(
    case: RawCase, reader: str, targets: Sequence[Target], mask: Path | None, digests: Mapping[Path, str]
) -> Job:
    own = {file: digests[file] for file in (*case.images, mask) if file is not None and file in digests}
    return Job(case, reader, find_outdated(case, reader, targets, own, mask), mask, own)


def _tell_dropped_masks(jobs: Sequence[Job]) -> None:
    """Print how many cases were preprocessed with a mask of the user that is no longer given."""
    dropped = 0
    for job in jobs:
        with contextlib.suppress(UserError):
            properties = read_properties(job.targets[0].folder, job.case.name)
            dropped += job.exclude_mask is None and properties.exclude_mask is not None
    if dropped:
        logger.info(
            f"{dropped} cases were preprocessed with an exclusion mask that is no longer given; they are preprocessed again "
            "without it"
        )


def _remove_foreign(target: Target, usable: Collection[str], restart: bool) -> None:
    """Delete complete cases that the data set no longer has, or all cases for a restart."""
    present = complete_cases(target.folder)
    foreign = [name for name in present if name not in usable]
    if foreign:
        logger.info(f"{target.folder}: deleting {len(foreign)} cases that the data set no longer has ({some(foreign)})")
    for name in present if restart else foreign:
        remove_case(target.folder, name)


def preprocess_case(job: Job) -> SetAside | None:
    """Read, preprocess and store one case.

    Returns:
        None, or the reason why the case cannot be used.

    Raises:
        UserError: If the result cannot be written.
    """
    case = job.case
    try:
        sources = find_sources(case, job.digests)
        volume, spacing_mm = read_volume(case, job.reader)
        learnable = learnable_mask(volume, spacing_mm)
        mask_state = find_mask_state(job.exclude_mask, job.digests)
        if job.exclude_mask is not None:
            learnable &= ~read_exclusion_mask(job.exclude_mask, job.reader)
        inside = body_mask(volume) & learnable
        letters = _directions(case, job.reader)
        for target in job.targets:
            done = preprocess_volume(volume, inside, learnable, spacing_mm, target.recipe)
            shape = done.volume.shape[1:]
            points = draw_foreground(done.inside, shape, draw_seed("foreground", case.name))
            resampled = resample_mask(done.learnable, shape)
            properties = CaseProperties(
                schema_version=SCHEMA_VERSION,
                shape=shape,
                channels=len(done.volume),
                spacing_mm=done.spacing_mm,
                sources=sources,
                digest=digest_case(target.recipe, job.reader, sources, mask_state),
                foreground_share=float(done.inside.mean()),
                learnable_share=float(resampled.mean()),
                exclude_mask=mask_state,
                orientation="".join(letters[axis] for axis in target.recipe.transpose_forward) if letters else "",
            )
            write_case(target.folder, case.name, done.volume, points, properties, target.patch_size, resampled)
    except CaseError as error:
        return SetAside(case.name, error.file, error.reason)
    except MemoryError:
        return SetAside(case.name, str(case.images[0]), TOO_LARGE)
    except UserError:
        raise
    except Exception as error:  # whatever an unusual image makes a library raise must not end the other cases
        return SetAside(case.name, str(case.images[0]), f"cannot be preprocessed ({describe(error)})")
    return None


def _directions(case: RawCase, reader: str) -> str:
    """Return the directions in which z, y and x of an image as read increase; empty if its format has none."""
    if ending_of(case.images[0], PICTURE_ENDINGS):
        return ""
    letters = read_file_header(case.images[0], reader).orientation[::-1]
    return letters if len(letters) == 3 and set(letters) <= set("LRAPSI") else ""


def _set_aside_dead(job: Job, reason: str) -> SetAside:
    return SetAside(job.case.name, str(job.case.images[0]), reason)


class PreprocessedVolume(NamedTuple):
    """A preprocessed volume, and masks after transposition and cropping, but without resampling.

    Attributes:
        volume: Normalised intensities.
        inside: Mask of the body, before resampling.
        learnable: Mask of the voxels that a method may learn from, before resampling.
        spacing_mm: Spacing (z, y, x) of the volume in mm.
    """

    volume: Float32[np.ndarray, "channel z2 y2 x2"]
    inside: Bool[np.ndarray, "z3 y3 x3"]
    learnable: Bool[np.ndarray, "z3 y3 x3"]
    spacing_mm: tuple[float, float, float]


def preprocess_volume(
    volume: Float32[np.ndarray, "channel z y x"],
    inside: Bool[np.ndarray, "z y x"],
    learnable: Bool[np.ndarray, "z y x"],
    spacing_mm: Sequence[float],
    recipe: Recipe,
) -> PreprocessedVolume:
    """Transpose, crop, normalise and resample a volume as nnU-Net's ``DefaultPreprocessor`` does.

    Args:
        volume: Volume as read; it is not changed.
        inside: Mask of the body.
        learnable: Mask of the voxels that a method may learn from.
        spacing_mm: Spacing (z, y, x) as read, in mm.
        recipe: Preprocessing recipe.

    Raises:
        ValueError: If the number of channels differs from the plan's, or if all voxels are zero.
    """
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape  # slow to import
    from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name

    if len(volume) != len(recipe.normalization_schemes):
        raise ValueError(f"has {len(volume)} channels, but the plan has {len(recipe.normalization_schemes)}")
    order = recipe.transpose_forward
    volume = volume.transpose(0, *(axis + 1 for axis in order))
    old_spacing_mm = [float(spacing_mm[axis]) for axis in order]
    # 2D configurations keep the slice distance
    z_mm, y_mm, x_mm = [*old_spacing_mm[: 3 - len(recipe.spacing_mm)], *recipe.spacing_mm]
    box, nonzero = _find_nonzero(volume, any(recipe.use_mask_for_norm))
    volume = volume[(slice(None), *box)].astype(np.float32, order="C")
    normalise(volume, nonzero, recipe)
    new_shape = compute_new_shape(volume.shape[1:], old_spacing_mm, (z_mm, y_mm, x_mm))
    resample = recursive_find_resampling_fn_by_name(recipe.resampling)
    result = resample(volume, new_shape, old_spacing_mm, (z_mm, y_mm, x_mm), **recipe.resampling_settings)
    inside, learnable = (mask.transpose(order)[box] for mask in (inside, learnable))
    return PreprocessedVolume(np.asarray(result, dtype=np.float32), inside, learnable, (z_mm, y_mm, x_mm))


def _find_nonzero(
    volume: Float32[np.ndarray, "channel z y x"], filled: bool
) -> tuple[tuple[slice, ...], Int[np.ndarray, "z2 y2 x2"] | None]:
    """Return the bounding box of voxels that are nonzero in some channel.

    If ``filled``, nnU-Net's mask within the box, which is -1 outside, is returned too.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero  # slow to import

    mask = np.any(volume != 0, axis=0)
    if not mask.any():
        raise ValueError("contains only zeros")
    if filled:
        _, mask, bounds = crop_to_nonzero(volume)
        return tuple(slice(*each) for each in bounds), mask[0]
    return find_box(mask), None


def draw_foreground(
    inside: Bool[np.ndarray, "z y x"], new_shape: Sequence[int], seed: int
) -> Int[np.ndarray, "point 3"]:
    """Draw coordinates inside the body and map them to the resampled volume.

    The mask of the body is computed from the measured intensities, because normalisation gives the zeros around a skull
    the same values as tissue of average brightness. Each point is placed at a random position within its voxel before
    scaling, so that all voxels of a finer grid can be drawn.

    Args:
        inside: Mask of the body before resampling.
        new_shape: Shape (z, y, x) of the resampled volume.
        seed: Random seed.

    Returns:
        At most ``FOREGROUND_POINTS`` voxels (z, y, x) of the resampled volume, in random order.
    """
    generator = np.random.default_rng(seed)
    places = np.flatnonzero(inside)
    places = places[generator.choice(len(places), min(FOREGROUND_POINTS, len(places)), replace=False)]
    corners = np.stack(np.unravel_index(places, inside.shape), axis=1)
    points = corners + generator.random(corners.shape)
    return np.minimum(points * new_shape / inside.shape, np.array(new_shape) - 1).astype(np.int64)
