"""InfoNCE with negatives from a queue of earlier keys, from the batch, or of each query's own.

Source: He et al., Momentum Contrast (MoCo), CVPR 2020, equation 1; Yan et al., RepRec, WACV 2023, section 4.1.

Deviations:
    * RepRec prints ``-log exp(q.p / t) / sum_{i=1..B} exp(q.i / t)``, whose sum over the batch includes the query itself but
      not the positive. Here the denominator includes the positive, as in MoCo's equation 1, and no self-similarity. Equal
      embeddings cost ``log(1 + K)`` with a queue of K keys, ``log B`` in a batch of B.
    * RepRec's text follows MoCo's queue, while its formula takes negatives from the batch. Both forms exist here.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.distributed import rank

Negatives = Literal["batch", "queue", "both"]
"""Source of the negatives: the other keys of the batch, the earlier keys of the queue, or both."""


def momentum_contrast(
    queries: Float[Tensor, "batch d"],
    keys: Float[Tensor, "batch d"],
    all_keys: Float[Tensor, "keys d"],
    queue: Float[Tensor, "queue d"] | None,
    negatives: Negatives,
    temperature: float,
) -> Float[Tensor, ""]:
    """Return InfoNCE of queries against their keys, with negatives from the chosen source.

    Args:
        queries: Embeddings of unit norm.
        keys: Positive of each query, of unit norm.
        all_keys: Keys of all processes, in the order of ranks.
        queue: Earlier keys; not used with ``batch``, where it may be None.
        negatives: Source of the negatives: the other keys of the batch (``batch``), earlier keys (``queue``), or ``both``.
        temperature: Temperature, above 0.

    Returns:
        Mean over the queries in float32, also under mixed precision.
    """
    if negatives == "batch":
        return info_nce_in_batch(queries, all_keys, temperature, first_row=rank() * len(queries))
    assert queue is not None
    if negatives == "queue":
        return info_nce_with_queue(queries, keys, queue, temperature)
    return info_nce_in_batch(queries, torch.cat([all_keys, queue]), temperature, first_row=rank() * len(queries))


def info_nce_with_queue(
    queries: Float[Tensor, "batch d"],
    keys: Float[Tensor, "batch d"],
    queue: Float[Tensor, "queue d"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the mean over the batch of ``-log exp(q.k/t) / (exp(q.k/t) + sum_j exp(q.n_j/t))``.

    Source: MoCo, CVPR 2020, equation 1.
    Deviations: none.

    Args:
        queries: Embeddings of unit norm; only these receive a gradient.
        keys: Positive of each query, of unit norm.
        queue: Negatives ``n_j``, of unit norm.
        temperature: Temperature ``t``, above 0.

    Returns:
        Loss in float32, also under mixed precision.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        positive = (queries * keys.detach().float()).sum(dim=1, keepdim=True)  # (batch, 1)
        negative = queries @ queue.detach().float().T  # (batch, queue)
        logits = torch.cat([positive, negative], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def info_nce_in_batch(
    queries: Float[Tensor, "batch d"],
    keys: Float[Tensor, "keys d"],
    temperature: float,
    first_row: int = 0,
) -> Float[Tensor, ""]:
    """Return InfoNCE with the other keys of the batch as negatives of each query.

    Source: RepRec, WACV 2023, section 4.1.
    Deviations: the printed sum includes the query itself; here it includes the positive key instead.

    Args:
        queries: Embeddings of unit norm.
        keys: Embeddings of unit norm, possibly those of all processes. Keys that require a gradient receive one.
        temperature: Temperature, above 0.
        first_row: Row of ``keys`` with the positive of the first query; those of the other queries follow in order.

    Returns:
        Mean over the queries in float32, also under mixed precision.

    Raises:
        ValueError: If a query has no key.
    """
    if first_row < 0 or first_row + len(queries) > len(keys):
        last_row = first_row + len(queries) - 1
        raise ValueError(f"keys must contain rows {first_row} to {last_row} as positives, got {len(keys)} keys")
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries.float() @ keys.float().T / temperature  # (batch, keys)
        return F.cross_entropy(logits, first_row + torch.arange(len(queries), device=logits.device))


def info_nce_with_negatives(
    queries: Float[Tensor, "query d"],
    positives: Float[Tensor, "query d"],
    negatives: Float[Tensor, "query negative d"],
    present: Bool[Tensor, "query negative"],
    temperature: float,
) -> Float[Tensor, " query"]:
    """Return InfoNCE of every query against its own negatives.

    Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings, TMI 2022, equation 2.
    Deviations: none.

    Args:
        queries: Embeddings of unit norm.
        positives: Positive of each query, of unit norm.
        negatives: Negatives of each query, of unit norm. Queries, positives and negatives all receive a gradient.
        present: Whether each negative is included.
        temperature: Temperature, above 0.

    Returns:
        Loss of each query in float32, also under mixed precision; 0 for a query without negatives.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        positive = (queries * positives.float()).sum(dim=1)
        return info_nce_of_similarities(
            positive, (negatives.float() @ queries[:, :, None])[..., 0], present, temperature
        )


def info_nce_of_similarities(
    positive: Float[Tensor, " query"],
    negative: Float[Tensor, "query negative"],
    present: Bool[Tensor, "query negative"],
    temperature: float,
) -> Float[Tensor, " query"]:
    """Return ``-log exp(p/t) / (exp(p/t) + sum_j exp(n_j/t))`` of every query.

    Source: as ``info_nce_with_negatives``.
    Deviations: none.

    Args:
        positive: Similarity ``p`` of each query to its positive, in float32.
        negative: Similarities ``n_j`` to its negatives, in float32.
        present: Whether each negative is included.
        temperature: Temperature ``t``, above 0.

    Returns:
        Loss of each query; 0 for a query without negatives.
    """
    logits = torch.cat([positive[:, None], negative.masked_fill(~present, -torch.inf)], dim=1) / temperature
    return logits.logsumexp(dim=1) - logits[:, 0]
