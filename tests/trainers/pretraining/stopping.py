"""Stops a pretraining run in the middle, as a batch scheduler does."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainers.pretraining import pretrain_trainer


@contextmanager
def stopped_at(monkeypatch, step: int) -> Iterator[None]:
    """Send SIGTERM to a pretraining run before this step inside a ``with`` block, and expect the run to exit."""
    original = pretrain_trainer.PretrainTrainer.train_step

    def interrupted(self, batch):
        if self.current_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain_trainer.PretrainTrainer, "train_step", interrupted)
        with pytest.raises(SystemExit):
            yield
