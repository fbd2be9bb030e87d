"""Recovery of masked tokens: the mean squared error over masked tokens, and the cost of predicting a constant.

Source: Yan et al., RepRec, WACV 2023, section 4.2; He et al., Masked Autoencoders (MAE), CVPR 2022, section 3.

Deviations:
    * RepRec does not say which tokens its mean squared error covers. MAE, to which it refers, averages only over the masked
      ones. So does this module.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

TOKEN_EPSILON = 1e-6
"""Number that is added to the variance of a token."""


def masked_token_mse(
    prediction: Float[Tensor, "batch tokens channel"],
    target: Float[Tensor, "batch tokens channel"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Return ``1/|M| sum_{i in M} ||prediction_i - target_i||^2 / channels`` over the masked tokens M of the batch.

    Source: RepRec, WACV 2023, section 4.2; MAE, CVPR 2022, section 3.
    Deviations: see the module's docstring.

    Args:
        prediction: Prediction for every token.
        target: True tokens, which receive no gradient.
        mask: Mask that is True for masked tokens; at least one must be masked.

    Returns:
        Loss in float32, also under mixed precision.
    """
    # The difference is set to 0 before squaring, so that an infinite visible token does not put NaN into the gradient.
    difference = torch.where(mask[..., None], prediction.float() - target.detach().float(), 0.0)
    return difference.square().sum() / (mask.sum() * prediction.shape[2])


def standardise_tokens(target: Float[Tensor, "batch tokens channel"]) -> Float[Tensor, "batch tokens channel"]:
    """Return each token with zero mean and unit variance over its channels, in float32.

    Source: MAE, CVPR 2022, section 4.1 (normalised targets).
    Deviations: the variance divides by the number of channels, as LayerNorm does.
    """
    return F.layer_norm(target.float(), (target.shape[2],), eps=TOKEN_EPSILON)


def undo_standardise_tokens(
    made: Float[Tensor, "batch tokens channel"], like: Float[Tensor, "batch tokens channel"]
) -> Float[Tensor, "batch tokens channel"]:
    """Return standardised tokens with the mean and variance of reference tokens, in float32, to display a recovery.

    Args:
        made: Standardised tokens, as ``standardise_tokens`` returns them.
        like: Reference tokens before standardisation.
    """
    deviation = like.float().var(dim=2, correction=0, keepdim=True).add(TOKEN_EPSILON).sqrt()
    return made.float() * deviation + like.mean(dim=2, keepdim=True)


def visible_mean_baseline(
    target: Float[Tensor, "batch tokens channel"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Return the ``masked_token_mse`` of predicting the mean of the sample's visible tokens everywhere.

    A method that recovers anything falls below this value. A low loss alone says little, because features of neighbouring tokens
    overlap. Source: none in the paper.

    Args:
        target: True tokens, as the loss compares them.
        mask: Mask that is True for masked tokens; at least one token of each sample must be visible.
    """
    visible = ~mask[..., None]
    mean = torch.where(visible, target.float(), 0.0).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True)
    return masked_token_mse(mean.expand_as(target), target, mask)
