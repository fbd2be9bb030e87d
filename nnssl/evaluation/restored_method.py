"""A pretext method as a checkpoint left it, with everything that does not leave with the weights: heads, teacher, queue."""

from pathlib import Path
from typing import Any

import torch

from nnssl.checkpoint import Provenance, read_checkpoint
from nnssl.methods import find_stage
from nnssl.methods.settings import settings_of_run
from nnssl.methods.state import load_method_state
from nnssl.networks.backbone import build_network, planned_configuration, seeded
from planners.plan import plan_from_dict


def restore_method(path: Path, device: torch.device, trained: bool = True) -> tuple[Any, Provenance]:
    """Build the method of a checkpoint and load its state.

    Args:
        path: of a checkpoint of nnssl pretraining.
        device: where to compute.
        trained: False for the method as the run started, before any weights of an earlier stage.

    Returns:
        The method in evaluation mode, without gradients, and where its weights come from.

    Raises:
        UserError: it is no checkpoint of nnssl pretraining, or its state does not fit the method.
    """
    content, provenance = read_checkpoint(path)
    plan = plan_from_dict(provenance.plans, str(path))
    stage = find_stage(provenance.stage)[1]
    implementation = stage.load()
    settings = settings_of_run(implementation.defaults, provenance.settings, str(path))
    planned = planned_configuration(plan.nnunet, provenance.configuration)
    weights = content["network_weights"]
    classes = [value.shape[0] for name, value in weights.items() if name == "decoder.seg_layers.0.weight"]
    channels = len(planned["normalization_schemes"])
    network = build_network(planned["architecture"], channels, classes[0] if classes else 1, provenance.seed)
    configuration = plan.configuration(provenance.configuration)
    method: Any = seeded(lambda: implementation(network, settings, configuration), provenance.seed, stage.name)
    if trained:
        load_method_state(path, content, network, method)
    return method.eval().requires_grad_(False).to(device), provenance
