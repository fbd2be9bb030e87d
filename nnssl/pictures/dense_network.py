"""A pretrained network with features of voxels, and the case to show them on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.networks.dense import DenseKind, dense_maps, maps_up_to
from nnssl.weights.opened_checkpoint import OpenedCheckpoint

NAMED_CASES = 5
"""Largest number of cases that a message lists."""


@dataclass(frozen=True)
class DenseNetwork:
    """A network with the kind of its features and the size of its tiles.

    Attributes:
        network: Network in evaluation mode that ``nnssl.networks.dense.decoder_maps`` accepts.
        kind: Kind of the feature maps.
        tile_vox: Shape (z, y, x) of a tile in voxels; one slice for a 2D network.
        two_dimensional: Whether the network takes slices.
        device: Device of the network.
        encoder_stages: Encoder stages whose maps are read in place of the decoder's; empty for the decoder.
    """

    network: nn.Module
    kind: DenseKind
    tile_vox: tuple[int, int, int]
    two_dimensional: bool
    device: torch.device
    encoder_stages: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a tile along the axes of the network, in voxels."""
        return self.tile_vox[1:] if self.two_dimensional else self.tile_vox

    @torch.inference_mode()
    def maps(self, case: StoredCase, lower_vox: Sequence[int]) -> list[Float[Tensor, "1 channel *grid"]]:
        """Return the feature maps of the tile that starts at a voxel, coarsest first, in float32."""
        box = torch.from_numpy(case.read_box(lower_vox, self.tile_vox)).to(self.device)
        tile = box[None, :, 0] if self.two_dimensional else box[None]
        if self.encoder_stages:
            found = maps_up_to(self.network.encoder, tile, max(self.encoder_stages))
            return [found[stage].float() for stage in sorted(self.encoder_stages, reverse=True)]
        return [each.float() for each in dense_maps(self.network, tile, self.kind)]


def dense_network_of(pretrained: OpenedCheckpoint, kind: DenseKind | None, device: torch.device) -> DenseNetwork:
    """Build the network of a checkpoint of pretraining and load its weights.

    Args:
        pretrained: The checkpoint.
        kind: Kind of the feature maps; None for the kind used in pretraining or, if it used none, the pyramid.
        device: Device for the computation.

    Raises:
        UserError: If the weights do not fit the network of the plan, or this network has no convolutional decoder.
    """
    provenance, path = pretrained.own_provenance, pretrained.path
    network = pretrained.build_network(0)
    check_decoder(network, path)
    pretrained.load_into(network)
    if not provenance.pretrains("decoder.stages."):
        logger.info(
            f"Warning: {provenance.method} does not pretrain the decoder, so its features are those of the random "
            f"initialisation; only {', '.join(provenance.pretrained_parts)} are pretrained"
        )
    return freeze(network, pretrained, kind, device)


def freeze(
    network: Any,
    pretrained: OpenedCheckpoint,
    kind: DenseKind | None,
    device: torch.device,
    encoder_stages: tuple[int, ...] = (),
) -> DenseNetwork:
    """Return a network with loaded weights, frozen, with tiles of the patch that it was pretrained on.

    Args:
        network: The network.
        pretrained: The checkpoint of its weights.
        kind: As in ``dense_network_of``.
        device: As in ``dense_network_of``.
        encoder_stages: As in ``DenseNetwork``.
    """
    patch = pretrained.trained_patch_vox
    tile = (1,) * (3 - len(patch)) + patch
    return DenseNetwork(
        network=network.eval().requires_grad_(False).to(device),
        kind=kind or pretrained_kind(pretrained.own_provenance.settings),
        tile_vox=(tile[0], tile[1], tile[2]),
        two_dimensional=len(patch) == 2,
        device=device,
        encoder_stages=encoder_stages,
    )


def check_decoder(network: Any, path: Path) -> None:
    """Check that a network has the decoder that ``decoder_maps`` reads.

    Raises:
        UserError: If the network has no convolutional decoder.
    """
    decoder = getattr(network, "decoder", None)
    if not (hasattr(network, "encoder") and hasattr(decoder, "transpconvs") and hasattr(decoder, "stages")):
        raise UserError(
            f"{path}: its network {type(network).__name__} has no convolutional decoder, which features of voxels come from; "
            "use weights of a U-Net configuration"
        )


def pretrained_kind(settings: dict[str, Any]) -> DenseKind:
    """Return the kind of features in a stage's settings; the pyramid if it has no such setting."""
    found: DenseKind = settings.get("features", "pyramid")  # only dense methods have this setting
    return found if found in get_args(DenseKind) else "pyramid"


def find_case(store: CaseStore, name: str) -> StoredCase:
    """Return a case by name.

    Raises:
        UserError: If there is no such case; the message lists some that exist.
    """
    if name not in store.names:
        some = ", ".join(store.names[:NAMED_CASES]) + (", ..." if len(store.names) > NAMED_CASES else "")
        raise UserError(f"case {name}: {store.folder} has no such case; it has {some}")
    return store.case(name)
