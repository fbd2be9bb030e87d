"""The method of a checkpoint, with everything that does not leave with the weights: heads, teacher and queue."""

from pathlib import Path
from typing import Any

import torch

from nnssl.checkpoint import Provenance
from nnssl.methods import find_stage
from nnssl.methods.settings import settings_of_run
from nnssl.methods.state import load_method_state
from nnssl.networks.backbone import seeded
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint


def restore_method(path: Path, device: torch.device, trained: bool = True) -> tuple[Any, Provenance]:
    """Build the method of a checkpoint and load its state.

    Args:
        path: A checkpoint of nnssl pretraining.
        device: Where to compute.
        trained: As in ``method_of``.

    Returns:
        The method, as ``method_of`` returns it, and where its weights come from.

    Raises:
        UserError: As ``open_checkpoint`` and ``method_of``.
    """
    checkpoint = open_checkpoint(path)
    return method_of(checkpoint, device, trained), checkpoint.own_provenance


def method_of(checkpoint: OpenedCheckpoint, device: torch.device, trained: bool = True) -> Any:
    """Build the method of a checkpoint with everything that does not leave with the weights: heads, teacher and queue.

    Args:
        checkpoint: A checkpoint of nnssl pretraining.
        device: Where to compute.
        trained: False for the method as the run started, before any weights of an earlier stage.

    Returns:
        The method in evaluation mode, without gradients.

    Raises:
        UserError: If the checkpoint was exported or made elsewhere, or its state does not fit the method.
    """
    plan, provenance = checkpoint.plan, checkpoint.own_provenance
    stage = find_stage(provenance.stage)[1]
    implementation = stage.load()
    settings = settings_of_run(implementation.defaults, provenance.settings, str(checkpoint.path))
    planned = plan.configuration(provenance.configuration)
    configuration = planned.for_stage(stage.name, settings.training.patch_size)
    network = checkpoint.build_network(provenance.seed, configuration.patch_size)
    method: Any = seeded(lambda: implementation(network, settings, configuration), provenance.seed, stage.name)
    if trained:
        patches = (planned.patch_size, configuration.patch_size)
        load_method_state(checkpoint.path, checkpoint.content, network, method, patches)
    return method.eval().requires_grad_(False).to(device)
