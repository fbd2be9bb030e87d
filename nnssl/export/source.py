"""Pretrained weights as they are on disk, ours or others', opened without running anything in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nnssl.checkpoint import Provenance, load_tensors, parse_provenance
from nnssl.errors import UserError
from nnssl.export.adaptation_plan import KEY, AdaptationPlan, read_adaptation_plan


@dataclass(frozen=True)
class SourceWeights:
    """What a checkpoint has to give.

    Attributes:
        path: the file.
        tensors: the pretrained ones, under every name that they have.
        untrained: number of values in the file that are no more than a random initialisation.
        architecture: the network, as a configuration of a plan names it.
        channel_names: of the images; None where the file does not say.
        num_channels: of the images.
        patch_vox: of the patches, (z, y, x) or (y, x).
        spacing_mm: of the patches; None where the file does not say.
        provenance: where they come from, of a checkpoint of nnssl.
        adaptation: what a checkpoint made elsewhere says of itself.
    """

    path: Path
    tensors: dict[str, Tensor]
    untrained: int
    architecture: dict[str, Any]
    channel_names: tuple[str, ...] | None
    num_channels: int
    patch_vox: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    provenance: Provenance | None = None
    adaptation: AdaptationPlan | None = None

    @property
    def label(self) -> str:
        """What the weights are, for a sentence."""
        if self.provenance is not None:
            return f"{self.provenance.stage}, pretrained on {self.provenance.dataset_name}"
        return "a checkpoint made elsewhere"


def open_source(path: Path) -> SourceWeights:
    """Open a checkpoint of nnssl, or one in the adaptation-plan format.

    Raises:
        UserError: the file is missing, unsafe, or neither of the two.
    """
    content = load_tensors(path)
    if "nnssl" in content:
        return _of_nnssl(path, content, parse_provenance(path, content))
    if KEY in content:
        return _of_others(path, content, read_adaptation_plan(path, content))
    raise UserError(
        f"{path}: is neither a checkpoint of nnssl nor one with an {KEY}; take checkpoint_final.pth of nnssl_pretrain, or "
        "a file from a model hub that has one"
    )


def names_by_tensor(tensors: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Return the names of a state dict, those of one tensor together: nnU-Net registers some under up to four."""
    groups: dict[Any, list[str]] = {}
    for name, value in tensors.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def _of_nnssl(path: Path, content: dict[str, Any], provenance: Provenance) -> SourceWeights:
    weights = content["network_weights"]
    configuration = provenance.plans["configurations"][provenance.configuration]
    whole = {**_inherited(provenance.plans, configuration), **configuration}
    trained = {
        name: weights[name]
        for names in names_by_tensor(weights)
        if any(name.startswith(prefix) for name in names for prefix in provenance.pretrained)
        for name in names
    }
    channels = provenance.dataset_json["channel_names"]
    return SourceWeights(
        path=path,
        tensors=trained,
        untrained=count_values(weights) - count_values(trained),
        architecture=whole["architecture"],
        channel_names=tuple(str(channels[key]) for key in sorted(channels, key=int)),
        num_channels=len(channels),
        patch_vox=tuple(whole["patch_size"]),
        spacing_mm=tuple(whole["spacing"]),
        provenance=provenance,
    )


def _inherited(plans: dict[str, Any], configuration: dict[str, Any]) -> dict[str, Any]:
    parent = configuration.get("inherits_from")
    if parent is None:
        return {}
    base = plans["configurations"][parent]
    return {**_inherited(plans, base), **base}


def _of_others(path: Path, content: dict[str, Any], plan: AdaptationPlan) -> SourceWeights:
    weights = content["network_weights"]
    prefixes = [prefix for prefix in (plan.key_to_encoder, plan.key_to_stem, plan.key_to_lpe) if prefix]
    trained = {
        name: value
        for name, value in weights.items()
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
    }
    if not trained:
        raise UserError(f"{path}: holds no weights under {' or '.join(prefixes)}, where its {KEY} says they are")
    return SourceWeights(
        path=path,
        tensors=trained,
        untrained=count_values(weights) - count_values(trained),
        architecture=plan.architecture(),
        channel_names=None,
        num_channels=plan.pretrain_num_input_channels,
        patch_vox=plan.patch_vox,
        spacing_mm=plan.spacing_mm,
        adaptation=plan,
    )


def count_values(tensors: dict[str, Tensor]) -> int:
    """Return how many values a state dict holds, a tensor with several names counted once."""
    return sum(int(np.prod(tensors[names[0]].shape)) for names in names_by_tensor(tensors))
