"""A batch that passes the network in pieces, and stages that are recomputed: less memory for the same gradient.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache), RepL4NLP 2021, for
``in_pieces``; Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, for ``recompute_stages``.

Deviations: GradCache computes the embeddings without a graph, takes the gradient of the loss with respect to them, and runs
the network again. Here autograd does the same: only the input of each piece is kept, and the backward pass recomputes one piece
after the other, the last one first. Every parameter still gets its gradient once, as ``DistributedDataParallel`` requires.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnssl.errors import UserError

R = TypeVar("R", Tensor, dict[str, Tensor])


def in_pieces(function: Callable[..., R], tensors: Sequence[Tensor], pieces: int) -> R:
    """Return what a function computes from a batch, computed in pieces of the batch.

    The graph of at most one piece is held at any time: the backward pass calls the function again for every piece. Parts of the
    function that have no gradient are not repeated if they come last.

    Args:
        function: Function from the tensors to a tensor or tensors by name. Each result must either have the samples along axis 0,
            as often for each, or be a scalar that is a mean over the samples. No sample may depend on others, and
            no tensors may be exchanged between processes.
        tensors: Arguments of the function, all with the samples along axis 0. The first one is on the network's device.
        pieces: Number of pieces, nearly equal in size; with 1, the function is called as it is.

    Returns:
        The results of the pieces, concatenated along axis 0; scalars are averaged over the samples.

    Raises:
        UserError: If there are fewer samples than pieces.
    """
    samples = len(tensors[0])
    check_pieces(pieces, samples)
    if pieces == 1:
        return function(*tensors)
    parts = list(zip(*(each.tensor_split(pieces) for each in tensors), strict=True))
    results: list[Any] = [recomputed(function, *part) for part in parts]
    shares = [len(part[0]) / samples for part in parts]
    joined: Any
    if isinstance(results[0], Tensor):
        joined = _join(results, shares)
    else:
        joined = {name: _join([each[name] for each in results], shares) for name in results[0]}
    return joined


def check_pieces(pieces: int, samples: int) -> None:
    """Check that no piece of a batch is empty.

    Args:
        pieces: Number of pieces.
        samples: Number of patches of a process.

    Raises:
        UserError: If there are fewer samples than pieces.
    """
    if pieces > samples:
        raise UserError(f"pieces must be at most the {samples} patches of a process, got {pieces}")


def recomputed(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function whose intermediate results are not kept but computed again in the backward pass.

    Without gradients, this is a plain call. Mixed precision and torch's random state are those of the first call.
    """
    # On MPS, torch cannot store the random state. The networks of this project draw nothing there.
    random = not any(isinstance(each, Tensor) and each.device.type == "mps" for each in arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=random, **named)


def recompute_stages(module: nn.Module) -> None:
    """Switch on activation checkpointing for all encoders, decoders and transformers that a module contains.

    Each stage of an encoder or decoder and each block of a transformer then keeps only its inputs. A stage of a decoder includes
    its upsampling. ``nnssl.networks.dense.decode`` runs the decoder; nnU-Net's own forward pass of a decoder is not affected.
    """
    each: Any
    for each in module.modules():
        if isinstance(each, (PlainConvEncoder, ResidualEncoder)):
            stem = getattr(each, "stem", None)
            _recompute([*each.stages, *([] if stem is None else [stem])])
        elif isinstance(each, UNetDecoder):
            each.recomputes = True
        elif isinstance(each, nn.TransformerEncoder):
            _recompute(each.layers)
        elif hasattr(each, "eva"):
            _recompute(each.eva.blocks)


def recomputes(decoder: Any) -> bool:
    """Return whether ``recompute_stages`` was applied to a decoder."""
    return bool(getattr(decoder, "recomputes", False))


def _recompute(modules: Any) -> None:
    for each in modules:
        if not isinstance(each.forward, partial):
            # A copy of the module, such as a teacher, copies the bound method in ``partial`` and so calls its own weights.
            each.forward = partial(recomputed, each.forward)


def _join(results: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if results[0].ndim:
        return torch.cat(list(results))
    return torch.stack([share * result for share, result in zip(shares, results, strict=True)]).sum()
