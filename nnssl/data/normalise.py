"""Normalisation of intensities with nnU-Net's schemes, which compute in float32, also of extreme intensities.

Source: nnU-Net's ``ImageNormalization`` classes (Isensee et al., Nature Methods 2021).
Deviations: A channel whose squares would leave the range of float32 is first divided by a power of two, and one whose contrast is
small against its offset is first shifted, where neither changes the result of the scheme. A channel that is not finite
afterwards, or in which all voxels are alike, is an error.
"""

import numpy as np
from jaxtyping import Float32, Int

from nnssl.data.body import scale_by_power_of_two, spread_sample
from nnssl.data.recipe import Recipe
from nnssl.errors import UserError

SCALE_FREE = ("ZScoreNormalization", "RescaleTo01Normalization")
"""nnU-Net's schemes whose result does not depend on a factor of the intensities, which nnU-Net computes in float32."""
FLAT = 1e-2
"""Contrast as a fraction of the median, below which nnU-Net's mean in float32 is too inexact for standardisation."""
LEAST_CONTRAST = 1e-3
"""Smallest difference of normalised voxels that a network can use; standardised voxels differ by 1."""


def normalise(
    volume: Float32[np.ndarray, "channel z y x"], nonzero: Int[np.ndarray, "z y x"] | None, recipe: Recipe
) -> None:
    """Normalise each channel in place with the plan's scheme.

    Args:
        volume: Finite intensities (channel, z, y, x).
        nonzero: nnU-Net's mask, -1 outside; None if no channel is normalised inside it.
        recipe: Preprocessing recipe.

    Raises:
        ValueError: If a channel is not finite afterwards, or its voxels are all alike.
        UserError: If nnU-Net has no such scheme.
    """
    import nnunetv2.preprocessing.normalization
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    package = nnunetv2.preprocessing.normalization
    for channel, scheme in enumerate(recipe.normalization_schemes):
        cls = recursive_find_python_class(str(package.__path__[0]), scheme, package.__name__)
        if cls is None:
            raise UserError(f"nnU-Net has no normalisation scheme {scheme}; fix normalization_schemes in the plan")
        low, middle, high = np.percentile(spread_sample(volume[channel]).astype(np.float64), (0.5, 50, 99.5))
        if scheme in SCALE_FREE:
            volume[channel] = scale_by_power_of_two(volume[channel : channel + 1], largest_only=True)[0]
        if (
            scheme == "ZScoreNormalization"
            and not recipe.use_mask_for_norm[channel]
            and 0 < high - low < FLAT * abs(middle)
        ):
            # the same result but for rounding; the difference of two close numbers is exact
            volume[channel] -= np.median(spread_sample(volume[channel]))
        normalization = cls(
            use_mask_for_norm=recipe.use_mask_for_norm[channel],
            intensityproperties=recipe.intensity_statistics[channel],
        )
        volume[channel] = normalization.run(volume[channel], nonzero)
        _check_normalised(volume[channel], high > low, f"channel {channel} after {scheme}")


def _check_normalised(values: Float32[np.ndarray, "z y x"], had_contrast: bool, what: str) -> None:
    """Check that normalisation has left something to learn from.

    Args:
        values: Normalised intensities of a channel.
        had_contrast: Whether the percentiles 0.5 and 99.5 differed before. If not, as in an image with few voxels that are not 0,
            the extremes decide.
        what: Channel and scheme, for the message.

    Raises:
        ValueError: If values are not finite, or are all alike.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError(f"{what} has voxels that are not finite; correct its intensities")
    if had_contrast:
        low, high = np.percentile(spread_sample(values).astype(np.float64), (0.5, 99.5))
    if high - low < LEAST_CONTRAST:
        raise ValueError(
            f"{what} has voxels that are all alike: nearly all lie within {high - low:.2g}; correct intensities that are far "
            "from the others, or their unit"
        )
