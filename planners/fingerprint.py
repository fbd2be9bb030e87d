"""The fingerprint: measurements on the images of a data set, from which the planner decides.

Every case is read once. Only a small record and a share of a fixed number of sampled intensities are kept of a case, so memory
does not grow with the voxels of a data set; only the records (about 1 kB each) grow with the number of cases.

Source: nnU-Net's dataset fingerprint (Isensee et al., Nature Methods 2021); ``nnunet_fingerprint`` returns its JSON.
Deviations: nnU-Net takes the foreground from the labels. Here it comes from ``nnssl.data.body.body_mask``, which needs no
labels; at most ``SAMPLED_INTENSITIES`` intensities are kept, whereas nnU-Net keeps 10^8.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nnssl.data.case_error import MOST_SET_ASIDE, CaseError, SetAside
from nnssl.data.contents import digest_files
from nnssl.data.image_files import PICTURE_ENDINGS, ending_of, find_source_state, longest_side_mm
from nnssl.data.jobs import follow_jobs, run_jobs
from nnssl.data.raw import UNKNOWN_CHANNEL, RawCase, RawDataset
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.paths import Folders, make_writable
from nnssl.schema import STRICT, read, write
from planners.case_record import (
    CT_AIR_HU,
    CaseRecord,
    IntensityStatistics,
    MeasuredCase,
    measure_case,
    summarise_intensities,
)
from planners.modality_rules import CT, name_modality

SCHEMA_VERSION = 1
FILE_NAME = "nnssl_fingerprint.json"

SAMPLED_INTENSITIES = 4_000_000
"""Number of foreground intensities kept over all cases and channels (16 MB)."""
MOST_TIMES_AS_LONG = 300.0
"""Largest ratio of the longest sides of a case and of the median case. A header in m instead of mm gives a thousand; a whole body
is 60 times as long as a hippocampus."""
MOST_HU = 1e6
"""Highest intensity of a CT image; metal is at 30,000, and 16 bits end at 65,535."""
CT_AIR_SHARE = 0.01
"""Smallest share of voxels below ``CT_AIR_HU`` (air, also if clipped) with which a case looks like CT."""
CT_CASES = 0.95
"""Smallest share of cases that look like CT with which a channel counts as CT."""


@dataclass(frozen=True)
class Duplicate:
    """Case that is not used because its voxels equal those of another case."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    same_as: str


@dataclass(frozen=True)
class Fingerprint:
    """Measurements on a data set."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    dataset_name: str
    sources: str
    """Digest of the names and bytes of all image files, and of how they are read."""
    channel_names: tuple[str, ...]
    """Names from ``dataset.json`` or the user, otherwise the modality detected from intensities."""
    modalities: tuple[str, ...]
    """``"CT"``, ``"X-ray"`` or the channel's name, for each channel."""
    cases: tuple[CaseRecord, ...]
    """Usable cases, sorted by name."""
    set_aside: tuple[SetAside, ...]
    duplicates: tuple[Duplicate, ...]
    foreground_intensity_properties_per_channel: dict[str, IntensityStatistics]
    """Statistics over all usable cases, each with the same weight; keys are "0", "1", ..."""

    @property
    def usable(self) -> frozenset[str]:
        """Names of the usable cases."""
        return frozenset(case.name for case in self.cases)


def extract_fingerprint(
    dataset: RawDataset, processes: int, sources: str | None = None, dask_address: str | None = None
) -> Fingerprint:
    """Measure every case of a data set.

    The result depends only on the data, not on the number of processes.

    Args:
        dataset: Raw data set.
        processes: Number of worker processes; with 1 or fewer, this process does the work.
        sources: Digest of the files, from ``digest_sources``; None to take their sizes and times.
        dask_address: Address of a Dask scheduler to use instead of ``processes``; None for local processes.

    Returns:
        The fingerprint.

    Raises:
        UserError: If no case is usable, a worker was killed, or the cluster cannot be used.
    """
    measured: list[MeasuredCase] = []
    set_aside = list(dataset.set_aside)
    duplicates = []
    first_with: dict[str, str] = {}
    for outcome in _measure_cases(dataset, processes, dask_address):
        if isinstance(outcome, SetAside):
            set_aside.append(outcome)
        elif outcome.record.digest in first_with:
            duplicates.append(Duplicate(outcome.record.name, first_with[outcome.record.digest]))
        else:
            first_with[outcome.record.digest] = outcome.record.name
            measured.append(outcome)
    measured, odd = _split_dimensions(dataset, measured)
    measured, wrong = _split_sizes(dataset, measured)
    modalities = _judge_modalities(dataset, [entry.record for entry in measured]) if measured else ()
    measured, impossible = _split_intensities(dataset, measured, modalities)
    set_aside = sorted(set_aside + odd + wrong + impossible, key=lambda entry: (entry.case, entry.file))
    for entry in set_aside:
        logger.info(f"skipped {entry.case}: {entry.reason} ({entry.file})")
    for duplicate in duplicates:
        logger.info(f"skipped {duplicate.case}: it has the same voxels as {duplicate.same_as}")
    if not measured:
        raise UserError(_too_many(dataset.name, set_aside, len(set_aside) + len(duplicates)))
    names = zip(dataset.channel_names, modalities, strict=True)
    return Fingerprint(
        schema_version=SCHEMA_VERSION,
        dataset_name=dataset.name,
        sources=digest_sources(dataset) if sources is None else sources,
        channel_names=tuple(modality if name == UNKNOWN_CHANNEL else name for name, modality in names),
        modalities=modalities,
        cases=tuple(entry.record for entry in measured),
        set_aside=tuple(set_aside),
        duplicates=tuple(duplicates),
        foreground_intensity_properties_per_channel={
            str(channel): summarise_intensities(np.concatenate([entry.samples[channel] for entry in measured]))
            for channel in range(len(modalities))
        },
    )


