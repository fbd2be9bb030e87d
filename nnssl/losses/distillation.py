"""Cross-entropy between the predictions of a teacher and a student, and its stabilisation and weighting at voxels.

Source: "Pixel-global self-supervised learning with uncertainty-aware context stabilizer" (2022), equations 4 to 6; the
cross-entropy between softmaxes of different temperature is DINO's (Caron et al., ICCV 2021).
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnssl.distributed import mean_over_ranks

Stabilizer = Literal["none", "literal", "signed_detached", "excess", "added"]
"""Kind of context stabilizer; see ``stabilise``."""


def distillation_cross_entropy(
    target: Float[Tensor, "*rows d"], logits: Float[Tensor, "*rows d"]
) -> Float[Tensor, " *rows"]:
    """Return ``-sum_d target_d log softmax(logits)_d`` for every row, in float32.

    Source: equation 4 without its sum over voxels.

    Args:
        target: Probabilities of the teacher, which receive no gradient.
        logits: Logits of the student, divided by its temperature.
    """
    return -(target.detach().float() * logits.float().log_softmax(dim=-1)).sum(dim=-1)


def stabilise(
    cross_entropy: Float[Tensor, "batch points"], partner: Int[Tensor, " batch"], kind: Stabilizer, share: float
) -> Float[Tensor, "batch points"]:
    """Return the loss of each point after comparison with the same point of another image.

    Source: equation 6, ``|CE_i - CE_i^delta|``, where ``CE^delta`` is the cross-entropy of another image under the same changes.

    Args:
        cross_entropy: Cross-entropy of all images, at the same points for an image and its partner.
        partner: Index of the other image of each image.
        kind: ``none``: equation 4, the cross-entropy itself; ``literal``: equation 6; ``signed_detached``: ``CE - CE^delta``
            without a gradient through the second term, which has the gradient of ``none``; ``excess``: this difference where
            it is above 0, so that only the worse of two images is trained; ``added``:
            ``CE + share |CE - CE^delta|``, which keeps the incentive to agree.
        share: Weight of the difference in ``added``.
    """
    if kind == "none":
        return cross_entropy
    other = cross_entropy[partner]
    if kind in ("signed_detached", "excess"):
        signed = cross_entropy - other.detach()
        return signed if kind == "signed_detached" else signed.relu()
    difference = (cross_entropy - other).abs()
    return difference if kind == "literal" else cross_entropy + share * difference


def weighted_mean(values: Float[Tensor, "batch points"], weights: Float[Tensor, "batch points"]) -> Float[Tensor, ""]:
    """Return the weighted mean of the values; 0 if all weights are 0.

    On several processes, the weights are summed over all of them, so that the mean of the results over the processes is the
    weighted mean over all points.

    Deviations: the paper sums over points. The balance with the global loss would then depend on the patch size.
    """
    total = mean_over_ranks(weights.detach().sum())
    return (values * weights).sum() / total.clamp_min(torch.finfo(weights.dtype).tiny)
