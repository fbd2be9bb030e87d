"""Sizes as text: one form for voxels, one for lengths."""

from collections.abc import Iterable


def in_voxels(sizes: Iterable[float]) -> str:
    """Return numbers of voxels, tokens or strides per axis in the form ``4x8x8``."""
    return "x".join(str(int(size)) for size in sizes)


def in_mm(lengths: Iterable[float]) -> str:
    """Return lengths per axis in the form ``2.5 x 1 x 1``."""
    return " x ".join(f"{float(length):.4g}" for length in lengths)
