"""Cross-entropy between what a teacher and a student say of the same thing, and what is done to it voxel by voxel.

Source: "Pixel-global self-supervised learning with uncertainty-aware context stabilizer" (2022), equations 4 to 6; the
cross-entropy between softmaxes of different temperature is DINO's (Caron et al., ICCV 2021).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnssl.distributed import mean_over_ranks

Stabilizer = Literal["none", "literal", "signed_detached", "added"]


def distillation_cross_entropy(
    target: Float[Tensor, "*rows d"], logits: Float[Tensor, "*rows d"]
) -> Float[Tensor, " *rows"]:
    """Return ``-sum_d target_d log softmax(logits)_d`` for every row, in float32.

    Source: equation 4 without its sum.

    Args:
        target: probabilities of the teacher; no gradient goes there.
        logits: of the student, divided by its temperature.
    """
    return -(target.detach().float() * logits.float().log_softmax(dim=-1)).sum(dim=-1)


def normalised_entropy(probabilities: Float[Tensor, "*rows d"]) -> Float[Tensor, " *rows"]:
    """Return the entropy of every row divided by its largest value ``log d``: 0 for one certain class, 1 for no idea.

    Source: section on uncertainty; the division brings it into [0, 1], which the weight ``1 - U`` needs.
    """
    values = probabilities.float()
    return -torch.special.xlogy(values, values).sum(dim=-1) / math.log(probabilities.shape[-1])


def stabilise(
    cross_entropy: Float[Tensor, "batch points"], partner: Int[Tensor, " batch"], kind: Stabilizer, share: float
) -> Float[Tensor, "batch points"]:
    """Return what each point costs once the same point of another image is compared with it.

    Source: equation 6, ``|CE_i - CE_i^delta|``, where ``CE^delta`` is that of another image under the same changes.

    Args:
        cross_entropy: of all images, at points that are the same for an image and its partner.
        partner: of each image the other one.
        kind: ``none``: equation 4, the cross-entropy itself; ``literal``: equation 6; ``signed_detached``:
            ``CE - CE^delta`` without a gradient through the second, whose gradient is that of ``none``; ``added``:
            ``CE + share |CE - CE^delta|``, which keeps the reason to agree.
        share: weight of the difference in ``added``.
    """
    if kind == "none":
        return cross_entropy
    other = cross_entropy[partner]
    if kind == "signed_detached":
        return cross_entropy - other.detach()
    difference = (cross_entropy - other).abs()
    return difference if kind == "literal" else cross_entropy + share * difference


def weighted_mean(values: Float[Tensor, "batch points"], weights: Float[Tensor, "batch points"]) -> Float[Tensor, ""]:
    """Return the mean of the values with weights; 0 where all weights are 0.

    On several processes the weights of all of them count, so that the mean of the results over the processes is the weighted
    mean over all points.

    Deviations: the paper sums over points, which would make the balance with the global loss a matter of patch size.
    """
    total = mean_over_ranks(weights.detach().sum())
    return (values * weights).sum() / total.clamp_min(torch.finfo(weights.dtype).tiny)
