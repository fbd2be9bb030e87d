"""Signs that a representation has collapsed.

Some losses cannot show it: a cosine loss is 0, its best value, for constant embeddings.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

COLLAPSED_RANK = 1.5
"""Effective rank below which a representation counts as collapsed."""
COLLAPSED_SPREAD = 0.05
"""The same for ``feature_std``, as a share of its value for directions that spread over the sphere."""


def collapse_warning(std: float, rank: float, dimensions: int) -> str | None:
    """Return a warning about embeddings that have collapsed, None for others.

    Args:
        std: ``feature_std`` of the embeddings.
        rank: their ``effective_rank``.
        dimensions: of an embedding.
    """
    if rank >= COLLAPSED_RANK and std * math.sqrt(dimensions) >= COLLAPSED_SPREAD:
        return None
    return (
        f"WARNING: effective rank {rank:.2f}, standard deviation {std:.2g}: all embeddings point the same way, the "
        "representation has collapsed; try a lower learning rate or a larger batch"
    )


@torch.no_grad()
def feature_std(embeddings: Float[Tensor, "sample d"]) -> Float[Tensor, ""]:
    """Return the standard deviation of the embeddings' directions over the samples, averaged over the dimensions.

    About ``1 / sqrt(d)`` when directions spread over the sphere, 0 when all are equal.
    Source: Chen and He, SimSiam, CVPR 2021, section 4.1.
    """
    return F.normalize(embeddings.float(), dim=1).std(dim=0, unbiased=False).mean()


@torch.no_grad()
def effective_rank(embeddings: Float[Tensor, "sample d"]) -> Float[Tensor, ""]:
    """Return ``exp(H(s / sum(s)))``, s the singular values of the centred embeddings and H the entropy.

    Between 1 (all on one line) and ``min(sample - 1, d)``; 0 when all embeddings are equal.
    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    embeddings = embeddings.float()
    values = torch.linalg.svdvals(embeddings - embeddings.mean(dim=0))
    # rounding leaves equal embeddings unequal by an ulp; without a floor that noise would count as full rank
    values = torch.where(values > 1e-6 * embeddings.norm(), values, 0.0)
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(values.sum() > 0, torch.special.entr(share).sum().exp(), 0.0)


@torch.no_grad()
def retrieval_top1(a: Float[Tensor, "sample d"], b: Float[Tensor, "sample d"]) -> Float[Tensor, ""]:
    """Return the share of rows of ``a`` whose nearest row of ``b`` by cosine is the one at the same place.

    ``1 / sample`` when all embeddings are equal, 0 when there are none.

    Args:
        a: embeddings in one view.
        b: embeddings of the same voxels or patches in another view, in the same order.
    """
    with torch.autocast(a.device.type, enabled=False):
        similarity = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
    if not len(a):
        return torch.zeros((), device=a.device)
    nearest = similarity.argmax(dim=1)
    return (nearest == torch.arange(len(a), device=a.device)).float().mean()
