"""State that a method adds to the network: how a checkpoint stores it, and how it is restored."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnssl.errors import UserError


def method_state(network: nn.Module, method: nn.Module) -> dict[str, Tensor]:
    """Return the state that a method adds to the network: heads, teacher, queue."""
    in_network = {value.data_ptr() for value in network.state_dict().values()}
    return {name: value for name, value in method.state_dict().items() if value.data_ptr() not in in_network}


def load_method_state(path: Path, content: dict[str, Any], network: nn.Module, method: nn.Module) -> None:
    """Load the network's weights and the method's own state from a checkpoint.

    Args:
        path: Path of the checkpoint, for the error message.
        content: Content of the checkpoint.
        network: Network of the plan.
        method: Method that was built with this network.

    Raises:
        UserError: If the method in the checkpoint has other parts than this one, or parts of another size.
    """
    state = content["nnssl"]["state"]["method"]
    try:
        network.load_state_dict(content["network_weights"])
        if set(method_state(network, method)) != set(state):
            names = sorted(set(method_state(network, method)) ^ set(state))
            raise RuntimeError(f"{len(names)} tensors exist on one side only, the first is {names[0]}")
        # Tensors that the method shares with the network are missing here, because they are already loaded.
        result = method.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path}: the heads differ from those of this version of nnssl ({reason}); pretrain again with --restart"
        ) from error
    assert not result.unexpected_keys
