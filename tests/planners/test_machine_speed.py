"""The speed of the machine: multiply-adds of a layer over the fastest of several passes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from planners import machine_speed


@pytest.mark.parametrize("axes", [2, 3])
def test_the_fastest_pass_counts_and_its_work_is_what_torch_counts(monkeypatch, axes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])  # passes of 4, 2 and 3 seconds
    monkeypatch.setattr(machine_speed, "perf_counter", lambda: next(times))
    with FlopCounterMode(display=False) as counted:
        speed = machine_speed.measure_speed(axes)
    assert speed == pytest.approx(counted.get_total_flops() / 2 / machine_speed.REPEATS / 2.0, rel=1e-6)
