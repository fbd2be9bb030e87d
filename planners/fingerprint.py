"""The fingerprint: what the planner needs to know of a data set, measured on its images alone.

Every case is read once. What stays of it is one small record and its share of a bounded number of sampled intensities,
so memory does not grow with the voxels of a data set; only the records (about 1 kB each) grow with the number of cases.

Source: nnU-Net's dataset fingerprint (Isensee et al., Nature Methods 2021), whose JSON ``nnunet_fingerprint`` gives.
Deviations: nnU-Net takes foreground from the labels, here it is ``foreground_mask``, which needs none; at most
``SAMPLED_INTENSITIES`` are kept where nnU-Net keeps 10^8.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32
from skimage.filters import threshold_otsu

from nnssl.data.image_files import check_finite, find_source_state
from nnssl.data.raw import UNKNOWN_CHANNEL, CaseError, RawCase, RawDataset, SetAside, read_header, read_volume
from nnssl.draws import draw_seed
from nnssl.errors import UserError
from nnssl.paths import Folders, make_writable
from nnssl.schema import STRICT, read, write

SCHEMA_VERSION = 1
FILE_NAME = "nnssl_fingerprint.json"

SAMPLED_INTENSITIES = 4_000_000
"""Foreground intensities kept over all cases and channels (16 MB)."""
HISTOGRAM_VOXELS = 1_000_000
"""Voxels of a case at most that thresholds and percentiles are taken from, evenly spread."""
MOST_SET_ASIDE = 0.1
"""Share of the cases that may be unusable before something is taken to be wrong with the data set."""

AIR_LEVEL = 0.2
"""Where the middle of the dark class may lie at most, on the way from percentile 0.5 to 99.5, to count as air."""
MIXED_SPREAD = 0.06
"""Standard deviation of the dark class, in the same unit, from which on it is taken for air and dim tissue together."""

CT_AIR_HU = -100.0
CT_AIR_SHARE = 0.01
"""A case looks like CT if at least this share of its voxels lies below ``CT_AIR_HU`` (air, also if clipped)."""
CT_CASES = 0.95
"""Share of the cases that must look like CT."""


@dataclass(frozen=True)
class IntensityStatistics:
    """Intensities of the foreground in one channel, under nnU-Net's names."""

    __pydantic_config__: ClassVar = STRICT

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True)
class CaseRecord:
    """What is known of one usable case; axes z, y, x."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    orientation: str
    """Directions towards which x, y and z grow ("LPS"); empty where the format does not say."""
    channels: int
    shape_after_crop: tuple[int, ...]
    """Shape of the box around all voxels that are not 0 in some channel, as nnU-Net crops."""
    relative_size_after_crop: float
    foreground_share: float
    """Share of the voxels in ``foreground_mask``."""
    intensities: tuple[IntensityStatistics, ...]
    """Per channel."""
    below_ct_air: tuple[float, ...]
    """Per channel: share of the voxels below ``CT_AIR_HU``."""
    digest: str
    """Of the shape and the voxels; equal for equal images."""


@dataclass(frozen=True)
class Duplicate:
    """A case that is not used because its voxels are those of another."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    same_as: str


@dataclass(frozen=True)
class Fingerprint:
    """What the data dictates."""

    __pydantic_config__: ClassVar = STRICT

    schema_version: int
    dataset_name: str
    sources: str
    """Digest of names, sizes and times of all image files, and of how they are read."""
    channel_names: tuple[str, ...]
    """Of dataset.json or the user, else the modality that was judged from intensities."""
    modalities: tuple[str, ...]
    """Per channel: ``"CT"``, or the channel's name."""
    cases: tuple[CaseRecord, ...]
    """Usable cases, sorted by name."""
    set_aside: tuple[SetAside, ...]
    duplicates: tuple[Duplicate, ...]
    foreground_intensity_properties_per_channel: dict[str, IntensityStatistics]
    """Over all usable cases, each with the same weight; keys "0", "1", ..."""


@dataclass(frozen=True)
class _Measured:
    """What a worker hands back for one case."""

    record: CaseRecord
    samples: np.ndarray
    """(channel, samples) float32"""


