"""Stopping a run from outside: after SIGTERM the loop ends with the current step."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from nnssl.distributed import is_distributed

CHECK_STEPS = 20
"""With several processes, number of steps between two checks whether any of them received SIGTERM."""
TERMINATED = 143
"""Exit code after SIGTERM, as reported by shells."""


class StopRequest:
    """Records SIGTERM inside a ``with`` block and restores the previous handler afterwards."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self, step: int, device: torch.device) -> bool:
        """Return whether to stop after this step; the answer is the same in all processes.

        Args:
            step: Number of steps so far; several processes communicate every ``CHECK_STEPS`` of them.
            device: Device of the process group.
        """
        if not is_distributed():
            return self.asked
        if step % CHECK_STEPS:
            return False
        asked = torch.tensor([float(self.asked)], device=device)
        dist.all_reduce(asked)
        return bool(asked.item() > 0)
