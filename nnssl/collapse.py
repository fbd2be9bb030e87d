"""Signs that a representation has collapsed.

Some losses cannot show it: a cosine loss is 0, its best value, for constant embeddings.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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

    ``1 / sample`` when all embeddings are equal.

    Args:
        a: embeddings in one view.
        b: embeddings of the same voxels or patches in another view, in the same order.
    """
    with torch.autocast(a.device.type, enabled=False):
        similarity = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
    nearest = similarity.argmax(dim=1)
    return (nearest == torch.arange(len(a), device=a.device)).float().mean()