def foreground_mask(volume: Float32[np.ndarray, "channel z y x"]) -> Bool[np.ndarray, "z y x"]:
    """Return which voxels are body rather than air, without labels.

    Otsu's threshold between the 0.5 and 99.5 percentiles of the first channel splits dark from bright. The dark class
    is air if its median lies in the lowest fifth of that range (``AIR_LEVEL``); images cropped to tissue have a dark
    class further up and no air at all. When the dark class is wide (``MIXED_SPREAD``), air and dim tissue are in it
    together and Otsu's threshold inside it tells them apart. Without air the foreground is what is not 0.

    Source: Otsu, IEEE Trans. SMC 9(1), 1979. The levels were set on 200 MR crops of the hippocampus (Medical
    Segmentation Decathlon; median of the dark class at 0.22 to 0.40 of the range, no air), 160 cardiac MR (ACDC; 0.02
    to 0.21) and 12 abdominal CT (BTCV; 0.00 to 0.02).
    Deviations: the spread of the dark class was tried as the test for air and does not separate those data sets.

    Args:
        volume: intensities (channel, z, y, x), finite.

    Returns:
        Mask (z, y, x); never empty, for a volume without any contrast it is true everywhere.
    """
    first = volume[0]
    values = _spread_sample(first)
    low, high = np.percentile(values, (0.5, 99.5))
    if high > low:
        values = np.clip(values, low, high)
        threshold = threshold_otsu(values)
        dark = values[values <= threshold]
        if np.median(dark) - low < AIR_LEVEL * (high - low):
            if dark.std() > MIXED_SPREAD * (high - low):
                threshold = threshold_otsu(dark)
            return first > threshold
    nonzero = np.any(volume != 0, axis=0)
    return nonzero if nonzero.any() else np.ones_like(nonzero)


