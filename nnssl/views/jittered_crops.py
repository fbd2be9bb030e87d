"""Two independent views of a patch, each a random crop with a random change of intensity, as contrastive methods use them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.views.intensity import IntensityRange, apply_intensity, draw_intensity
from nnssl.views.spatial import AffineRange, apply_affine, draw_affine


def jittered_crop_pair(
    volumes: Float[Tensor, "batch channel *shape"],
    generators: Sequence[torch.Generator],
    crop: AffineRange,
    changes: IntensityRange,
    spacing_mm: Sequence[float],
) -> tuple[Float[Tensor, "batch channel *shape"], Float[Tensor, "batch channel *shape"]]:
    """Return two views of each patch: random crops, zoomed to the patch's size and then changed in intensity.

    Args:
        volumes: Patches.
        generators: One generator per sample; the first view draws first.
        crop: Range of crops, rotations and flips.
        changes: Range of the intensity changes.
        spacing_mm: Spacing of the patches along each axis.
    """

    def view() -> Tensor:
        params = draw_affine(generators, crop, volumes.shape[2:], spacing_mm)
        intensity = draw_intensity(generators, changes, volumes.shape[1])
        return apply_intensity(apply_affine(volumes, params), intensity)

    return view(), view()
