"""Stopping a run from outside: SIGTERM is taken note of, and the loop leaves at the end of a step."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from nnssl.distributed import is_distributed

CHECK_STEPS = 20
"""On several processes, steps between two looks at whether any of them was asked to stop."""
TERMINATED = 143
"""Exit code after SIGTERM, as shells report it."""


class StopRequest:
    """Takes note of SIGTERM inside a ``with`` block and puts the earlier handler back afterwards."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._take_note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _take_note(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self, step: int, device: torch.device) -> bool:
        """Return whether to leave after this step; all processes get the same answer.

        Args:
            step: steps taken so far; several processes ask one another every ``CHECK_STEPS`` of them.
            device: of the process group.
        """
        if not is_distributed():
            return self.asked
        if step % CHECK_STEPS:
            return False
        asked = torch.tensor([float(self.asked)], device=device)
        dist.all_reduce(asked)
        return bool(asked.item() > 0)
