"""Pretrained weights as they are on disk, ours or others', opened without running anything in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl.checkpoint import Provenance, load_tensors, parse_provenance
from nnssl.errors import UserError
from nnssl.networks.backbone import planned_configuration
from nnssl.weights.adaptation_plan import KEY, KEYS, AdaptationPlan, network_kind, read_adaptation_plan

SEGMENTATION = ".seg_layers."
"""What nnU-Net's loader passes over and starts anew."""

GATE = "transformer.gate"
"""How much a hybrid network hears of its transformer; 0 in a random start."""

EXPORT_KEY = "nnssl_export"
"""Of a file for a trainer whose network no plan names: what the file is, for people."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before names."""


@dataclass(frozen=True)
class SourceWeights:
    """What a checkpoint has to give.

    Attributes:
        path: the file.
        tensors: the pretrained ones, under every name that they have.
        untrained: number of values in the file that are no more than a random initialisation.
        seeded: names of these.
        architecture: the network, as a configuration of a plan names it.
        channel_names: of the images that the tensors are for; None where the file does not say.
        num_channels: of these images.
        patch_vox: that learned positions are for, (z, y, x) or (y, x).
        pretraining: ``spacing_mm``, ``patch_vox``, ``channel_names``, ``plans_name`` and ``configuration`` of the pretraining,
            each None where the file does not say. An exported file was made for others than these.
        citations: what the file asks to cite.
        provenance: where they come from, of a checkpoint of nnssl.
        adaptation: what a checkpoint made elsewhere says of itself.
    """

    path: Path
    tensors: dict[str, Tensor]
    untrained: int
    seeded: frozenset[str]
    architecture: dict[str, Any]
    channel_names: tuple[str, ...] | None
    num_channels: int
    patch_vox: tuple[int, ...]
    pretraining: dict[str, Any]
    citations: tuple[dict[str, Any], ...] = ()
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
        UserError: the file is missing, unsafe, holds NaN, or is neither of the two.
    """
    content = load_tensors(path)
    if "nnssl" in content:
        return _of_nnssl(path, content, parse_provenance(path, content))
    if KEY in content:
        return _of_others(path, content, read_adaptation_plan(path, content))
    if EXPORT_KEY in content:
        raise UserError(
            f"{path}: was made for nnU-Net's {content[EXPORT_KEY]['trainer']}, whose network no plan names; take the checkpoint "
            f"that it was made from, {content[EXPORT_KEY]['checkpoint']}"
        )
    raise UserError(
        f"{path}: is neither a checkpoint of nnssl nor one with an {KEY}; take checkpoint_final.pth of nnssl_pretrain, or "
        "a file from a model hub that has one"
    )


def choose_configuration(wanted: str | None, path: Path, provenance: Provenance) -> str:
    """Return a configuration of the plan of weights: the one that is wanted, or the one they were pretrained with.

    Raises:
        UserError: the plan has no such configuration.
    """
    chosen = wanted or provenance.configuration
    if chosen not in provenance.plans["configurations"]:
        known = ", ".join(sorted(provenance.plans["configurations"]))
        raise UserError(f"-c {chosen}: the plan of {path} has no such configuration; it has {known}")
    return chosen


def names_by_tensor(tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Return the names of a state dict, those of one tensor together: nnU-Net registers some under up to four.

    Tensors that were one and have been copied apart, as a conversion to float16 does, are told by their names.
    """
    groups: dict[Any, list[str]] = {}
    for name in tensors:
        first = _first_name(name, tensors)
        value = tensors[first]
        key = first if value.numel() == 0 else (value.data_ptr(), value.shape, value.stride(), value.dtype)
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def count_values(tensors: Mapping[str, Tensor]) -> int:
    """Return how many values a state dict holds, a tensor with several names counted once."""
    return sum(tensors[names[0]].numel() for names in names_by_tensor(tensors))


def _first_name(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the first of the names under which nnU-Net's U-Nets register a tensor, if it is there; else the name itself."""
    other = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
    block, middle, rest = other.partition(".all_modules.")
    if middle:
        place, _, parameter = rest.partition(".")
        other = f"{block}.{'conv' if place == '0' else 'norm'}.{parameter}"
    return other if other in tensors and other != name and tensors[other].shape == tensors[name].shape else name


def _of_nnssl(path: Path, content: dict[str, Any], provenance: Provenance) -> SourceWeights:
    weights = _checked(path, content["network_weights"])
    whole = planned_configuration(provenance.plans, provenance.configuration)
    pretrained = provenance.pretrained
    if provenance.pretrains("transformer."):
        pretrained = (*pretrained, GATE)  # set when the weights left, so that the transformer takes part
    trained = {
        name: weights[name]
        for names in names_by_tensor(weights)
        if any(name.startswith(prefix) for name in names for prefix in pretrained)
        for name in names
        if SEGMENTATION not in f".{name}"
    }
    names = provenance.dataset_json["channel_names"]
    channel_names = tuple(str(names[key]) for key in sorted(names, key=int))
    return SourceWeights(
        path=path,
        tensors=trained,
        untrained=count_values(weights) - count_values(trained),
        seeded=frozenset(set(weights) - set(trained)),
        architecture=whole["architecture"],
        channel_names=channel_names,
        num_channels=len(names),
        patch_vox=tuple(whole["patch_size"]),
        pretraining=provenance.origin
        or {
            "spacing_mm": list(whole["spacing"]),
            "patch_vox": list(whole["patch_size"]),
            "channel_names": list(channel_names),
            "plans_name": provenance.plans_name,
            "configuration": provenance.configuration,
        },
        citations=tuple(content["citations"]) if "citations" in content else (),
        provenance=provenance,
    )


def _of_others(path: Path, content: dict[str, Any], plan: AdaptationPlan) -> SourceWeights:
    weights = _checked(path, content["network_weights"])
    renamed = {_usual_name(name, plan): value for name, value in weights.items()}
    trained = {name: value for name, value in renamed.items() if name is not None}
    if not trained:
        raise UserError(
            f"{path}: holds no weights under {plan.key_to_encoder} or {plan.key_to_stem}, where its {KEY} says they are"
        )
    citations = content.get("citations")
    return SourceWeights(
        path=path,
        tensors=trained,
        untrained=count_values(weights) - count_values(trained),
        seeded=frozenset(set(weights) - set(trained)),
        architecture=plan.architecture(),
        channel_names=None,
        num_channels=plan.pretrain_num_input_channels,
        patch_vox=plan.patch_vox,
        pretraining={
            "spacing_mm": None if plan.spacing_mm is None else list(plan.spacing_mm),
            "patch_vox": list(plan.patch_vox),
            "channel_names": None,
            "plans_name": None,
            "configuration": None,
        },
        citations=tuple(citations) if isinstance(citations, (list, tuple)) else (),
        adaptation=plan,
    )


def _usual_name(name: str, plan: AdaptationPlan) -> str | None:
    """Return the name that a tensor of encoder or stem has in nnU-Net's network; None for all others.

    A file says under which prefixes they are: the online encoder of a siamese method has one of its own.
    """
    usual = KEYS[network_kind(plan.network_class)]
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    for key in ("key_to_lpe", "key_to_encoder", "key_to_stem"):
        theirs = getattr(plan, key)
        if theirs and usual[key] and (name == theirs or name.startswith(f"{theirs}.")):
            return usual[key] + name.removeprefix(theirs)
    return None


def _checked(path: Path, weights: Any) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: its network_weights are no tensors by name; take the file from where it came again")
    broken = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise UserError(f"{path}: {broken} holds NaN or infinite values; take an earlier checkpoint")
    return dict(weights)
