"""What a method adds to the network, as a checkpoint holds it, and how it is put back."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnssl.errors import UserError


def method_state(network: nn.Module, method: nn.Module) -> dict[str, Tensor]:
    """Return the state of what a method adds to the network: heads, teacher, queue."""
    in_network = {value.data_ptr() for value in network.state_dict().values()}
    return {name: value for name, value in method.state_dict().items() if value.data_ptr() not in in_network}


def load_method_state(path: Path, content: dict[str, Any], network: nn.Module, method: nn.Module) -> None:
    """Put the weights and the method's own state of a checkpoint into network and method.

    Args:
        path: of the checkpoint, for the message.
        content: of the checkpoint.
        network: the plan's network.
        method: that was made with this network.

    Raises:
        UserError: the method of the checkpoint has other parts than this one, or parts of another size.
    """
    state = content["nnssl"]["state"]["method"]
    try:
        network.load_state_dict(content["network_weights"])
        if set(method_state(network, method)) != set(state):
            names = sorted(set(method_state(network, method)) ^ set(state))
            raise RuntimeError(f"{len(names)} tensors on one side only, first {names[0]}")
        # what the method shares with the network is loaded already
        result = method.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path}: its heads differ from those of this nnssl ({reason}); pretrain again with --restart"
        ) from error
    assert not result.unexpected_keys
