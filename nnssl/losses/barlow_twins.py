"""Barlow Twins over embeddings of points, the loss of Pix2Rep v2.

Source: Zbontar et al., Barlow Twins, ICML 2021, equations 1 and 2; Seince et al., Pix2Rep, MIDL 2024.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl.distributed import gather_with_gradient, standardise_over_ranks


def barlow_twins(
    first: Float[Tensor, "pairs d"], second: Float[Tensor, "pairs d"], off_diagonal_weight: float
) -> Float[Tensor, ""]:
    """Return ``sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2`` for the correlation ``C`` of the two sides' dimensions.

    Dimensions are standardised over the pairs of all processes. Constant embeddings cost ``d``.

    Source: Barlow Twins, ICML 2021, equations 1 and 2.
    Deviations: none.

    Args:
        first: Embeddings of one side of the pairs.
        second: Embeddings of the other side; every process must have the same number of pairs.
        off_diagonal_weight: Weight ``w`` of the redundancy, at least 0.

    Returns:
        Loss of all pairs in float32, also under mixed precision; the same on every process.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = standardise_over_ranks(first.float()).T @ standardise_over_ranks(second.float()) / len(first)
        correlation = gather_with_gradient(own[None]).mean(dim=0)  # (d, d)
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal
