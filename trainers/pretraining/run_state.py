"""The state of a run that a pretraining checkpoint stores besides nnU-Net's keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.methods.protocol import Exported, PretextMethod
from nnssl.methods.state import load_method_state, method_state
from nnssl.networks.primus_positions import fit_positions
from trainers.pretraining.epoch import Epoch


def network_weights(
    network: nn.Module, exported: Exported | None, patches: tuple[Sequence[int], Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Return the state of a stage's network.

    Args:
        network: Network of the stage.
        exported: Weights that a finished stage hands on, with the values that it fixes and for the plan's patch; None for the
            state as it is.
        patches: Number of voxels of the stage's patch and of the plan's; None if they are the same.
    """
    weights: dict[str, Tensor] = network.state_dict()
    if exported is None:
        return weights
    if patches is not None:
        fit_positions(weights, *patches, network)
    return {
        name: torch.full_like(value, exported.fixed[name]) if name in exported.fixed else value
        for name, value in weights.items()
    }


def run_state(network: nn.Module, method: PretextMethod, epoch: Epoch, measured: dict[str, Any]) -> dict[str, Any]:
    """Return what a run needs to resume within an epoch: state of the method, records of the epoch, measurements so far."""
    return {
        "method": method_state(network, method),
        "epoch_records": [{key: float(value) for key, value in record.items()} for record in epoch.records],
        "epoch_embeddings": epoch.embeddings,
        **measured,
    }


def read_state(
    path: Path, content: dict[str, Any], network: nn.Module, method: PretextMethod, device: torch.device
) -> tuple[Epoch, dict[str, Any]]:
    """Load the state of a checkpoint into network and method; return its current epoch and its measurements.

    Raises:
        UserError: If the method of the checkpoint has other parts than this one.
    """
    load_method_state(path, content, network, method)
    state = content["nnssl"]["state"]
    epoch = Epoch(state["epoch_records"], [value.to(device) for value in state["epoch_embeddings"]])
    chosen = state.get("chosen")  # files of earlier versions lack it
    return epoch, {"probe": state["probe"], "retrieval": state["retrieval"], "chosen": chosen}
