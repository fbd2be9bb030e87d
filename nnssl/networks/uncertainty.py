"""Uncertainty of a head: the entropy of its mean prediction over passes with dropout.

Source: "Pixel-global self-supervised learning with uncertainty-aware context stabilizer" (2022), section on uncertainty;
Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def normalised_entropy(probabilities: Float[Tensor, "*rows d"]) -> Float[Tensor, " *rows"]:
    """Return the entropy of every row divided by the largest possible value ``log d``: 0 for one-hot, 1 for uniform.

    Source: section on uncertainty. The division limits it to [0, 1], as the weight ``1 - U`` requires.
    """
    values = probabilities.float()
    return -torch.special.xlogy(values, values).sum(dim=-1) / math.log(probabilities.shape[-1])


def point_uncertainty(
    head: nn.Module,
    features: Float[Tensor, "batch points channel"],
    seeds: Sequence[int],
    passes: int,
    temperature: float,
) -> Float[Tensor, "batch points"]:
    """Return the entropy of the mean prediction over passes with dropout, divided by the largest possible entropy.

    Source: section on uncertainty; Gal and Ghahramani, ICML 2016 (Monte-Carlo dropout).

    Args:
        head: Head of the teacher.
        features: Features of the points.
        seeds: Random seed of each sample, to which each pass adds its own offset.
        passes: Number of passes, at least 1.
        temperature: Temperature of the teacher's softmax.
    """
    total = torch.zeros(())
    for each in range(passes):
        logits = head(features, [seed + 2 * (each + 1) for seed in seeds])
        total = total.to(logits.device) + (logits / temperature).softmax(dim=2)
    return normalised_entropy(total / passes)
