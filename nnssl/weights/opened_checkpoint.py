"""A checkpoint, opened once without executing anything in it, and everything that follows from its content.

``open_checkpoint`` reads checkpoints of nnssl, of nnU-Net's training with labels, and those made elsewhere in the
adaptation-plan format. A property that a file cannot provide raises an error that says which file can.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl.checkpoint import ACCEPTED, Provenance, load_tensors, parse_provenance
from nnssl.data.dataset_labels import Labels, read_class_order, read_labels
from nnssl.errors import ArgumentError, UserError
from nnssl.files import file_digest
from nnssl.networks.backbone import build_network, planned_configuration
from nnssl.networks.primus_positions import architecture_of_patch
from nnssl.plan import Plan, plan_from_dict
from nnssl.weights.adaptation_plan import KEY, KEYS, AdaptationPlan, network_kind, read_adaptation_plan
from nnssl.weights.importable import check_plans
from nnssl.weights.nnunet_training import SUPERVISED, is_training, read_training
from nnssl.weights.tensor_names import GATE, HEAD, SEGMENTATION, WRAPPERS, count_values, names_by_tensor

EXPORT_KEY = "nnssl_export"
"""Key of a file that was exported for a trainer with a network of its own. Its value describes the file for people."""

FIRST_OUTPUTS = "decoder.seg_layers.0.weight"
"""Name of a segmentation layer, from which the number of outputs is read."""


@dataclass(frozen=True, eq=False)
class OpenedCheckpoint:
    """A checkpoint and what it provides.

    Attributes:
        path: The file.
        content: The file's content, tensors on the CPU.
        provenance: Where the weights come from; None for a file in the adaptation-plan format.
        by_nnunet: Whether nnU-Net's training wrote the file.
    """

    path: Path
    content: dict[str, Any] = field(repr=False)
    provenance: Provenance | None = field(repr=False)
    by_nnunet: bool = False

    def without_content(self) -> "OpenedCheckpoint":
        """Return the checkpoint with an empty content, to keep its provenance in memory but not its tensors."""
        return replace(self, content={})

    def reopened(self) -> "OpenedCheckpoint":
        """Return the checkpoint with its content, which is read again if it was dropped."""
        return self if self.content else open_checkpoint(self.path)

    @cached_property
    def digest(self) -> str:
        """Digest of the file's bytes."""
        return file_digest(self.path)

    @property
    def label(self) -> str:
        """Description of the weights within a sentence."""
        if self.provenance is not None:
            done = "trained with labels" if self.provenance.method == SUPERVISED else "pretrained"
            return f"{self.provenance.stage}, {done} on {self.provenance.dataset_name}"
        return "a checkpoint made elsewhere"

    @property
    def made_elsewhere(self) -> bool:
        """Whether another program wrote the file, in the adaptation-plan format."""
        return self.provenance is None and KEY in self.content

    @property
    def own_provenance(self) -> Provenance:
        """Where the weights come from.

        Raises:
            UserError: If the file is neither a checkpoint of nnssl nor one of nnU-Net's training.
        """
        return self.provenance or parse_provenance(self.path, self.content)

    @property
    def _state(self) -> dict[str, Any]:
        """State beside nnU-Net's keys that a checkpoint of nnssl holds; empty for other files."""
        if self.provenance is None or self.by_nnunet:
            return {}
        state: dict[str, Any] = self.content["nnssl"]["state"]
        return state

    @property
    def choosing_probe(self) -> dict[str, Any] | None:
        """Online probe by whose Dice these weights were chosen, with the names of its cases; None if there is none."""
        state = self._state
        probe: dict[str, Any] | None = state.get("probe")
        return probe if probe is not None and probe["chose_weights"] else None

    @property
    def chosen(self) -> dict[str, Any] | None:
        """How short runs chose the method, with ``reason`` and ``scores``; None if the user named it."""
        state = self._state
        chosen: dict[str, Any] | None = state.get("chosen")
        return chosen

    @cached_property
    def plan(self) -> Plan:
        """Plan that the weights were pretrained with.

        Raises:
            UserError: As ``own_provenance`` and ``plan_of_pretraining``.
        """
        return plan_of_pretraining(self.own_provenance, str(self.path))

    def choose_configuration(self, wanted: str | None) -> str:
        """Return the wanted configuration of the plan in the file, or the one that the weights were pretrained with.

        Raises:
            UserError: If the file is not a checkpoint of nnssl.
            ArgumentError: If the plan has no such configuration.
        """
        provenance = self.own_provenance
        chosen = wanted or provenance.configuration
        if chosen not in provenance.plans["configurations"]:
            known = ", ".join(sorted(provenance.plans["configurations"]))
            raise ArgumentError(
                f"configuration must be one of {known} (in the plan of {self.path}), got {chosen}", "configuration"
            )
        return chosen

    def build_network(self, seed: int, patch: Sequence[int] | None = None) -> Any:
        """Return the network of the plan with random weights and as many outputs as the checkpoint has.

        Args:
            seed: Random seed of the weights.
            patch: Number of voxels of the patch; None for that of fine-tuning. Only Primus depends on it.

        Raises:
            UserError: As ``plan``.
        """
        planned = planned_configuration(self.plan.nnunet, self.own_provenance.configuration)
        weights = self.content["network_weights"]
        classes = weights[FIRST_OUTPUTS].shape[0] if FIRST_OUTPUTS in weights else 1
        architecture = architecture_of_patch(planned["architecture"], patch or planned["patch_size"])
        return build_network(architecture, len(planned["normalization_schemes"]), classes, seed)

    def load_into(self, network: Any) -> None:
        """Load the weights into the network that ``build_network`` returned.

        Raises:
            UserError: If the weights do not fit the network.
        """
        try:
            network.load_state_dict(self.content["network_weights"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{self.path}: its weights do not fit the network of its plan ({reason}); pretrain again"
            ) from error

    @cached_property
    def adaptation(self) -> AdaptationPlan | None:
        """Adaptation plan of a checkpoint made elsewhere; None for a checkpoint of nnssl.

        Raises:
            UserError: If the file is neither of the two, or its adaptation plan cannot be read.
        """
        if self.provenance is not None:
            return None
        if KEY in self.content:
            return read_adaptation_plan(self.path, self.content)
        if EXPORT_KEY in self.content:
            made = self.content[EXPORT_KEY]
            raise UserError(
                f"{self.path}: was exported for nnU-Net's {made['trainer']}, whose network no plan describes; take the "
                f"checkpoint that it was made from, {made['checkpoint']}; {ACCEPTED}"
            )
        raise UserError(f"{self.path}: holds no weights of a known kind; {ACCEPTED}")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Pretrained tensors, under every name that nnU-Net's network has for them.

        Raises:
            UserError: As ``adaptation``; or if the file holds no such tensors, or NaN.
        """
        plan = self.adaptation
        weights = _checked_weights(self.path, self.content["network_weights"])
        if plan is None:
            return _pretrained(weights, self.own_provenance)
        renamed = {_usual_name(name, plan): value for name, value in weights.items()}
        trained = {name: value for name, value in renamed.items() if name is not None}
        if not trained:
            raise UserError(
                f"{self.path}: has no weights under {plan.key_to_encoder} or {plan.key_to_stem}, which its {KEY} names; ask "
                "the author of the file for a correct one"
            )
        return trained

    def keeps_head(self, dataset_json: Mapping[str, Any]) -> bool:
        """Return whether the segmentation layers can be kept for a data set: they were trained with the same labels."""
        made = self.provenance
        if made is None or made.method != SUPERVISED or not (self.by_nnunet or made.pretrains(HEAD)):
            return False
        try:
            own, other = (_labels_of(each, str(self.path)) for each in (made.dataset_json, dataset_json))
        except UserError:
            return False
        return own == other

    def head_for(self, dataset_json: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the segmentation layers if they can be kept for a data set, else an empty dictionary."""
        if not self.keeps_head(dataset_json):
            return {}
        return {name: value for name, value in self.content["network_weights"].items() if SEGMENTATION in f".{name}"}

    def check_tensors(self) -> None:
        """Check that the file has pretrained tensors to transfer.

        Raises:
            UserError: As ``tensors``.
        """
        _ = self.tensors

    @property
    def untrained(self) -> int:
        """Number of values in the file that are a random initialisation only."""
        return count_values(self.content["network_weights"]) - count_values(self.tensors)

    @cached_property
    def seeded(self) -> frozenset[str]:
        """Names of the tensors that are a random initialisation only."""
        return frozenset(set(self.content["network_weights"]) - set(self.tensors))

    @property
    def architecture(self) -> dict[str, Any]:
        """Network of the weights, in the form of a plan's configuration."""
        return self._planned["architecture"] if self.adaptation is None else self.adaptation.architecture()

    @property
    def channel_names(self) -> tuple[str, ...] | None:
        """Channels of the images that the weights are for; None if the file does not name them."""
        if self.adaptation is not None:
            return None
        names = self.own_provenance.dataset_json["channel_names"]
        return tuple(str(names[key]) for key in sorted(names, key=int))

    @property
    def num_channels(self) -> int:
        """Number of channels of the images that the weights are for."""
        if self.adaptation is None:
            return len(self.own_provenance.dataset_json["channel_names"])
        return self.adaptation.pretrain_num_input_channels

    @property
    def patch_vox(self) -> tuple[int, ...]:
        """Patch that learned positions are for, (z, y, x) or (y, x)."""
        return tuple(self._planned["patch_size"]) if self.adaptation is None else self.adaptation.patch_vox

    @property
    def batch_size(self) -> int:
        """Batch size of fine-tuning in the plan."""
        return int(self._planned["batch_size"])

    @property
    def trained_patch_vox(self) -> tuple[int, ...]:
        """Patch of the last stage of pretraining, (z, y, x) or (y, x): that of its settings, or else the plan's."""
        provenance = self.own_provenance
        own = tuple(provenance.settings.get("patch_size") or ())
        return own or self.plan.configuration(provenance.configuration).patch_size

    @property
    def pretraining(self) -> dict[str, Any]:
        """``spacing_mm``, ``patch_vox``, ``channel_names``, ``plans_name`` and ``configuration`` of the pretraining.

        Each is None if the file does not say. An exported file was made for another network than that of the pretraining.
        """
        plan, provenance = self.adaptation, self.provenance
        if plan is not None:
            return {
                "spacing_mm": None if plan.spacing_mm is None else list(plan.spacing_mm),
                "patch_vox": list(plan.patch_vox),
                "channel_names": None,
                "plans_name": None,
                "configuration": None,
            }
        assert provenance is not None
        return provenance.origin or {
            "spacing_mm": list(self._planned["spacing"]),
            "patch_vox": list(self.patch_vox),
            "channel_names": list(self.channel_names or ()),
            "plans_name": provenance.plans_name,
            "configuration": provenance.configuration,
        }

    @property
    def citations(self) -> tuple[dict[str, Any], ...]:
        """Publications that the file asks to cite."""
        found = self.content.get("citations")
        return tuple(found) if isinstance(found, (list, tuple)) else ()

    @cached_property
    def _planned(self) -> dict[str, Any]:
        provenance = self.own_provenance
        planned: dict[str, Any] = planned_configuration(provenance.plans, provenance.configuration)
        return planned


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """Open a checkpoint of nnssl, of nnU-Net's training, or one made elsewhere, without executing anything in it.

    Raises:
        UserError: If the file is missing, unsafe or damaged, a checkpoint of another version of nnssl, a checkpoint of nnU-Net's
            training without plans or with another network than theirs, or if its plans name other classes than networks and
            layers (``nnssl.weights.importable``).
    """
    content = load_tensors(path)
    if "nnssl" in content:
        provenance = parse_provenance(path, content)
        check_plans(path, provenance.plans)
        return OpenedCheckpoint(path, content, provenance)
    if KEY in content or EXPORT_KEY in content or not is_training(content):
        return OpenedCheckpoint(path, content, None)
    return OpenedCheckpoint(path, *read_training(path, content), by_nnunet=True)


def plan_of_pretraining(provenance: Provenance, what: str) -> Plan:
    """Return the plan that weights were pretrained with.

    Args:
        provenance: Where the weights come from.
        what: Description of the weights for an error message.

    Raises:
        UserError: If the weights were trained with labels, or exported, so that their plan is that of another network; or if
            the plan is of another version.
    """
    if provenance.method == SUPERVISED:
        raise UserError(
            f"{what}: trained by nnU-Net with labels, and this needs a plan of nnssl; pretrain from these weights by "
            "nnssl_pretrain --init, and use that checkpoint"
        )
    if provenance.origin is not None:
        raise UserError(
            f"{what}: exported for {provenance.configuration} of {provenance.plans_name}, without the plan of the "
            "pretraining; use the checkpoint of nnssl_pretrain that the file was exported from"
        )
    return plan_from_dict(provenance.plans, what)


def _pretrained(weights: Mapping[str, Tensor], provenance: Provenance) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of nnssl names as pretrained, under all their names."""
    pretrained = provenance.pretrained
    if provenance.pretrains("transformer."):
        pretrained = (*pretrained, GATE)  # set when the weights leave pretraining, so that the transformer takes part
    return {
        name: weights[name]
        for names in names_by_tensor(weights)
        if any(name.startswith(prefix) for name in names for prefix in pretrained)
        for name in names
        if SEGMENTATION not in f".{name}"
    }


def _usual_name(name: str, plan: AdaptationPlan) -> str | None:
    """Return the name of an encoder or stem tensor in nnU-Net's network; None for all other tensors.

    The file gives the prefixes of both: the online encoder of a siamese method, for example, has its own prefix.
    """
    usual = KEYS[network_kind(plan.network_class)]
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    for key in ("key_to_lpe", "key_to_encoder", "key_to_stem"):
        theirs = getattr(plan, key)
        if theirs and usual[key] and (name == theirs or name.startswith(f"{theirs}.")):
            return usual[key] + name.removeprefix(theirs)
    return None


def _checked_weights(path: Path, weights: Any) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(
            f"{path}: network_weights must map names to tensors; download or copy the file again; {ACCEPTED}"
        )
    broken = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise UserError(f"{path}: {broken} holds NaN or infinite values; take an earlier checkpoint")
    return dict(weights)


def _labels_of(dataset_json: Mapping[str, Any], source: str) -> tuple[Labels, list[int] | None]:
    """Return the labels of a dataset.json and the order of its regions, however they are spelt."""
    labels = read_labels(dataset_json, source)
    return labels, read_class_order(dataset_json, labels, source)
