"""What a pretraining checkpoint holds of a run beside nnU-Net's keys, and how it is put back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.methods.protocol import Exported, PretextMethod
from nnssl.methods.state import load_method_state, method_state
from trainers.pretraining.epoch import Epoch


def network_weights(network: nn.Module, exported: Exported | None) -> dict[str, Tensor]:
    """Return the state of the plan's network, with the values that a finished stage fixes where one is given."""
    weights = network.state_dict()
    if exported is None:
        return weights
    return {
        name: torch.full_like(value, exported.fixed[name]) if name in exported.fixed else value
        for name, value in weights.items()
    }


def run_state(network: nn.Module, method: PretextMethod, epoch: Epoch, probe: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a run needs to go on within an epoch: the method's own state, the epoch so far, the probe's results."""
    return {
        "method": method_state(network, method),
        "epoch_records": [{key: float(value) for key, value in record.items()} for record in epoch.records],
        "epoch_embeddings": epoch.embeddings,
        "probe": probe,
    }


def read_state(
    path: Path, content: dict[str, Any], network: nn.Module, method: PretextMethod, device: torch.device
) -> tuple[Epoch, dict[str, Any] | None]:
    """Put the state of a checkpoint into network and method, and return its epoch so far and its probe's results.

    Raises:
        UserError: the method of the checkpoint has other parts than this one.
    """
    load_method_state(path, content, network, method)
    state = content["nnssl"]["state"]
    epoch = Epoch(state["epoch_records"], [value.to(device) for value in state["epoch_embeddings"]])
    return epoch, state["probe"]
