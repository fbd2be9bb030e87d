"""NT-Xent over pairs of embeddings, the contrast of SimCLR and Pix2Rep v1.

Source: Seince et al., Pix2Rep, MIDL 2024, section 3.4 of the method's description; Chen et al., SimCLR, ICML 2020, equation 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nnssl.distributed import gather_with_gradient, rank


def nt_xent(first: Float[Tensor, "pairs d"], second: Float[Tensor, "pairs d"], temperature: float) -> Float[Tensor, ""]:
    """Return the mean over both sides of all pairs of ``-log exp(u_i.u_j/t) / sum_{k != i} exp(u_i.u_k/t)``.

    ``u`` are the normalised embeddings of both sides and of all processes, and ``j`` is the partner of ``i``. With N pairs, each
    embedding has 2N - 2 negatives. Equal embeddings cost ``log(2N - 1)``.

    Source: SimCLR, ICML 2020, equation 1; Pix2Rep, MIDL 2024.
    Deviations: none.

    Args:
        first: Embeddings of one side of the pairs, of any scale.
        second: Embeddings of the other side; every process must have the same number of pairs.
        temperature: Temperature ``t``, above 0.

    Returns:
        Mean over the pairs of this process in float32, also under mixed precision. The mean over processes is the loss of one
        process with all pairs; the same holds for the gradient.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = F.normalize(torch.cat([first.float(), second.float()]), dim=1)  # (2 pairs, d)
        everyone = gather_with_gradient(own)
        logits = (own / temperature) @ everyone.T
        row = torch.arange(len(own), device=own.device)
        start = rank() * len(own)
        logits = logits.scatter_(1, (start + row)[:, None], -torch.inf)
        return F.cross_entropy(logits, start + row.roll(len(first)))