def extract_fingerprint(
    dataset: RawDataset,
    processes: int,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Fingerprint:
    """Measure every case of a data set.

    The result depends on the data only, not on the number of processes.

    Args:
        dataset: the data set.
        processes: worker processes; up to 1 runs in this process.
        say: called with one line for each thing that was inferred or left out.
        progress: called with the cases done and their total, after each case.

    Returns:
        The fingerprint.

    Raises:
        UserError: no case is usable, or a worker was killed.
    """
    samples_per_case = max(1, SAMPLED_INTENSITIES // (len(dataset.cases) * len(dataset.channel_names)))
    measured: list[_Measured] = []
    set_aside = list(dataset.set_aside)
    duplicates = []
    first_with: dict[str, str] = {}
    for done, outcome in enumerate(_measure_all(dataset, samples_per_case, processes), start=1):
        if isinstance(outcome, SetAside):
            set_aside.append(outcome)
        elif outcome.record.digest in first_with:
            duplicates.append(Duplicate(outcome.record.name, first_with[outcome.record.digest]))
        else:
            first_with[outcome.record.digest] = outcome.record.name
            measured.append(outcome)
        if progress is not None:
            progress(done, len(dataset.cases))
    measured, odd = _split_dimensions(dataset, measured)
    set_aside = sorted(set_aside + odd, key=lambda entry: (entry.case, entry.file))
    for entry in set_aside:
        say(f"set aside {entry.case}: {entry.reason} ({entry.file})")
    for duplicate in duplicates:
        say(f"left out {duplicate.case}: it has the same voxels as {duplicate.same_as}")
    if not measured:
        raise UserError(_too_many(dataset.name, set_aside, len(set_aside) + len(duplicates)))
    modalities = _judge_modalities(dataset, [entry.record for entry in measured], say)
    names = zip(dataset.channel_names, modalities, strict=True)
    return Fingerprint(
        schema_version=SCHEMA_VERSION,
        dataset_name=dataset.name,
        sources=digest_sources(dataset),
        channel_names=tuple(modality if name == UNKNOWN_CHANNEL else name for name, modality in names),
        modalities=modalities,
        cases=tuple(entry.record for entry in measured),
        set_aside=tuple(set_aside),
        duplicates=tuple(duplicates),
        foreground_intensity_properties_per_channel={
            str(channel): _summarize(np.concatenate([entry.samples[channel] for entry in measured]))
            for channel in range(len(modalities))
        },
    )


def read_or_extract(
    dataset: RawDataset,
    folders: Folders,
    processes: int,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    restart: bool = False,
) -> Fingerprint:
    """Return the stored fingerprint if it was made from the same files, else extract and store it.

    It is stored as ``<nnUNet_preprocessed>/<data set>/nnssl_fingerprint.json``.

    Args:
        dataset: the data set.
        folders: nnU-Net's folders.
        processes: see ``extract_fingerprint``.
        say: see ``extract_fingerprint``.
        progress: see ``extract_fingerprint``.
        restart: extract in any case.

    Returns:
        The fingerprint.

    Raises:
        UserError: as ``extract_fingerprint``; or the folder cannot be written.
    """
    path = make_writable(folders.preprocessed / dataset.name) / FILE_NAME
    if path.exists() and not restart:
        try:
            stored = read(Fingerprint, path, "fingerprint")
        except UserError:
            say(f"{path} is of another version of nnssl or damaged: measuring the data set again")
        else:
            if stored.schema_version == SCHEMA_VERSION and stored.sources == digest_sources(dataset):
                say(f"fingerprint of {dataset.name} taken from {path}: the images have not changed")
                return stored
            say(f"the images of {dataset.name} are not those of {path}: measuring them again")
    fingerprint = extract_fingerprint(dataset, processes, say, progress)
    write(path, fingerprint)
    return fingerprint


def check_set_aside(fingerprint: Fingerprint) -> None:
    """Check that few enough cases had to be set aside.

    Raises:
        UserError: more than a tenth; names the count and the first few.
    """
    total = len(fingerprint.cases) + len(fingerprint.set_aside) + len(fingerprint.duplicates)
    if len(fingerprint.set_aside) > MOST_SET_ASIDE * total:
        raise UserError(_too_many(fingerprint.dataset_name, list(fingerprint.set_aside), total))


def nnunet_fingerprint(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return the content of nnU-Net's ``dataset_fingerprint.json``; plain Python, cases in the fingerprint's order."""
    sizes = [case.relative_size_after_crop for case in fingerprint.cases]
    properties = fingerprint.foreground_intensity_properties_per_channel
    return {
        "spacings": [list(case.spacing_mm) for case in fingerprint.cases],
        "shapes_after_crop": [list(case.shape_after_crop) for case in fingerprint.cases],
        "foreground_intensity_properties_per_channel": {key: asdict(value) for key, value in properties.items()},
        "median_relative_size_after_cropping": float(np.median(sizes)),
    }


def digest_sources(dataset: RawDataset) -> str:
    """Return a digest of names, sizes and modification times of all images and of how they are read."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((dataset.name, dataset.reader, dataset.channel_names, dataset.set_aside)).encode())
    for case in dataset.cases:
        for file in case.images:
            try:
                size_bytes, mtime_ns = find_source_state(file)
            except (OSError, CaseError):
                digest.update(repr((case.name, file.name, "missing")).encode())
            else:
                digest.update(repr((case.name, file.name, size_bytes, mtime_ns)).encode())
    return digest.hexdigest()


def _measure_all(dataset: RawDataset, samples: int, processes: int) -> Iterator["_Measured | SetAside"]:
    """Yield what was measured on each case, in the order of the cases."""
    measure = partial(_measure, reader=dataset.reader, channels=len(dataset.channel_names), samples=samples)
    if processes <= 1:
        yield from map(measure, dataset.cases)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(dataset.cases)), mp_context=context) as pool:
        try:
            yield from pool.map(measure, dataset.cases)
        except BrokenProcessPool as error:
            raise UserError(
                f"{dataset.name}: a process that measures images was killed, most likely for want of memory; "
                f"use fewer than {processes} processes"
            ) from error


def _measure(case: RawCase, reader: str, channels: int, samples: int) -> "_Measured | SetAside":
    """Read one case and measure it, or say why it cannot be used."""
    try:
        volume, spacing_mm = read_volume(case, reader)
        orientation = read_header(case, reader)[2]
        _check_volume(case, volume, spacing_mm, channels)
        for file in case.images:
            check_finite(file)
    except CaseError as error:
        return SetAside(case.name, error.file, error.reason)
    mask = foreground_mask(volume)
    crop = _shape_after_crop(volume)
    generator = np.random.default_rng(draw_seed("fingerprint", case.name))
    foreground = [channel[mask] for channel in volume]
    # with replacement, as in nnU-Net, so that every case has the same weight however small it is
    places = generator.integers(0, foreground[0].size, samples)
    record = CaseRecord(
        name=case.name,
        shape=tuple(int(size) for size in volume.shape[1:]),
        spacing_mm=spacing_mm,
        orientation=orientation,
        channels=volume.shape[0],
        shape_after_crop=crop,
        relative_size_after_crop=float(np.prod(crop) / np.prod(volume.shape[1:])),
        foreground_share=float(mask.mean()),
        intensities=tuple(_summarize(values) for values in foreground),
        below_ct_air=tuple(float((channel < CT_AIR_HU).mean()) for channel in volume),
        digest=digest_volume(volume),
    )
    return _Measured(record, np.stack([values[places] for values in foreground]))


def _check_volume(case: RawCase, volume: np.ndarray, spacing_mm: tuple[float, ...], channels: int) -> None:
    """Raise a CaseError for a volume that cannot be learnt from."""
    if volume.shape[0] != channels:
        raise CaseError(str(case.images[0]), f"has {volume.shape[0]} channel(s), the data set has {channels}")
    if not all(np.isfinite(spacing_mm)) or min(spacing_mm) <= 0:
        raise CaseError(str(case.images[0]), f"has the impossible spacing {spacing_mm}")
    files = case.images if len(case.images) == channels else case.images[:1] * channels
    for file, values in zip(files, volume, strict=True):
        if not np.isfinite(values).all():
            raise CaseError(str(file), "holds NaN or infinite intensities")
        if values.min() == values.max():
            raise CaseError(str(file), f"is constant (every voxel is {values.flat[0]:g})")


def _shape_after_crop(volume: np.ndarray) -> tuple[int, ...]:
    """Return the shape of the box around everything that is not 0; filling holes, as nnU-Net does, cannot change it."""
    nonzero = np.any(volume != 0, axis=0)
    extents = []
    for axis in range(3):
        along = np.flatnonzero(nonzero.any(axis=tuple(other for other in range(3) if other != axis)))
        extents.append(int(along[-1] - along[0] + 1))
    return tuple(extents)


def digest_volume(volume: Float32[np.ndarray, "channel z y x"]) -> str:
    """Return a digest of the shape and the voxels; equal for equal images, whatever their files are called."""
    shape = hashlib.blake2b(repr(volume.shape).encode(), digest_size=16).digest()
    return hashlib.blake2b(volume.data, digest_size=16, person=shape).hexdigest()


def _spread_sample(values: np.ndarray) -> np.ndarray:
    """Return at most ``HISTOGRAM_VOXELS`` values at even, odd-numbered distances in memory order."""
    step = -(-values.size // HISTOGRAM_VOXELS)
    return values.reshape(-1)[:: step + (step + 1) % 2]


def _summarize(values: np.ndarray) -> IntensityStatistics:
    """Return nnU-Net's statistics of intensities; percentiles of large arrays come from an even sample."""
    low, median, high = np.percentile(_spread_sample(values), (0.5, 50.0, 99.5))
    return IntensityStatistics(
        mean=float(values.mean(dtype=np.float64)),
        median=float(median),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
    )


def _split_dimensions(dataset: RawDataset, measured: list[_Measured]) -> tuple[list[_Measured], list[SetAside]]:
    """Set aside single slices among volumes, or volumes among single slices: whichever are fewer."""
    flat = [entry for entry in measured if entry.record.shape[0] == 1]
    files = {case.name: str(case.images[0]) for case in dataset.cases}
    mostly_flat = 2 * len(flat) > len(measured)
    reason = "is a volume among 2D images" if mostly_flat else "is a single slice among volumes"
    odd = [entry for entry in measured if (entry.record.shape[0] == 1) != mostly_flat]
    kept = [entry for entry in measured if (entry.record.shape[0] == 1) == mostly_flat]
    return kept, [SetAside(entry.record.name, files[entry.record.name], reason) for entry in odd]


def _judge_modalities(dataset: RawDataset, records: list[CaseRecord], say: Callable[[str], None]) -> tuple[str, ...]:
    """Return CT or the channel's name for each channel, judging unnamed channels from intensities."""
    modalities = []
    for channel, name in enumerate(dataset.channel_names):
        looks = sum(record.below_ct_air[channel] >= CT_AIR_SHARE for record in records)
        like_ct = looks >= CT_CASES * len(records)
        seen = f"{looks} of {len(records)} cases have voxels below {CT_AIR_HU:g}"
        if name == UNKNOWN_CHANNEL:
            modalities.append("CT" if like_ct else "MRI")
            say(f"{dataset.name}: channel {channel} is taken for {modalities[-1]}, as {seen}; if not so, name it")
        else:
            modalities.append("CT" if name.casefold() == "ct" else name)  # nnU-Net's rule
            if (modalities[-1] == "CT") != like_ct:
                say(f"{dataset.name}: channel {channel} is treated as {name} as dataset.json says, though {seen}")
    return tuple(modalities)


def _too_many(name: str, set_aside: list[SetAside], total: int) -> str:
    first = "; ".join(f"{Path(entry.file).name} {entry.reason}" for entry in set_aside[:3])
    return f"{name}: {len(set_aside)} of {total} cases cannot be used ({first}); mend or remove them"
