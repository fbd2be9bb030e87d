"""How often a run writes a checkpoint: as often as a small share of its time allows."""

from time import time

SAVING_SHARE = 0.05
"""Share of a run's time that writing checkpoints may take."""


class SavingCadence:
    """Decides when the next checkpoint is due, from how long the last one took to write."""

    def __init__(self) -> None:
        self._last_save = time()
        self._seconds = 0.0

    def is_due(self) -> bool:
        """Return whether enough time has passed since the last checkpoint to write another one."""
        return time() - self._last_save > self._seconds / SAVING_SHARE

    def saved(self, started: float) -> None:
        """Record that a checkpoint has just been written.

        Args:
            started: Time at which writing began, in seconds as ``time.time`` returns it.
        """
        self._last_save = time()
        self._seconds = self._last_save - started
