"""Classification of points among the prototypes of regions, with cross-entropy and Dice.

Source: after Gao et al., Learning Generalizable 3D Medical Image Representations from Mask-Guided Self-Supervision (MASS), CVPR
2026, where a mask of the reference view is segmented in the query view; prototypes as in Snell et al., Prototypical Networks,
NeurIPS 2017.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl.distributed import gather, gather_with_gradient, rank


class PrototypeLoss(NamedTuple):
    """Losses of a batch and the share of points that are assigned correctly, as means over its images."""

    cross_entropy: Float[Tensor, ""]
    dice: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def prototypes_of(
    embeddings: Float[Tensor, "batch points d"], regions: Int[Tensor, "batch points"], count: int
) -> Float[Tensor, "batch {count} d"]:
    """Return the mean embedding of the points of each region, of unit length; 0 for a region without points.

    Args:
        embeddings: Embeddings of the reference points.
        regions: Region of each point within its image; -1 for none.
        count: Number of regions of an image.
    """
    places = torch.where(regions >= 0, regions, count)[..., None].expand(-1, -1, embeddings.shape[2])
    total = embeddings.new_zeros(len(embeddings), count + 1, embeddings.shape[2]).scatter_add(1, places, embeddings)
    return F.normalize(total[:, :count], dim=2)  # the length of a sum and of a mean is the same after normalisation


def prototype_loss(
    queries: Float[Tensor, "batch points d"],
    regions: Int[Tensor, "batch points"],
    prototypes: Float[Tensor, "batch regions d"],
    used: Bool[Tensor, "batch regions"],
    temperature: float,
) -> PrototypeLoss:
    """Classify the query points of each image among the prototypes of all images of all processes.

    With ``p`` the softmax of the cosine similarities over the temperature, and ``y`` the region of a point::

        cross-entropy = - mean over points of log p_y
        Dice = 1 - mean over regions of (2 sum p_r [y = r]) / (sum p_r + sum [y = r])

    The Dice of a region counts the points of its own image. Points without a region and regions without points are left out. All
    means are taken within an image first; an image without points counts as 0.

    Args:
        queries: Embeddings of the query points, of any length.
        regions: Region of each point within its image; -1 for none.
        prototypes: Prototypes of the regions of each image, of unit length.
        used: Whether the region exists.
        temperature: Divisor of the similarities.
    """
    batch, count = used.shape
    candidates, exist = gather_with_gradient(prototypes).flatten(0, 1), gather(used).flatten()
    with torch.autocast(
        queries.device.type, enabled=False
    ):  # a low temperature enlarges the rounding of half precision
        logits = F.normalize(queries.float(), dim=2) @ candidates.float().T / temperature
    chances = logits.masked_fill(~exist, torch.finfo(logits.dtype).min).log_softmax(dim=2)
    own = rank() * batch + torch.arange(batch, device=regions.device)
    valid = regions >= 0
    target = own[:, None] * count + regions.clamp_min(0)
    points = valid.sum(dim=1)
    entropy = -(chances.gather(2, target[..., None])[..., 0] * valid).sum(dim=1) / points.clamp_min(1)
    right = ((chances.argmax(dim=2) == target) & valid).sum(dim=1) / points.clamp_min(1)
    shares = chances.exp().unflatten(2, (-1, count))
    within = shares[torch.arange(batch, device=regions.device), :, own] * valid[..., None]
    # not one_hot, which reads the largest region and so waits for the device
    wanted = (regions[..., None] == torch.arange(count, device=regions.device)) & valid[..., None]
    hits, sizes = (within * wanted).sum(dim=1), wanted.sum(dim=1)
    dice = 2 * hits / (within.sum(dim=1) + sizes).clamp_min(1e-6)
    present = sizes > 0
    lost = ((1 - dice) * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)
    return PrototypeLoss(entropy.mean(), lost.mean(), right.mean().detach())
