"""A pretrained network whose features describe voxels, and the preprocessed cases that it can be shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.checkpoint import Provenance
from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.networks.backbone import planned_configuration
from nnssl.networks.dense import DenseKind, dense_maps
from nnssl.paths import Folders
from nnssl.plan import existing_plan, read_plan
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, plan_of_pretraining

SPACING_TOLERANCE = 1e-3
"""Relative difference of spacings that is put down to rounding."""
NAMED_CASES = 5
"""How many cases a message lists."""


@dataclass(frozen=True)
class DenseNetwork:
    """A network, the features that are read from it, and the tile that it is shown at once.

    Attributes:
        network: as ``nnssl.networks.dense.decoder_maps`` takes it, in evaluation mode.
        kind: which maps are read.
        tile_vox: (z, y, x); one slice for a 2D network.
        two_dimensional: whether the network takes slices.
        device: where the network is.
    """

    network: nn.Module
    kind: DenseKind
    tile_vox: tuple[int, int, int]
    two_dimensional: bool
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of a tile along the axes that the network sees."""
        return self.tile_vox[1:] if self.two_dimensional else self.tile_vox

    @torch.inference_mode()
    def maps(self, case: StoredCase, lower_vox: Sequence[int]) -> list[Float[Tensor, "1 channel *grid"]]:
        """Return the feature maps of the tile that begins at a voxel, coarsest first, in float32."""
        box = torch.from_numpy(case.read_box(lower_vox, self.tile_vox)).to(self.device)
        tile = box[None, :, 0] if self.two_dimensional else box[None]
        return [each.float() for each in dense_maps(self.network, tile, self.kind)]


def dense_network_of(pretrained: OpenedCheckpoint, kind: DenseKind | None, device: torch.device) -> DenseNetwork:
    """Build the network of a checkpoint of pretraining and load its weights.

    Args:
        pretrained: the checkpoint.
        kind: which maps are read; None for those that the weights were pretrained to compare, else all of them.
        device: where to compute.

    Raises:
        UserError: the weights do not fit the network of the plan, or that network has no decoder that makes feature maps.
    """
    provenance, path = pretrained.own_provenance, pretrained.path
    network = pretrained.build_network(0)
    check_decoder(network, path)
    try:
        network.load_state_dict(pretrained.content["network_weights"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit the network of its plan ({reason}); pretrain again") from error
    if not provenance.pretrains("decoder.stages."):
        logger.info(
            f"Warning: {provenance.method} does not pretrain the decoder, whose features are shown as they were "
            f"initialised; pretrained are only {', '.join(provenance.pretrained)}"
        )
    patch = pretrained.plan.configuration(provenance.configuration).patch_size
    tile = (1,) * (3 - len(patch)) + patch
    return DenseNetwork(
        network=network.eval().requires_grad_(False).to(device),
        kind=kind or pretrained_kind(provenance.settings),
        tile_vox=(tile[0], tile[1], tile[2]),
        two_dimensional=len(patch) == 2,
        device=device,
    )


def check_decoder(network: Any, path: Path) -> None:
    """Check that a network has what ``decoder_maps`` reads.

    Raises:
        UserError: it has not.
    """
    decoder = getattr(network, "decoder", None)
    if not (hasattr(network, "encoder") and hasattr(decoder, "transpconvs") and hasattr(decoder, "stages")):
        raise UserError(
            f"{path}: its network {type(network).__name__} has no convolutional decoder to read features of voxels from; "
            "take the weights of a U-Net configuration"
        )


def pretrained_kind(settings: dict[str, Any]) -> DenseKind:
    """Return the features that a stage's settings say it compared; all of them if it compared none."""
    found: DenseKind = settings.get("features", "pyramid")  # a setting of the dense methods only
    return found if found in get_args(DenseKind) else "pyramid"


def open_cases(provenance: Provenance, dataset_name: str, folders: Folders) -> CaseStore:
    """Return the preprocessed cases of a data set.

    Args:
        provenance: of the weights.
        dataset_name: ``DatasetXXX_Name``; need not be the one the weights were pretrained on.
        folders: nnU-Net's folders.

    Raises:
        UserError: the data set has no plan of that name with this configuration, that plan normalises or turns images in
            another way than the weights', or none of its cases is preprocessed.
    """
    name = provenance.configuration
    own = plan_of_pretraining(provenance, f"weights of {provenance.stage}")
    path = existing_plan(folders, dataset_name, provenance.plans_name)
    plan = read_plan(path)
    pretext = plan.configuration(name)
    before, here = (
        (planned_configuration(each.nnunet, name)["normalization_schemes"], each.nnunet["transpose_forward"])
        for each in (own, plan)
    )
    if before != here:
        raise UserError(
            f"{path}: its normalization_schemes and transpose_forward {here} are not those of the weights, {before}; "
            "take a data set of the same modality"
        )
    spacing_mm = own.configuration(name).spacing_mm
    if not np.allclose(spacing_mm, pretext.spacing_mm, rtol=SPACING_TOLERANCE):
        logger.info(
            f"Warning: pretrained at a spacing of {spacing_mm} mm, the cases of {dataset_name} have {pretext.spacing_mm}"
        )
    return CaseStore(folders.preprocessed / dataset_name / pretext.case_folder)


def find_case(store: CaseStore, name: str) -> StoredCase:
    """Return a case by name.

    Raises:
        UserError: there is no such case; names some of those there are.
    """
    if name not in store.names:
        some = ", ".join(store.names[:NAMED_CASES]) + (", ..." if len(store.names) > NAMED_CASES else "")
        raise UserError(f"case {name}: {store.folder} has no such case; it has {some}")
    return store.case(name)
