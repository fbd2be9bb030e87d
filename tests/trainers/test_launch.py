"""Errors of processes that a job is launched in."""

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nnssl.errors import ArgumentError, DivergedError, UserError
from tests.waiting import has_ended, wait_until
from trainers.launch import launch
from trainers.pretraining.stopping import StopRequest


@dataclass(frozen=True)
class Failing:
    """A job that fails in all processes."""

    error: Exception
    device: torch.device = torch.device("cpu")


def fail(job: Failing) -> None:
    raise job.error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ArgumentError("epochs must be at least 1, got 0", "epochs"), UserError),
        (DivergedError("loss is nan"), DivergedError),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_errors_that_callers_handle_arrive_from_other_processes(error, kind, processes):
    with pytest.raises(kind, match=str(error)):
        launch(fail, Failing(error), processes)


@dataclass(frozen=True)
class Waiting:
    """A job that waits for a signal in all processes, which say that they wait by files."""

    folder: Path
    device: torch.device = torch.device("cpu")


def wait_for_signal(job: Waiting) -> None:
    with StopRequest() as stop:
        (job.folder / str(os.getpid())).touch()
        wait_until(lambda: bool(stop.received))
        stop.end()


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_are_passed_on_to_all_processes(tmp_path, signum, error):
    def send() -> None:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(error) as raised:
        launch(wait_for_signal, Waiting(tmp_path), 2)
    sender.join()
    assert error is KeyboardInterrupt or raised.value.code == 143
    assert all(has_ended(int(path.name)) for path in tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