def read_or_extract(
    dataset: RawDataset, folders: Folders, processes: int, dask_address: str | None = None
) -> Fingerprint:
    """Return the stored fingerprint if it was made from the same files; otherwise extract and store it.

    It is stored as ``<nnUNet_preprocessed>/<data set>/nnssl_fingerprint.json``.

    Args:
        dataset: Raw data set.
        folders: nnU-Net's folders.
        processes: See ``extract_fingerprint``.
        dask_address: See ``extract_fingerprint``.

    Returns:
        The fingerprint.

    Raises:
        UserError: If the folder cannot be written, or as in ``extract_fingerprint``.
    """
    path = make_writable(folders.preprocessed / dataset.name) / FILE_NAME
    digests = digest_files([file for case in dataset.cases for file in case.images], dataset.name, folders, processes)
    sources = digest_sources(dataset, digests)
    if path.exists():
        try:
            stored = read(Fingerprint, path, "fingerprint")
        except UserError:
            logger.info(f"{path} is damaged or was written by another version of nnssl: measuring the data set again")
        else:
            if stored.sources in (sources, digest_sources(dataset)):  # earlier versions compared sizes and times
                logger.info(f"fingerprint of {dataset.name} read from {path}: the images have not changed")
                return stored
            logger.info(f"{path} does not match the images of {dataset.name}: measuring them again")
    fingerprint = extract_fingerprint(dataset, processes, sources, dask_address)
    write(path, fingerprint)
    return fingerprint


def check_set_aside(fingerprint: Fingerprint) -> None:
    """Check that at most a tenth of the cases cannot be used.

    Raises:
        UserError: If there are more; the message lists the first few.
    """
    total = len(fingerprint.cases) + len(fingerprint.set_aside) + len(fingerprint.duplicates)
    if len(fingerprint.set_aside) > MOST_SET_ASIDE * total:
        raise UserError(_too_many(fingerprint.dataset_name, list(fingerprint.set_aside), total))


