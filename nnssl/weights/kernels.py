"""Tensors of one network made to fit another: input channels, kernels, positions of tokens.

What a function here returns does to its input what the original does, where there is such an input: a volume that does not
change along an axis for kernels that lose it, channels that all show the same image for another number of channels.
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
    """Return the weights of a first convolution for images of other channels.

    Args:
        weights: of the convolution.
        channels: of the new images.
        policy: ``mean``: every channel gets the mean of all, scaled so that an image that stands in all channels is answered
            as before. ``repeat``: the weights are taken in turn and shared evenly among the channels that take the same, to
            the same end; fewer channels than before take the first ones as they are. ``named``: a channel keeps the weights
            of the one that has its name and all others get 0, so that what is known is answered as before.
        names: of the channels that the weights are for, needed for ``named``.
        new_names: of the new channels, likewise.

    Raises:
        ValueError: ``named`` without names, with another number of them, with one name twice, or with no name in common.
    """
    old = weights.shape[1]
    if policy == "mean":
        return weights.mean(dim=1, keepdim=True).expand(-1, channels, *weights.shape[2:]) * (old / channels)
    if policy == "repeat":
        chosen = torch.arange(channels, device=weights.device) % old
        shared_by = torch.bincount(chosen)[chosen].to(weights.dtype)
        return weights[:, chosen] / shared_by.view(1, -1, *[1] * (weights.ndim - 2))
    if names is None or new_names is None or len(names) != old or len(new_names) != channels:
        raise ValueError("channels can only be matched by name where both sides name all of them")
    known = {name.casefold(): channel for channel, name in enumerate(names)}
    wanted = [name.casefold() for name in new_names]
    if len(known) != old or len(set(wanted)) != channels:
        raise ValueError("two channels have the same name")
    if not set(known) & set(wanted):
        raise ValueError("no channel of one has the name of one of the other")
    fitted = weights.new_zeros(weights.shape[0], channels, *weights.shape[2:])
    for channel, name in enumerate(wanted):
        if name in known:
            fitted[:, channel] = weights[:, known[name]]
    return fitted


def fit_kernel(
    weights: Float[Tensor, "first second *kernel"], kernel: Sequence[int], transposed: bool
) -> Float[Tensor, "first second *new_kernel"] | None:
    """Return the weights of a convolution for a kernel of other lengths; None where there is no faithful way.

    A longer kernel gets zeros around the old one, which computes the same. A kernel that is cut to one voxel along an axis
    is summed there, which is the same where the image does not change along it. 2D weights count as kernels of one voxel
    along z. Transposed convolutions, whose kernels are their strides, repeat or average instead.

    Args:
        weights: of the convolution.
        kernel: voxels per axis that are wanted.
        transposed: whether it is a transposed convolution.
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
