"""A checkpoint of pretraining, opened once, and what is built from it: the network of its plan, or the whole method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnssl.checkpoint import Provenance, read_checkpoint
from nnssl.errors import UserError
from nnssl.methods import find_stage
from nnssl.methods.settings import settings_of_run
from nnssl.methods.state import load_method_state
from nnssl.networks.backbone import build_network, planned_configuration, seeded
from nnssl.plan import Plan, plan_from_dict

FIRST_OUTPUTS = "decoder.seg_layers.0.weight"


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint and the plan in it.

    Attributes:
        path: of the file.
        content: all of it.
        provenance: where the weights come from.
        plan: of the pretraining.
    """

    path: Path
    content: dict[str, Any]
    provenance: Provenance
    plan: Plan

    def build_network(self, seed: int) -> Any:
        """Return the network of the plan with random weights, and as many outputs as the checkpoint has."""
        planned = planned_configuration(self.plan.nnunet, self.provenance.configuration)
        weights = self.content["network_weights"]
        classes = weights[FIRST_OUTPUTS].shape[0] if FIRST_OUTPUTS in weights else 1
        return build_network(planned["architecture"], len(planned["normalization_schemes"]), classes, seed)


def open_pretrained(path: Path) -> Pretrained:
    """Open a checkpoint of pretraining.

    Raises:
        UserError: it is no checkpoint of nnssl, or one that was exported; or its plan is of another version.
    """
    content, provenance = read_checkpoint(path)
    return Pretrained(path, content, provenance, plan_of_pretraining(provenance, str(path)))


def plan_of_pretraining(provenance: Provenance, what: str) -> Plan:
    """Return the plan that weights were pretrained with.

    Args:
        provenance: of the weights.
        what: the weights, for an error message.

    Raises:
        UserError: the weights were exported, so that their plan is the one they were made for; or it is of another version.
    """
    if provenance.origin is not None:
        raise UserError(
            f"{what}: exported for {provenance.configuration} of {provenance.plans_name}, without the plan of the pretraining "
            "that pictures need; take the checkpoint of nnssl_pretrain that the file was made from"
        )
    return plan_from_dict(provenance.plans, what)


def restore_method(path: Path, device: torch.device, trained: bool = True) -> tuple[Any, Provenance]:
    """Build the method of a checkpoint and load its state.

    Args:
        path: of a checkpoint of nnssl pretraining.
        device: where to compute.
        trained: as ``method_of``.

    Returns:
        As ``method_of``, and where its weights come from.

    Raises:
        UserError: as ``open_pretrained`` and ``method_of``.
    """
    pretrained = open_pretrained(path)
    return method_of(pretrained, device, trained), pretrained.provenance


def method_of(pretrained: Pretrained, device: torch.device, trained: bool = True) -> Any:
    """Build the method of a checkpoint with all that does not leave with the weights: heads, teacher, queue.

    Args:
        pretrained: the checkpoint.
        device: where to compute.
        trained: False for the method as the run started, before any weights of an earlier stage.

    Returns:
        The method in evaluation mode, without gradients.

    Raises:
        UserError: the state of the checkpoint does not fit the method.
    """
    provenance = pretrained.provenance
    stage = find_stage(provenance.stage)[1]
    implementation = stage.load()
    settings = settings_of_run(implementation.defaults, provenance.settings, str(pretrained.path))
    network = pretrained.build_network(provenance.seed)
    configuration = pretrained.plan.configuration(provenance.configuration)
    method: Any = seeded(lambda: implementation(network, settings, configuration), provenance.seed, stage.name)
    if trained:
        load_method_state(pretrained.path, pretrained.content, network, method)
    return method.eval().requires_grad_(False).to(device)
