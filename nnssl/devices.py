"""The device to compute on."""

from typing import TYPE_CHECKING

from nnssl.errors import ArgumentError
from nnssl.log import logger

if TYPE_CHECKING:
    import torch


def find_device(device: "torch.device | str | None" = None) -> "torch.device":
    """Return the requested device. Without a request, choose a GPU if one is available, else the CPU, and print the choice.

    Args:
        device: ``cpu``, ``cuda``, ``mps`` or a PyTorch device; None to choose.

    Raises:
        ArgumentError: If the device is unknown to PyTorch or not available on this machine.
    """
    import torch

    if device is None:
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        reason = "GPU found" if chosen == "cuda" else "no CUDA GPU found"
        logger.info(f"Device: {chosen} ({reason})")
        return torch.device(chosen)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device must be cpu, cuda or mps, got {device}", "device") from error
    missing = (found.type == "cuda" and not torch.cuda.is_available()) or (
        found.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ArgumentError(f"device must be available to PyTorch on this machine, got {found.type}; use cpu", "device")
    return found
