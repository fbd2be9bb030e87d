"""Choice of the negatives of a contrastive loss: hard ones, and different ones in every step."""

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
    """Draw the negatives of each query among the candidates that are most similar to it.

    Source: Yan et al., SAM, TMI 2022, section III-B (hard and diverse negatives).
    Deviations: candidates that are not allowed rank below all others. The authors' code gives them a similarity of 0, so that
    they may outrank true negatives.

    Args:
        ranking: Similarity of each candidate to the query.
        allowed: Whether the candidate may be a negative of the query.
        pool: Number of hardest candidates from which negatives are drawn.
        count: Number of negatives per query.
        generator: Generator on the device of the ranking.

    Returns:
        Indices of candidates, without repetition, and whether they are allowed: all are, unless a query has fewer than
        ``count``. There are no more columns than candidates.
    """
    pool = min(pool, ranking.shape[1])
    values, hardest = ranking.float().masked_fill(~allowed, -torch.inf).topk(pool, dim=1, sorted=False)
    drawn = torch.rand(values.shape, generator=generator, device=values.device)
    # Random numbers lie below 1, so candidates that are not allowed come last.
    chosen = drawn.masked_fill_(values == -torch.inf, 2.0).topk(min(count, pool), dim=1, largest=False).indices
    return hardest.gather(1, chosen), values.gather(1, chosen) > -torch.inf
