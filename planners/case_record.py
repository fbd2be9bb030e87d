"""Measurements on one case: its geometry, its intensities, and whether it can be used for pretraining."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32

from nnssl.data.body import body_mask, spread_sample
from nnssl.data.bounding_box import find_box
from nnssl.data.case_error import TOO_LARGE, CaseError, SetAside, describe
from nnssl.data.image_files import check_finite, check_size, check_spacing
from nnssl.data.raw import RawCase, read_header, read_volume
from nnssl.draws import draw_seed
from nnssl.schema import STRICT

CT_AIR_HU = -100.0
"""Hounsfield number below which voxels are air, also if intensities are clipped."""


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
    """Measurements of one usable case; axes are z, y, x."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    orientation: str
    """Directions in which x, y and z increase ("LPS"); empty if the file format does not store them."""
    channels: int
    shape_after_crop: tuple[int, ...]
    """Shape of the bounding box of all voxels that are nonzero in any channel, as nnU-Net crops."""
    relative_size_after_crop: float
    foreground_share: float
    """Share of the voxels in ``body_mask``."""
    intensities: tuple[IntensityStatistics, ...]
    """Statistics of each channel."""
    below_ct_air: tuple[float, ...]
    """Share of the voxels below ``CT_AIR_HU``, for each channel."""
    digest: str
    """Digest of the shape and the voxels; equal for equal images."""


@dataclass(frozen=True)
class MeasuredCase:
    """Result of a worker for one case."""

    record: CaseRecord
    samples: np.ndarray
    """Sampled intensities of the body, (channel, samples), float32."""


def measure_case(case: RawCase, reader: str, channels: int, samples: int) -> MeasuredCase | SetAside:
    """Read and measure one case.

    Args:
        case: Case to measure.
        reader: Name of the reader class.
        channels: Expected number of channels.
        samples: Number of intensities of the body to draw from each channel, with the case's name as seed.

    Returns:
        The measurements, or why the case cannot be used.
    """
    try:
        volume, spacing_mm = read_volume(case, reader)
        orientation = read_header(case, reader)[2]
        _check_volume(case, volume, spacing_mm, channels)
        for file in case.images:
            check_finite(file)
        return _measure(case, volume, spacing_mm, orientation, samples)
    except CaseError as error:
        return SetAside(case.name, error.file, error.reason)
    except MemoryError:
        return SetAside(case.name, str(case.images[0]), TOO_LARGE)
    except Exception as error:  # whatever an unusual image makes a library raise must not end the other cases
        return SetAside(case.name, str(case.images[0]), f"cannot be measured ({describe(error)})")


def _measure(
    case: RawCase,
    volume: Float32[np.ndarray, "channel z y x"],
    spacing_mm: tuple[float, ...],
    orientation: str,
    samples: int,
) -> MeasuredCase:
    """Return the measurements of a case that can be used."""
    mask = body_mask(volume)
    crop = _shape_after_crop(volume)
    generator = np.random.default_rng(draw_seed("fingerprint", case.name))
    foreground = [channel[mask] for channel in volume]
    # drawn with replacement, as in nnU-Net, so that every case has the same weight regardless of its size
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
        intensities=tuple(summarise_intensities(values) for values in foreground),
        below_ct_air=tuple(float((channel < CT_AIR_HU).mean()) for channel in volume),
        digest=digest_volume(volume),
    )
    return MeasuredCase(record, np.stack([values[places] for values in foreground]))


def _check_volume(case: RawCase, volume: np.ndarray, spacing_mm: tuple[float, ...], channels: int) -> None:
    """Check that a volume can be used for pretraining.

    Raises:
        CaseError: If its channels, spacing or intensities are unusable.
    """
    if volume.shape[0] != channels:
        raise CaseError(str(case.images[0]), f"has {volume.shape[0]} channel(s), but the data set has {channels}")
    check_spacing(case.images[0], spacing_mm)
    check_size(case.images[0], volume.shape[1:], spacing_mm)
    files = case.images if len(case.images) == channels else case.images[:1] * channels
    for file, values in zip(files, volume, strict=True):
        if not np.isfinite(values).all():
            raise CaseError(str(file), "holds NaN or infinite intensities")
        if values.min() == values.max():
            raise CaseError(str(file), f"is constant (every voxel is {values.flat[0]:g})")


def _shape_after_crop(volume: np.ndarray) -> tuple[int, ...]:
    """Return the shape of the bounding box of all nonzero voxels. Filling holes, as nnU-Net does, does not change it."""
    return tuple(side.stop - side.start for side in find_box(np.any(volume != 0, axis=0)))


def digest_volume(volume: Float32[np.ndarray, "channel z y x"]) -> str:
    """Return a digest of the shape and the voxels, which is equal for equal images regardless of file names."""
    shape = hashlib.blake2b(repr(volume.shape).encode(), digest_size=16).digest()
    return hashlib.blake2b(volume.data, digest_size=16, person=shape).hexdigest()


def summarise_intensities(values: np.ndarray) -> IntensityStatistics:
    """Return nnU-Net's statistics of intensities; percentiles of large arrays are computed on an even sample."""
    low, median, high = np.percentile(spread_sample(values).astype(np.float64), (0.5, 50.0, 99.5))
    return IntensityStatistics(
        mean=float(values.mean(dtype=np.float64)),
        median=float(median),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
    )
