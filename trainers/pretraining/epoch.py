"""Values recorded during an epoch and their summary at its end; a checkpoint within the epoch stores them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnssl.collapse import collapse_warning, effective_rank, feature_std, is_judged
from nnssl.distributed import mean_over_ranks

EMBEDDINGS_KEPT = 1024
"""Number of embeddings, from an epoch's last steps, that the collapse monitors use."""


class Epoch:
    """Records of the current epoch.

    Attributes:
        records: Scalars by name, one dictionary for each step.
        embeddings: Embeddings of the last steps, each (sample, d), float32.
    """

    def __init__(self, records: Sequence[dict[str, Any]] = (), embeddings: Sequence[Tensor] = ()) -> None:
        self.records = list(records)
        self.embeddings = list(embeddings)

    def keep(self, embeddings: Tensor) -> None:
        """Add the embeddings of a step, and drop the oldest steps once the others hold ``EMBEDDINGS_KEPT`` embeddings."""
        self.embeddings.append(embeddings.detach().float())
        while sum(map(len, self.embeddings[1:])) >= EMBEDDINGS_KEPT:
            self.embeddings.pop(0)

    def collapse(self, steps: float) -> tuple[dict[str, float], str | None]:
        """Return the collapse monitors by name, and a warning if they indicate a collapse; neither without embeddings.

        Args:
            steps: Optimizer steps so far, counted as in ``nnssl.collapse.is_judged``; there is no warning after too few.
        """
        if not self.embeddings:
            return {}, None
        embeddings = torch.cat(self.embeddings)
        spread, rank = float(feature_std(embeddings)), float(effective_rank(embeddings))
        judged = is_judged(len(embeddings), steps)
        warning = collapse_warning(spread, rank, embeddings.shape[1]) if judged else None
        return {"head_std": spread, "head_rank": rank}, warning


def mean_of_steps(records: Sequence[dict[str, Any]], batch_size: int, device: torch.device) -> dict[str, float]:
    """Return the means over steps and processes, and the speed of the epoch.

    Args:
        records: Scalars by name for each step, among them its duration ``seconds`` and ``seconds_waiting``, the part of it
            spent waiting for patches.
        batch_size: Patches per step over all processes.
        device: Device of the process group.
    """
    values = {}
    for key in records[0]:
        own = torch.stack([torch.as_tensor(record[key]).float().cpu() for record in records]).mean()
        values[key] = float(mean_over_ranks(own.to(device)))
    seconds = values.pop("seconds")
    values["data_wait_share"] = values.pop("seconds_waiting") / seconds
    values["patches_per_second"] = batch_size / seconds
    return values
