"""Errors of processes that a job is launched in."""

from dataclasses import dataclass

import pytest
import torch

from nnssl.errors import ArgumentError, DivergedError, UserError
from trainers.launch import launch


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
