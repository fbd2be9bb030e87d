"""Weights of one network fitted to another: input channels and kernels.

The fitted weights compute the same as the original ones wherever an input makes that possible: for a kernel that loses an axis,
a volume that is constant along that axis; for another number of channels, channels that all show the same image.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

ChannelPolicy = Literal["mean", "repeat", "named"]
CHANNEL_POLICIES: tuple[ChannelPolicy, ...] = get_args(ChannelPolicy)


def fit_input_channels(
    weights: Float[Tensor, "out channel *kernel"],
    channels: int,
    policy: ChannelPolicy,
    names: Sequence[str] | None = None,
    new_names: Sequence[str] | None = None,
) -> Float[Tensor, "out new_channel *kernel"]:
    """Return the weights of a first convolution for images with other channels.

    Args:
        weights: Weights of the convolution.
        channels: Number of channels of the new images.
        policy: ``mean``: every channel gets the mean over all channels, scaled so that the output is as before if all channels
            show the same image. ``repeat``: the new channels take the old channels in turn, and new channels with the same old
            channel share its weights evenly, to the same effect; if there are fewer channels than before, they take the first
            ones unchanged. ``named``: a channel takes the weights of the channel with its name, and all others get 0, so that
            known channels have the same effect as before.
        names: Names of the channels that the weights are for; needed for ``named``.
        new_names: Names of the new channels; needed for ``named``.

    Raises:
        ValueError: If the policy is ``named`` and names are missing, do not match the number of channels, are not unique, or
            have none in common.
    """
    old = weights.shape[1]
    if policy == "mean":
        return weights.mean(dim=1, keepdim=True).expand(-1, channels, *weights.shape[2:]) * (old / channels)
    if policy == "repeat":
        chosen = torch.arange(channels, device=weights.device) % old
        shared_by = torch.bincount(chosen)[chosen].to(weights.dtype)
        return weights[:, chosen] / shared_by.view(1, -1, *[1] * (weights.ndim - 2))
    if names is None or new_names is None or len(names) != old or len(new_names) != channels:
        raise ValueError("channels can be matched by name only if both sides name all of them")
    known = {name.casefold(): channel for channel, name in enumerate(names)}
    wanted = [name.casefold() for name in new_names]
    if len(known) != old or len(set(wanted)) != channels:
        raise ValueError("two channels have the same name")
    if not set(known) & set(wanted):
        raise ValueError("the two sides have no channel name in common")
    fitted = weights.new_zeros(weights.shape[0], channels, *weights.shape[2:])
    for channel, name in enumerate(wanted):
        if name in known:
            fitted[:, channel] = weights[:, known[name]]
    return fitted


def fit_kernel(
    weights: Float[Tensor, "first second *kernel"], kernel: Sequence[int], transposed: bool
) -> Float[Tensor, "first second *new_kernel"] | None:
    """Return the weights of a convolution for another kernel size; None if they cannot be converted faithfully.

    A longer kernel is padded with zeros, which computes the same. A kernel that shrinks to one voxel along an axis is summed
    along it, which computes the same if the image is constant along the axis. 2D weights count as kernels of one voxel along z.
    Transposed convolutions, whose kernel size equals their stride, repeat or average their weights instead.

    Args:
        weights: Weights of the convolution.
        kernel: New kernel size in voxels per axis.
        transposed: Whether the convolution is transposed.
    """
    old = list(weights.shape[2:])
    if len(old) == 2 and len(kernel) == 3:
        weights, old = weights[:, :, None], [1, *old]
    elif len(old) == 3 and len(kernel) == 2:
        flat = fit_kernel(weights, (1, *kernel), transposed)
        return None if flat is None else flat[:, :, 0]
    for axis, (size, wanted) in enumerate(zip(old, kernel, strict=True), start=2):
        if size == wanted:
            continue
        if wanted == 1:
            weights = weights.mean(axis, keepdim=True) if transposed else weights.sum(axis, keepdim=True)
        elif transposed and size == 1:
            weights = weights.repeat_interleave(wanted, axis)
        elif not transposed and wanted > size and (wanted - size) % 2 == 0:
            shape = list(weights.shape)
            shape[axis] = (wanted - size) // 2
            zeros = weights.new_zeros(shape)
            weights = torch.cat([zeros, weights, zeros], axis)
        else:
            return None
    return weights
