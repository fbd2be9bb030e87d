"""Sizes as text: voxels, lengths, memory and large numbers; the length of a scan in patches."""

from collections.abc import Iterable, Sequence

MAGNITUDES = (("trillion", 1e12), ("billion", 1e9), ("million", 1e6))
UNITS_OF_MEMORY = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def in_voxels(sizes: Iterable[float]) -> str:
    """Return numbers of voxels, tokens or strides per axis in the form ``4x8x8``."""
    return "x".join(str(int(size)) for size in sizes)


def in_mm(lengths: Iterable[float]) -> str:
    """Return lengths per axis in the form ``2.5 x 1 x 1``."""
    return " x ".join(f"{float(length):.4g}" for length in lengths)


def length_in_patches(scan_mm: Sequence[float], patch_size: Sequence[int], spacing_mm: Sequence[float]) -> list[float]:
    """Return the length of a scan in patches along every axis.

    Args:
        scan_mm: Size of the scan in mm.
        patch_size: Size of the patch in voxels.
        spacing_mm: Spacing of the patch in mm.
    """
    return [mm / (n * step) for mm, n, step in zip(scan_mm, patch_size, spacing_mm, strict=True)]


def in_words(count: float) -> str:
    """Return a count with two significant digits, as ``130 million``, ``2.1 million`` or ``64,000``.

    Args:
        count: Whole number of at least 0, for example of parameters or voxels.
    """
    rounded = _two_digits(count)
    for name, magnitude in MAGNITUDES:
        if rounded >= magnitude:
            return f"{_without_exponent(rounded / magnitude)} {name}"
    return f"{rounded:,.0f}"


def in_bytes(size: float) -> str:
    """Return a size in memory with two significant digits, as ``7.3 MB`` or ``1.6 GB``; 1 kB is 1,000 bytes.

    Args:
        size: Number of bytes, at least 0.
    """
    rounded = _two_digits(size)
    for unit, magnitude in UNITS_OF_MEMORY:
        if rounded >= magnitude:
            return f"{_without_exponent(rounded / magnitude)} {unit}"
    return f"{rounded:.0f} bytes"


def in_time(seconds: float) -> str:
    """Return a duration in its largest unit, as ``40 s``, ``12 min``, ``3.5 h`` or ``70 days``."""
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{_without_exponent(float(f'{seconds / size:.2g}'))} {unit}"
    return f"{seconds:.2g} s"


def _two_digits(value: float) -> float:
    # rounding comes first, so that 999.9 million is written as 1 billion
    return float(f"{value:.1e}")


def _without_exponent(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")
