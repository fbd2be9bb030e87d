"""NT-Xent over pairs of embeddings of points: the contrast of Pix2Rep v1.

Source: Seince et al., Pix2Rep, MIDL 2024, section 3.4 of the method's description; Chen et al., SimCLR, ICML 2020, equation 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nnssl.distributed import gather_with_gradient, rank


def nt_xent(first: Float[Tensor, "pairs d"], second: Float[Tensor, "pairs d"], temperature: float) -> Float[Tensor, ""]:
    """Return the mean over both sides of all pairs of ``-log exp(u_i.u_j/t) / sum_{k != i} exp(u_i.u_k/t)``.

    ``u`` are the embeddings of both sides and of all processes on the unit sphere, ``j`` is the partner of ``i``; so each
    has 2N - 2 negatives for N pairs. Equal embeddings cost ``log(2N - 1)``.

    Source: SimCLR, ICML 2020, equation 1; Pix2Rep, MIDL 2024.
    Deviations: none.

    Args:
        first: one side of the pairs, of any scale.
        second: the other side; as many on every process.
        temperature: t, above 0.

    Returns:
        The mean over this process's pairs in float32, also under mixed precision. The mean over processes is the loss of one
        process with all pairs, and so is the gradient.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = F.normalize(torch.cat([first.float(), second.float()]), dim=1)  # (2 pairs, d)
        everyone = gather_with_gradient(own)
        logits = own @ everyone.T / temperature
        row = torch.arange(len(own), device=own.device)
        start = rank() * len(own)
        logits = logits.scatter(1, (start + row)[:, None], -torch.inf)
        return F.cross_entropy(logits, start + row.roll(len(first)))
