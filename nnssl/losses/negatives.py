"""Which of many candidates a contrastive loss compares a query with: hard ones, and different ones in every step."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@torch.no_grad()
def draw_hard_negatives(
    ranking: Float[Tensor, "query candidate"],
    allowed: Bool[Tensor, "query candidate"],
    pool: int,
    count: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "query negative"], Bool[Tensor, "query negative"]]:
    """Draw negatives of each query among those candidates that are most like it.

    Source: Yan et al., SAM, TMI 2022, section III-B (hard and diverse negatives).
    Deviations: what is not allowed ranks below everything, where the authors' code gives it a similarity of 0, so that it may
    outrank true negatives.

    Args:
        ranking: how much each candidate is like the query.
        allowed: candidates that may be negatives of it.
        pool: hardest candidates that are drawn from.
        count: negatives of a query.
        generator: on the device of the ranking.

    Returns:
        Indices of candidates, without repetition, and which of them are allowed: all, unless a query has fewer than ``count``.
        There are no more columns than candidates.
    """
    pool = min(pool, ranking.shape[1])
    values, hardest = ranking.float().masked_fill(~allowed, -torch.inf).topk(pool, dim=1)
    drawn = torch.rand(values.shape, generator=generator, device=values.device)
    # random numbers lie below 1, so what is not allowed comes last
    chosen = drawn.masked_fill(values == -torch.inf, 2.0).argsort(dim=1)[:, : min(count, pool)]
    return hardest.gather(1, chosen), values.gather(1, chosen) > -torch.inf
