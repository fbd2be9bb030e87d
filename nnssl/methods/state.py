"""State that a method adds to the network: how a checkpoint stores it, and how it is restored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.primus_positions import fit_positions


def method_state(network: nn.Module, method: nn.Module) -> dict[str, Tensor]:
    """Return the state that a method adds to the network: heads, teacher, queue."""
    in_network = {value.data_ptr() for value in network.state_dict().values()}
    return {name: value for name, value in method.state_dict().items() if value.data_ptr() not in in_network}


def load_method_state(
    path: Path,
    content: dict[str, Any],
    network: nn.Module,
    method: nn.Module,
    patches: tuple[Sequence[int], Sequence[int]] | None = None,
) -> None:
    """Load the network's weights and the method's own state from a checkpoint.

    Args:
        path: Path of the checkpoint, for the error message.
        content: Content of the checkpoint.
        network: Network of the plan.
        method: Method that was built with this network.
        patches: Patch that the weights in the checkpoint belong to, and that of the network; None if they are the same.

    Raises:
        UserError: If the method in the checkpoint has other parts than this one, or parts of another size.
    """
    state = content["nnssl"]["state"]["method"]
    weights = dict(content["network_weights"])
    if patches is not None:
        fit_positions(weights, *patches, network)
    try:
        network.load_state_dict(weights)
        if set(method_state(network, method)) != set(state):
            names = sorted(set(method_state(network, method)) ^ set(state))
            raise RuntimeError(f"{len(names)} tensors exist on one side only, the first is {names[0]}")
        # Tensors that the method shares with the network are missing here, because they are already loaded.
        result = method.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path}: the heads differ from those of this version of nnssl ({reason}); delete the results of this stage and "
            "pretrain again"
        ) from error
    assert not result.unexpected_keys
