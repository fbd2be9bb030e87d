"""Reconstructions of a patch by the decoder of a method: input, target and output."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from nnssl.data.case_store import StoredCase
from nnssl.draws import make_generator
from nnssl.errors import UserError
from nnssl.methods.alice import Alice
from nnssl.methods.pcrl import errors_untold
from nnssl.pictures.places import choose_centre
from nnssl.views.contexts import clean_in_scale, counted_targets, in_scale, mix, reconstruction_targets
from nnssl.views.partners import PairedViews
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.restored_method import method_of

METHODS = ("alice", "pcrl")


@dataclass(frozen=True)
class Reconstruction:
    """Input, target and output of one model in the middle slice of a patch, channel 0.

    Attributes:
        model: ``o``, ``m`` or ``h`` for PCRL; ``s`` for Alice.
        seen: Input (y, x): the corrupted crop, for the hybrid the mix of both crops, for Alice the visible tokens.
        target: Clean crop (y, x), flipped and turned as the code demands.
        output: Output (y, x) of the decoder; for Alice the masked tokens, with the contrast of the true ones, and the visible
            tokens.
        error: Mean squared error over the voxels of the patch that may be learned from and all channels; for Alice over those of
            the masked tokens, each standardised.
        error_untold: Baseline of the error. PCRL: the smallest error without knowledge of the code, or without attention that
            of the mean. Alice: the error of the mean of the visible tokens.
    """

    model: str
    seen: Float32[np.ndarray, "y x"]
    target: Float32[np.ndarray, "y x"]
    output: Float32[np.ndarray, "y x"]
    error: float
    error_untold: float


def reconstructor_of(pretrained: OpenedCheckpoint, device: torch.device) -> Any:
    """Restore a method with a reconstruction loss from a checkpoint.

    Raises:
        UserError: If the method does not reconstruct, was pretrained without this loss, or ``method_of`` rejects it.
    """
    provenance, path = pretrained.own_provenance, pretrained.path
    if provenance.method not in METHODS:
        raise UserError(
            f"{path}: is of {provenance.method} and reconstructs nothing; use a checkpoint of {' or '.join(METHODS)}"
        )
    if not provenance.settings["reconstruction_weight"]:
        raise UserError(
            f"{path}: was pretrained with reconstruction_weight=0; use weights of a run with a reconstruction loss"
        )
    return method_of(pretrained, device)


@torch.no_grad()
def reconstruct_case(
    method: Any, case: StoredCase, slice_vox: int | None, seed: int, device: torch.device
) -> list[Reconstruction]:
    """Reconstruct a patch in the middle of the body with all models of a method.

    Args:
        method: Method that reconstructs.
        case: The case.
        slice_vox: z of the slice for a 2D network; None for the slice with the most body.
        seed: Random seed of crops, corruption and transformations.
        device: Device for the computation.

    Raises:
        UserError: If the slice lies outside the case, or is given for a network that is not 2D.
    """
    patch = method.configuration.patch_size
    flat = len(patch) == 2
    centre = choose_centre(case, slice_vox, flat, "the middle of a patch")
    size = (1, *patch) if flat else patch
    lower = [place - length // 2 for place, length in zip(centre, size, strict=True)]
    boxes = (case.read_box(lower, size), case.read_learnable(lower, size)[None])
    volumes, learnable = (torch.from_numpy(box).to(device)[None] for box in boxes)
    if flat:
        volumes, learnable = volumes.squeeze(2), learnable.squeeze(2)
    views = method.make_views(volumes, [make_generator(seed, "reconstructions", case.name)], learnable[:, 0])
    return _of_tokens(method, views) if isinstance(method, Alice) else _of_contexts(method, views)


def _of_tokens(method: Alice, views: PairedViews) -> list[Reconstruction]:
    made = method.recover(views)
    seen, target, output = (_middle(each) for each in (made.seen, views.patches, made.output))
    return [Reconstruction("s", seen, target, output, float(made.error), float(made.error_of_mean))]


def _of_contexts(method: Any, views: Any) -> list[Reconstruction]:
    features, taught = method.network.encoder(views.seen_o), method.teacher(views.seen_m)
    outputs = method.reconstruct(features, taught, views.codes, views.mixing)
    scale = method.settings.reconstruction_scale
    seen_o, seen_m = (in_scale(each, views, scale) for each in (views.seen_o, views.seen_m))
    seen = {"o": seen_o, "m": seen_m, "h": mix(seen_o, seen_m, views.mixing)}
    views = clean_in_scale(views, scale)
    targets = reconstruction_targets(views, method.settings.hybrid_target)
    counted = counted_targets(views, method.settings.hybrid_target)
    untold = errors_untold(views, method.settings)  # of voxels that do not count, it is 0
    share = {model: max(float(each.float().mean()), 1 / each.numel()) for model, each in counted.items()}
    wrong = {
        model: torch.where(counted[model][:, None], output.float() - targets[model], 0.0)
        for model, output in outputs.items()
    }
    return [
        Reconstruction(
            model,
            _middle(seen[model]),
            _middle(targets[model]),
            _middle(output),
            float(wrong[model].square().mean()) / share[model],
            float(untold[model]) / share[model],
        )
        for model, output in outputs.items()
    ]


def _middle(volumes: torch.Tensor) -> Float32[np.ndarray, "y x"]:
    """Return the middle slice of the first channel of the first sample."""
    volume = volumes[0, 0].float().cpu().numpy()
    return volume if volume.ndim == 2 else volume[len(volume) // 2]
