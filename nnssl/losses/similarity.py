"""Distance between the directions of vectors."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cosine_distance(first: Float[Tensor, "*rows d"], second: Float[Tensor, "*rows d"]) -> Float[Tensor, " *rows"]:
    """Return ``2 - 2 cos`` of each pair of rows, 0 to 4, in float32, also under mixed precision.

    Source: BYOL, NeurIPS 2020, equation 2; Alice, ICCV 2023.
    Deviations: none.

    Args:
        first: Vectors of any scale.
        second: Vectors of any scale, which receive no gradient.
    """
    with torch.autocast(first.device.type, enabled=False):
        return 2 - 2 * (F.normalize(first.float(), dim=-1) * F.normalize(second.detach().float(), dim=-1)).sum(dim=-1)
