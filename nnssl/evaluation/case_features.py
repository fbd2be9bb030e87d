"""Features of whole cases: pooled maps of a frozen encoder, averaged over patches inside the body.

The maps are those of the last encoder stages. A pooled map is the mean and the maximum of every channel over all positions:
behind instance normalisation, the mean of a channel alone says little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nnssl.data.case_store import StoredCase
from nnssl.data.patch_boxes import as_volume, draw_box
from nnssl.draws import make_generator
from nnssl.networks.primus_positions import is_primus
from nnssl.weights.opened_checkpoint import OpenedCheckpoint

LAST_STAGES = 3
"""Number of encoder stages whose maps are read."""
BATCH = 4
"""Number of patches of a case that pass a network at once."""


@dataclass(frozen=True)
class CaseReading:
    """How the features of a case are read; the same for all networks that are compared.

    Attributes:
        patch_vox: Size of a patch in voxels, (z, y, x), or (y, x) for slices.
        stages: Encoder stages whose maps are read; empty for Primus, whose only map is that of its tokens.
        patches: Number of patches of a case.
        seed: Random seed of the places of the patches, which otherwise depend only on the case's name and stored voxels.
    """

    patch_vox: tuple[int, ...]
    stages: tuple[int, ...]
    patches: int
    seed: int

    def read_patches(self, case: StoredCase, numbers: Sequence[int]) -> Float32[np.ndarray, "patch channel *shape"]:
        """Return patches of a case around random voxels of the body.

        Args:
            case: The case.
            numbers: Numbers of the patches, from 0; a patch does not depend on the others.
        """
        size = as_volume(self.patch_vox)
        boxes = []
        for number in numbers:
            generator = make_generator(self.seed, "classify", case.name, number)
            boxes.append(case.read_box(draw_box(case.shape, size, case.foreground_vox, 1.0, generator), size))
        patches = np.stack(boxes)
        return patches[:, :, 0] if len(self.patch_vox) == 2 else patches


def reading_of(checkpoint: OpenedCheckpoint, network: Any, patches: int, seed: int) -> CaseReading:
    """Choose patch and stages for the weights of a checkpoint.

    The patch is that of the pretraining; for Primus, whose position embeddings belong to a patch, that of the plan. The stages
    are the last ones that were pretrained, and the stage of a hybrid network's transformer.

    Args:
        checkpoint: A checkpoint of nnssl pretraining.
        network: Its network.
        patches: Number of patches of a case.
        seed: Random seed of their places.
    """
    if is_primus(network):
        return CaseReading(checkpoint.patch_vox, (), patches, seed)
    provenance = checkpoint.own_provenance
    every = range(len(network.encoder.stages))
    trained = [stage for stage in every if provenance.pretrains(f"encoder.stages.{stage}.")] or list(every)
    stages = set(trained[-LAST_STAGES:])
    if hasattr(network, "transformer"):
        stages.add(network.token_stage)
    return CaseReading(checkpoint.trained_patch_vox, tuple(sorted(stages)), patches, seed)


def pooled_features(
    network: Any, patches: Float[Tensor, "patch channel *shape"], stages: Sequence[int]
) -> Float[Tensor, "patch feature"]:
    """Return mean and maximum of every channel of the maps, all stages side by side.

    Args:
        network: U-Net, hybrid network or Primus in evaluation mode.
        patches: Patches on the device of the network.
        stages: As in ``CaseReading``.
    """
    if is_primus(network):
        maps = [network.encode(patches).transpose(1, 2)]
    else:
        every = network.transformed_maps(patches) if hasattr(network, "transformer") else network.encoder(patches)
        maps = [every[stage].flatten(2) for stage in stages]
    return torch.cat([pooled for each in maps for pooled in (each.mean(dim=2), each.amax(dim=2))], dim=1)


@torch.inference_mode()
def case_features(
    networks: Sequence[Any], case: StoredCase, reading: CaseReading, device: torch.device
) -> Float32[np.ndarray, "network feature"]:
    """Return the features of a case by several networks of the same architecture, which see the same patches.

    Args:
        networks: Networks in evaluation mode on the device.
        case: The case.
        reading: How to read it.
        device: Device of the networks.
    """
    totals: list[Any] = [0.0] * len(networks)
    for first in range(0, reading.patches, BATCH):
        numbers = range(first, min(first + BATCH, reading.patches))
        patches = torch.from_numpy(reading.read_patches(case, numbers)).to(device)
        for place, network in enumerate(networks):
            totals[place] = totals[place] + pooled_features(network, patches, reading.stages).float().sum(dim=0)
    return torch.stack(totals).cpu().numpy() / np.float32(reading.patches)
