"""Recovering masked tokens: mean squared error on what was masked, and what predicting a constant would cost.

Source: Yan et al., RepRec, WACV 2023, section 4.2; He et al., Masked Autoencoders (MAE), CVPR 2022, section 3.

Deviations:
    * RepRec says "MSE between recovered and original" without saying of which tokens; MAE, to which it refers, averages
      over the masked ones only. Here the masked ones only.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

TOKEN_EPSILON = 1e-6
"""Added to the variance of a token."""


def masked_token_mse(
    prediction: Float[Tensor, "batch tokens channel"],
    target: Float[Tensor, "batch tokens channel"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Return ``1/|M| sum_{i in M} ||prediction_i - target_i||^2 / channels`` over the masked tokens M of the batch.

    Source: RepRec, WACV 2023, section 4.2; MAE, CVPR 2022, section 3.
    Deviations: see the module.

    Args:
        prediction: of every token.
        target: gets no gradient.
        mask: True where the token was masked; at least one is.

    Returns:
        The loss in float32, also under mixed precision.
    """
    # the difference is zeroed, not the square: a visible token that is infinite must not send NaN into the gradient
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
    """Return standardised tokens with the mean and the variance that others have, in float32: so a recovery can be shown.

    Args:
        made: tokens as ``standardise_tokens`` gives them.
        like: tokens that were standardised.
    """
    deviation = like.float().var(dim=2, correction=0, keepdim=True).add(TOKEN_EPSILON).sqrt()
    return made.float() * deviation + like.mean(dim=2, keepdim=True)


def visible_mean_baseline(
    target: Float[Tensor, "batch tokens channel"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Return the ``masked_token_mse`` of predicting, everywhere, the mean of the sample's visible tokens.

    A method that recovers anything gets below this; since features of neighbouring tokens overlap, a low loss alone
    says little. Source: none in the paper.

    Args:
        target: the tokens as the loss compares them.
        mask: True where the token was masked; at least one token of each sample is visible.
    """
    visible = ~mask[..., None]
    mean = torch.where(visible, target.float(), 0.0).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True)
    return masked_token_mse(mean.expand_as(target), target, mask)
