"""Planner rules for the modality of a channel, which follows from its name."""

import re

CT = "CT"
X_RAY = "X-ray"
X_RAY_WORDS = ("xray", "radiograph", "radiogram", "mammogra")
"""Parts of a channel's name, in lower case and without other characters than letters and digits, that name an X-ray image."""
X_RAY_CODES = ("xr", "cxr", "cr", "dx", "mg", "rg", "xa")
"""Whole names of that kind, mostly DICOM's modalities. They count for single slices only: a volume named Cr can be a map of
creatine."""


def name_modality(channel_name: str, single_slices: bool) -> str:
    """Return ``CT``, ``X-ray``, or for every other modality the channel's name.

    Args:
        channel_name: Name of the channel in the data set.
        single_slices: Whether all images of the data set are single slices.
    """
    if channel_name.casefold() == "ct":  # nnU-Net's rule
        return CT
    plain = re.sub(r"[^a-z0-9]", "", channel_name.casefold())
    if any(word in plain for word in X_RAY_WORDS) or (single_slices and plain in X_RAY_CODES):
        return X_RAY
    return channel_name
