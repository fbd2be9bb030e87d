"""InfoNCE over embeddings of whole patches: against a queue of earlier keys, or against the batch.

Source: He et al., Momentum Contrast (MoCo), CVPR 2020, equation 1; Yan et al., RepRec, WACV 2023, section 4.1.

Deviations:
    * RepRec prints ``-log exp(q.p / t) / sum_{i=1..B} exp(q.i / t)``, whose sum runs over the batch with the query
      itself in it and without the positive. Both functions here have the positive in the denominator, as in MoCo's
      equation 1, and no self-similarity. Equal embeddings cost ``log(1 + K)`` with K keys, ``log B`` in a batch of B.
    * RepRec's text follows MoCo's queue while its formula has negatives from the batch; both forms exist here.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.distributed import rank

Negatives = Literal["batch", "queue", "both"]
"""Whose keys: the other ones of the batch, the queue's earlier ones, or both."""


def momentum_contrast(
    queries: Float[Tensor, "batch d"],
    keys: Float[Tensor, "batch d"],
    all_keys: Float[Tensor, "keys d"],
    queue: Float[Tensor, "queue d"] | None,
    negatives: Negatives,
    temperature: float,
) -> Float[Tensor, ""]:
    """Return InfoNCE of queries against their keys and the negatives that are asked for.

    Args:
        queries: embeddings of unit norm.
        keys: the positive of each query, of unit norm.
        all_keys: those of all processes, in the order of ranks.
        queue: earlier keys; of no use to ``batch``.
        negatives: ``batch``: the other keys of the batch; ``queue``: earlier ones; ``both``.
        temperature: above 0.

    Returns:
        The mean over the queries in float32, also under mixed precision.
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
        queries: embeddings of unit norm; the gradient flows into these only.
        keys: the positive of each query, of unit norm.
        queue: negatives n_j, of unit norm.
        temperature: t, above 0.

    Returns:
        The loss in float32, also under mixed precision.
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
    """Return InfoNCE where the negatives of a query are the other keys of the batch.

    Source: RepRec, WACV 2023, section 4.1.
    Deviations: the printed sum holds the query itself; here it holds the positive key instead.

    Args:
        queries: embeddings of unit norm.
        keys: embeddings of unit norm; may be those of all processes. The gradient flows into keys that carry one.
        temperature: above 0.
        first_row: row of ``keys`` that is the positive of the first query; the others follow in order.

    Returns:
        The mean over the queries in float32, also under mixed precision.

    Raises:
        ValueError: there is no key for some query.
    """
    if first_row < 0 or first_row + len(queries) > len(keys):
        raise ValueError(f"rows {first_row} to {first_row + len(queries) - 1} are not all among the {len(keys)} keys")
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
    """Return InfoNCE of every query against negatives of its own.

    Source: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings, TMI 2022, equation 2.
    Deviations: none.

    Args:
        queries: embeddings of unit norm.
        positives: one for each query, of unit norm.
        negatives: of unit norm. The gradient flows into all three.
        present: negatives that count.
        temperature: above 0.

    Returns:
        The loss of each query in float32, also under mixed precision; 0 for one without negatives.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        positive = (queries * positives.float()).sum(dim=1, keepdim=True)
        negative = (negatives.float() @ queries[:, :, None])[..., 0].masked_fill(~present, -torch.inf * temperature)
        logits = torch.cat([positive, negative], dim=1) / temperature
        return logits.logsumexp(dim=1) - logits[:, 0]
