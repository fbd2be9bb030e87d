"""Checkpoints are written as often as a share of the time allows."""

import pytest

from trainers.pretraining import saving
from trainers.pretraining.saving import SAVING_SHARE, SavingCadence


def test_the_next_checkpoint_is_due_once_the_last_one_is_a_small_share_of_the_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(saving, "time", lambda: now)
    cadence = SavingCadence()
    now = 100.1
    assert cadence.is_due()  # nothing has been written, so nothing is known to take long
    now = 103.0
    cadence.saved(started=101.0)
    wait = 2 / SAVING_SHARE
    assert wait == pytest.approx(40)
    now = 103 + wait - 0.1
    assert not cadence.is_due()
    now = 103 + wait + 0.1
    assert cadence.is_due()
