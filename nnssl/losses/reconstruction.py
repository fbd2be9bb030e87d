"""Recovery of voxels and of masked tokens: mean squared errors, and the cost of predicting a constant.

Source: Yan et al., RepRec, WACV 2023, section 4.2; He et al., Masked Autoencoders (MAE), CVPR 2022, section 3; Wald et al., CVPR
2025, for the voxels that do not count.

Values that do not count, because nothing may be learned there, leave an error in two steps. The error of a batch or of a piece of
it takes their difference as 0 but divides by the number of all values, so that it is a mean over samples and pieces and processes
add up. ``counted_share`` of the whole batch then makes it a mean over the values that count.

Deviations:
    * RepRec does not say which tokens its mean squared error covers. MAE, to which it refers, averages only over the masked
      ones. So does this module.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl.distributed import mean_over_ranks

TOKEN_EPSILON = 1e-6
"""Number that is added to the variance of a token."""


def counted_mse(
    prediction: Float[Tensor, "batch channel *shape"],
    target: Float[Tensor, "batch channel *shape"],
    counted: Bool[Tensor, " batch *shape"],
) -> Float[Tensor, ""]:
    """Return the mean over all voxels of the squared error, taken as 0 at voxels that do not count.

    Divided by ``counted_share``, this is the mean over the voxels that count.

    Args:
        prediction: Predicted voxels.
        target: True voxels, which receive no gradient.
        counted: Voxels that count.

    Returns:
        Error in float32, also under mixed precision.
    """
    difference = torch.where(counted[:, None], prediction.float() - target.detach().float(), 0.0)
    return difference.square().mean()


def counted_share(
    counted: Bool[Tensor, " batch *values"], among: Bool[Tensor, " batch *values"] | None = None
) -> Float[Tensor, ""]:
    """Return the share of the values of all processes that count; a tiny number instead of 0.

    Args:
        counted: Values that count.
        among: Values to take the share of, the same number in every sample; None for all.
    """
    share = counted.sum() / counted.numel() if among is None else (counted & among).sum() / among.sum()
    return mean_over_ranks(share).clamp_min(torch.finfo(share.dtype).tiny)


def masked_token_mse(
    prediction: Float[Tensor, "batch tokens channel"],
    target: Float[Tensor, "batch tokens channel"],
    mask: Bool[Tensor, "batch tokens"],
    counted: Bool[Tensor, "batch tokens channel"] | None = None,
) -> Float[Tensor, ""]:
    """Return ``1/|M| sum_{i in M} ||prediction_i - target_i||^2 / channels`` over the masked tokens M of the batch.

    Source: RepRec, WACV 2023, section 4.2; MAE, CVPR 2022, section 3.
    Deviations: see the module's docstring.

    Args:
        prediction: Prediction for every token.
        target: True tokens, which receive no gradient.
        mask: Mask that is True for masked tokens; at least one must be masked.
        counted: Values that count; the error of the others is taken as 0. None if all do.

    Returns:
        Loss in float32, also under mixed precision.
    """
    compared = mask[..., None] if counted is None else mask[..., None] & counted
    # The difference is set to 0 before squaring, so that an infinite visible token does not put NaN into the gradient.
    difference = torch.where(compared, prediction.float() - target.detach().float(), 0.0)
    return difference.square().sum() / (mask.sum() * prediction.shape[2])


def standardise_tokens(
    target: Float[Tensor, "batch tokens channel"], counted: Bool[Tensor, "batch tokens channel"] | None = None
) -> Float[Tensor, "batch tokens channel"]:
    """Return each token with zero mean and unit variance over its channels, in float32.

    Source: MAE, CVPR 2022, section 4.1 (normalised targets).
    Deviations: the variance divides by the number of channels, as LayerNorm does.

    Args:
        target: Tokens.
        counted: Values over which mean and variance are taken; the others become 0. None for all.
    """
    target = target.float()
    if counted is None:
        return F.layer_norm(target, (target.shape[2],), eps=TOKEN_EPSILON)
    filled, share = _filled_with_mean(target, counted)
    return F.layer_norm(filled, (target.shape[2],), eps=TOKEN_EPSILON) * share.sqrt()


def undo_standardise_tokens(
    made: Float[Tensor, "batch tokens channel"],
    like: Float[Tensor, "batch tokens channel"],
    counted: Bool[Tensor, "batch tokens channel"],
) -> Float[Tensor, "batch tokens channel"]:
    """Return standardised tokens with the mean and variance of reference tokens, in float32, to display a recovery.

    Args:
        made: Standardised tokens, as ``standardise_tokens`` returns them.
        like: Reference tokens before standardisation.
        counted: As in ``standardise_tokens``. A token without such values becomes 0.
    """
    filled, share = _filled_with_mean(like.float(), counted)
    variance = filled.var(dim=2, correction=0, keepdim=True).add(TOKEN_EPSILON)
    deviation = (variance / share.clamp_min(1 / like.shape[2])).sqrt()
    return torch.where(share > 0, made.float() * deviation + filled.mean(dim=2, keepdim=True), 0.0)


def visible_mean_baseline(
    target: Float[Tensor, "batch tokens channel"],
    mask: Bool[Tensor, "batch tokens"],
    counted: Bool[Tensor, "batch tokens channel"] | None = None,
) -> Float[Tensor, ""]:
    """Return the ``masked_token_mse`` of predicting the mean of the sample's visible tokens everywhere.

    A method that recovers anything falls below this value. A low loss alone says little, because features of neighbouring tokens
    overlap. Source: none in the paper.

    Args:
        target: True tokens, as the loss compares them.
        mask: Mask that is True for masked tokens; at least one token of each sample must be visible.
        counted: As in ``masked_token_mse``.
    """
    visible = ~mask[..., None]
    mean = torch.where(visible, target.float(), 0.0).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True)
    return masked_token_mse(mean.expand_as(target), target, mask, counted)


def _filled_with_mean(target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens with the mean of their values that count in place of the others, and the share of the values that count.

    The variance over all values of the result is smaller than that over the values that count, by this share.
    """
    number = counted.sum(dim=2, keepdim=True)
    mean = torch.where(counted, target, 0.0).sum(dim=2, keepdim=True) / number.clamp_min(1)
    return torch.where(counted, target, mean), number / target.shape[2]
