"""Stopping a run from outside: after SIGTERM or Ctrl-C the loop ends with the current step."""

import signal
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nnssl.distributed import is_distributed
from nnssl.interrupts import TERMINATED

CHECK_STEPS = 20
"""With several processes, number of steps between two checks whether any of them received a signal."""
IMPATIENT_S = 2.0
"""Time after which a second Ctrl-C ends the run at once; the same one may arrive twice, from the terminal and from a parent."""


class StopRequest:
    """Records SIGTERM and Ctrl-C inside a ``with`` block and restores the previous handlers afterwards."""

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = signum, monotonic()
        elif signum == signal.SIGINT and monotonic() - self._received_at > IMPATIENT_S:
            raise KeyboardInterrupt

    def agreed(self, step: int, device: torch.device) -> bool:
        """Return whether to stop after this step; the answer is the same in all processes.

        Args:
            step: Number of steps so far; several processes communicate every ``CHECK_STEPS`` of them.
            device: Device of the process group.
        """
        if not is_distributed():
            return bool(self.received)
        if step % CHECK_STEPS:
            return False
        received = torch.tensor([float(self.received)], device=device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        self.received = int(received.item())
        return bool(self.received)

    @property
    def name(self) -> str:
        """Name of what was received, for messages."""
        return "Ctrl-C" if self.received == signal.SIGINT else signal.Signals(self.received).name

    def end(self) -> NoReturn:
        """End the run as what was received asks for.

        Raises:
            KeyboardInterrupt: After Ctrl-C, which a command turns into exit code 130.
            SystemExit: After SIGTERM, with exit code 143.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)