def nnunet_fingerprint(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return the content of nnU-Net's ``dataset_fingerprint.json`` in plain Python types; cases keep their order."""
    sizes = [case.relative_size_after_crop for case in fingerprint.cases]
    properties = fingerprint.foreground_intensity_properties_per_channel
    return {
        "spacings": [list(case.spacing_mm) for case in fingerprint.cases],
        "shapes_after_crop": [list(case.shape_after_crop) for case in fingerprint.cases],
        "foreground_intensity_properties_per_channel": {key: asdict(value) for key, value in properties.items()},
        "median_relative_size_after_cropping": float(np.median(sizes)),
    }


def digest_sources(dataset: RawDataset, digests: Mapping[Path, str] | None = None) -> str:
    """Return a digest of how images are read and of the names and bytes of all images.

    Args:
        dataset: Raw data set.
        digests: Digests of the images, from ``nnssl.data.contents``; None to take their sizes and modification times instead, as
            in fingerprints of earlier versions.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((dataset.name, dataset.reader, dataset.channel_names, dataset.set_aside)).encode())
    for case in dataset.cases:
        for file in case.images:
            state: tuple[str | int, ...] = ("missing",)
            if digests is not None:
                state = (digests.get(file, "missing"),)
            else:
                with suppress(OSError, CaseError):
                    state = find_source_state(file)
            digest.update(repr((case.name, file.name, *state)).encode())
    return digest.hexdigest()


def _measure_cases(dataset: RawDataset, processes: int, dask_address: str | None) -> list[MeasuredCase | SetAside]:
    """Return the measurements of all cases, sorted by name."""
    work = partial(
        measure_case,
        reader=dataset.reader,
        channels=len(dataset.channel_names),
        samples=max(1, SAMPLED_INTENSITIES // (len(dataset.cases) * len(dataset.channel_names))),
    )
    total = len(dataset.cases)
    outcomes = run_jobs(work, dataset.cases, min(processes, total), dask_address, _set_aside_dead)
    found = list(follow_jobs(outcomes, "measuring", "measured", total))
    return sorted(found, key=lambda each: each.case if isinstance(each, SetAside) else each.record.name)


def _set_aside_dead(case: RawCase, reason: str) -> SetAside:
    return SetAside(case.name, str(case.images[0]), reason)


def _split_dimensions(dataset: RawDataset, measured: list[MeasuredCase]) -> tuple[list[MeasuredCase], list[SetAside]]:
    """Reject single slices among volumes or volumes among single slices, whichever are fewer."""
    flat = [entry for entry in measured if entry.record.shape[0] == 1]
    files = {case.name: str(case.images[0]) for case in dataset.cases}
    mostly_flat = 2 * len(flat) > len(measured)
    reason = "is a volume among 2D images" if mostly_flat else "is a single slice among volumes"
    odd = [entry for entry in measured if (entry.record.shape[0] == 1) != mostly_flat]
    kept = [entry for entry in measured if (entry.record.shape[0] == 1) == mostly_flat]
    return kept, [SetAside(entry.record.name, files[entry.record.name], reason) for entry in odd]


def _split_sizes(dataset: RawDataset, measured: list[MeasuredCase]) -> tuple[list[MeasuredCase], list[SetAside]]:
    """Reject cases whose size in mm is so far from the others' that their spacing must have another unit."""
    if not measured or ending_of(dataset.cases[0].images[0], PICTURE_ENDINGS):
        return measured, []
    lengths = [longest_side_mm(entry.record.shape, entry.record.spacing_mm) for entry in measured]
    usual = float(np.median(lengths))
    files = {case.name: str(case.images[0]) for case in dataset.cases}
    kept, wrong = [], []
    for entry, length in zip(measured, lengths, strict=True):
        if 1 / MOST_TIMES_AS_LONG < length / usual < MOST_TIMES_AS_LONG:
            kept.append(entry)
            continue
        reason = (
            f"is {length:,.4g} mm long, but half of the cases are {usual:,.4g} mm or more; correct the spacing in its header or, "
            "in a NIfTI file, the unit (xyzt_units)"
        )
        wrong.append(SetAside(entry.record.name, files[entry.record.name], reason))
    return kept, wrong


def _split_intensities(
    dataset: RawDataset, measured: list[MeasuredCase], modalities: Sequence[str]
) -> tuple[list[MeasuredCase], list[SetAside]]:
    """Reject CT images with intensities that are no Hounsfield units, since one would spoil the statistics for all."""
    images = {case.name: case.images for case in dataset.cases}
    kept, impossible = [], []
    for entry in measured:
        record = entry.record
        highest = {
            channel: record.intensities[channel].max for channel, modality in enumerate(modalities) if modality == CT
        }
        wrong = next((channel for channel, value in highest.items() if value > MOST_HU), None)
        if wrong is None:
            kept.append(entry)
            continue
        files = images[record.name]
        reason = f"has intensities up to {highest[wrong]:.4g}, which are no Hounsfield units; correct them"
        impossible.append(SetAside(record.name, str(files[min(wrong, len(files) - 1)]), reason))
    return kept, impossible


def _judge_modalities(dataset: RawDataset, records: list[CaseRecord]) -> tuple[str, ...]:
    """Return CT, X-ray or the channel's name for each channel; that of unnamed channels is detected from intensities."""
    modalities = []
    single_slices = all(record.shape[0] == 1 for record in records)
    for channel, name in enumerate(dataset.channel_names):
        looks = sum(record.below_ct_air[channel] >= CT_AIR_SHARE for record in records)
        like_ct = looks >= CT_CASES * len(records)
        seen = f"{looks} of {len(records)} cases have voxels below {CT_AIR_HU:g}"
        if name == UNKNOWN_CHANNEL:
            modalities.append(CT if like_ct else "MRI")
            logger.info(
                f"{dataset.name}: channel {channel} detected as {modalities[-1]} ({seen}); name the channel if this is wrong"
            )
        else:
            modalities.append(name_modality(name, single_slices))
            if (modalities[-1] == CT) != like_ct:
                logger.info(
                    f"{dataset.name}: channel {channel} is treated as {name}, its name in dataset.json, although {seen}"
                )
    return tuple(modalities)


def _too_many(name: str, set_aside: list[SetAside], total: int) -> str:
    first = "; ".join(f"{Path(entry.file).name} {entry.reason}" for entry in set_aside[:3])
    return f"{name}: {len(set_aside)} of {total} cases cannot be used ({first}); fix or remove them"
