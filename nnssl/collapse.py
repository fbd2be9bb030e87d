"""Measures that show whether a representation has collapsed.

Some losses do not show a collapse: a cosine loss is 0, its best value, for constant embeddings.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

COLLAPSED_RANK = 1.5
"""Effective rank below which a representation counts as collapsed."""
COLLAPSED_SPREAD = 0.05
"""Value of ``feature_std`` below which a representation counts as collapsed, as a share of its value for directions that
spread over the sphere."""
FEWEST_EMBEDDINGS = 32
"""Number of embeddings from which on a collapse is judged. The effective rank of n embeddings is at most n - 1, so two healthy
embeddings look collapsed, while 32 that spread have a rank far above ``COLLAPSED_RANK``, even if half of them are second views
of the same images."""
FEWEST_STEPS = 100
"""Number of optimizer steps at the full learning rate from which on a collapse is judged. A random network gives almost the same
direction to all images. AdamW moves a weight by about the learning rate per step, so 100 steps at 1e-3 can move it by 0.1, which
is more than the standard deviation of the initial weights (0.05 for a 3 x 3 x 3 convolution with 32 inputs)."""


def is_judged(embeddings: int, steps: float) -> bool:
    """Return whether the embeddings of a run are enough, and late enough, to tell a collapse from the start of a run.

    Args:
        embeddings: Number of embeddings that are measured.
        steps: Optimizer steps since the beginning of the stage, where a step at half the largest learning rate counts as half a
            step.
    """
    return embeddings >= FEWEST_EMBEDDINGS and steps >= FEWEST_STEPS


def collapse_warning(std: float, rank: float, dimensions: int) -> str | None:
    """Return a warning if embeddings have collapsed, else None.

    Args:
        std: ``feature_std`` of the embeddings.
        rank: ``effective_rank`` of the embeddings.
        dimensions: Number of dimensions of an embedding.
    """
    if rank >= COLLAPSED_RANK and std * math.sqrt(dimensions) >= COLLAPSED_SPREAD:
        return None
    return (
        f"WARNING: effective rank {rank:.2f}, standard deviation {std:.2g}: all embeddings point in the same "
        "direction, so the representation has collapsed; try a lower learning rate or a larger batch"
    )


@torch.no_grad()
def feature_std(embeddings: Float[Tensor, "sample d"]) -> Float[Tensor, ""]:
    """Return the standard deviation of the embeddings' directions over the samples, averaged over the dimensions.

    It is about ``1 / sqrt(d)`` if directions spread over the sphere, and 0 if all are equal.
    Source: Chen and He, SimSiam, CVPR 2021, section 4.1.
    """
    return F.normalize(embeddings.float(), dim=1).std(dim=0, unbiased=False).mean()


@torch.no_grad()
def effective_rank(embeddings: Float[Tensor, "sample d"]) -> Float[Tensor, ""]:
    """Return ``exp(H(s / sum(s)))``, where s are the singular values of the centred embeddings and H is the entropy.

    It lies between 1 (all embeddings on one line) and ``min(sample - 1, d)``, and is 0 if all embeddings are equal.
    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    embeddings = embeddings.float()
    values = torch.linalg.svdvals(embeddings - embeddings.mean(dim=0))
    # Rounding makes equal embeddings differ by one ulp. Without this floor, that noise would count as full rank.
    values = torch.where(values > 1e-6 * embeddings.norm(), values, 0.0)
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(values.sum() > 0, torch.special.entr(share).sum().exp(), 0.0)


@torch.no_grad()
def retrieval_top1(
    a: Float[Tensor, "sample d"], b: Float[Tensor, "sample d"], valid: Bool[Tensor, " sample"] | None = None
) -> Float[Tensor, ""]:
    """Return the share of rows of ``a`` whose nearest row of ``b`` by cosine has the same index.

    It is ``1 / sample`` if all embeddings are equal, and 0 if there are none.

    Args:
        a: Embeddings in one view.
        b: Embeddings of the same voxels or patches in another view, in the same order.
        valid: Rows to include; the others are neither queries nor candidates. None for all.
    """
    if not len(a):
        return torch.zeros((), device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        similarity = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
    if valid is None:
        valid = torch.ones(len(a), dtype=torch.bool, device=a.device)
    nearest = similarity.masked_fill(~valid, -torch.inf).argmax(dim=1)
    found = (nearest == torch.arange(len(a), device=a.device)) & valid
    return found.sum() / valid.sum().clamp_min(1)
