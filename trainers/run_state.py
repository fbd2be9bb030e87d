"""What a pretraining checkpoint holds of a run beside nnU-Net's keys, and how it is put back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.methods.protocol import Exported, PretextMethod


def network_weights(network: nn.Module, exported: Exported | None) -> dict[str, Tensor]:
    """Return the state of the plan's network, with the values that a finished stage fixes where one is given."""
    weights = network.state_dict()
    if exported is None:
        return weights
    return {
        name: torch.full_like(value, exported.fixed[name]) if name in exported.fixed else value
        for name, value in weights.items()
    }


def method_state(network: nn.Module, method: PretextMethod) -> dict[str, Tensor]:
    """Return the state of what a method adds to the network: heads, teacher, queue."""
    in_network = {value.data_ptr() for value in network.state_dict().values()}
    return {name: value for name, value in method.state_dict().items() if value.data_ptr() not in in_network}


def run_state(
    network: nn.Module, method: PretextMethod, records: list[dict[str, Any]], embeddings: list[Tensor]
) -> dict[str, Any]:
    """Return what a run needs to go on in the middle of an epoch: the method's own state and the epoch so far."""
    return {
        "method": method_state(network, method),
        "epoch_records": [{key: float(value) for key, value in record.items()} for record in records],
        "epoch_embeddings": embeddings,
    }


def read_state(
    path: Path, content: dict[str, Any], network: nn.Module, method: PretextMethod, device: torch.device
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Put the state of a checkpoint into network and method, and return the records and embeddings of its epoch.

    Raises:
        UserError: the method of the checkpoint has other parts than this one.
    """
    network.load_state_dict(content["network_weights"])
    state = content["nnssl"]["state"]
    if set(method_state(network, method)) != set(state["method"]):
        raise UserError(f"{path}: its heads differ from those of this nnssl; start again with --restart")
    # what the method shares with the network is loaded already, so only unexpected keys would be a mistake
    result = method.load_state_dict(state["method"], strict=False)
    assert not result.unexpected_keys
    return list(state["epoch_records"]), [value.to(device) for value in state["epoch_embeddings"]]
