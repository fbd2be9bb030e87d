"""Standardisation of vectors over the batch and, if it is small, over the vectors of the steps before.

Source: Ioffe and Szegedy, Batch normalization, ICML 2015. Projection heads of contrastive methods normalise over the batch
before their last layer (SimCLR, MoCo v3, BYOL), and PCRL's and RepRec's queues collapse without it.

Deviations: statistics are those of the batch of all processes, so that nothing tells a process's queries from those of others
(MoCo shuffles instead); below ``MEMORY`` vectors, vectors of earlier steps complete the sample. There is no scale and shift,
since a linear layer follows.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.distributed import gather_with_gradient

MEMORY = 16
"""Number of vectors that the statistics cover if the batch has fewer. More do harm: with a memory of 256 beside a batch of 16,
the encoder of RepRec found less after 300 steps than with the batch alone, as earlier vectors are those of another encoder."""
EPSILON = 1e-10
"""Added to the variance. Pooled features of different images differ by some thousandths, so it must be small."""


class RecentStatistics(nn.Module):
    """Standardises rows over the batch of all processes and the most recent rows before it.

    In training, the rows of a call are remembered for the next ones. The statistics have a gradient through the batch only.

    Args:
        dimensions: Number of dimensions of a row.
        batch_size: Number of rows of a call over all processes.
    """

    keeps_own_buffers = True
    """A teacher remembers its own rows, not its student's (``nnssl.momentum``)."""
    memory: Tensor
    known: Tensor
    pointer: Tensor

    def __init__(self, dimensions: int, batch_size: int) -> None:
        super().__init__()
        length = max(0, MEMORY - batch_size)
        self.register_buffer("memory", torch.zeros(length, dimensions))
        self.register_buffer("known", torch.zeros(length))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, rows: Float[Tensor, "row dimension"]) -> Float[Tensor, "row dimension"]:
        """Return standardised rows in float32."""
        with torch.autocast(rows.device.type, enabled=False):
            everywhere = gather_with_gradient(rows.float())
            weights = torch.cat([torch.ones_like(everywhere[:, 0]), self.known])[:, None]
            sample = torch.cat([everywhere, self.memory.clone()])
            total = weights.sum()
            mean = (weights * sample).sum(dim=0) / total
            variance = (weights * (sample - mean).square()).sum(dim=0) / total
            standardised = (rows.float() - mean) / (variance + EPSILON).sqrt()
        if self.training:
            self._remember(everywhere.detach())
        return standardised

    @torch.no_grad()
    def _remember(self, rows: Tensor) -> None:
        length = len(self.memory)
        if length:
            kept = rows[-length:]
            places = (self.pointer + torch.arange(len(kept), device=rows.device)) % length
            self.memory[places] = kept
            self.known[places] = 1.0
            self.pointer.copy_((self.pointer + len(kept)) % length)
