"""How long a run still takes: its pace, measured on its own steps, one line that says when it ends, and a progress bar.

Only durations are used, and no result of a run depends on them.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from nnssl.log import lines_above

WARM_UP_STEPS = 2
"""Number of first steps that are not measured: they compile the network, choose kernels and wait for the first patches."""
MEASURED_STEPS = 10
"""Number of measured steps after which a run says when it will end."""
SLOW_STEPS, SLOW_S = 3, 30.0
"""A run with slow steps says so earlier: after this number of measured steps that together took so many seconds."""
RECENT_STEPS = 1000
"""Number of last steps that the pace is measured on, including the time between them for validation and checkpoints."""
REFRESH_S = 1.0
"""Least interval in seconds between two updates of the bar; each one waits for the loss of a step."""


class Pace:
    """The time per step of a run, over its last steps.

    Args:
        clock: Function that returns the time in seconds from any starting point.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._warm_up = WARM_UP_STEPS
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)

    def step(self) -> None:
        """Record that a step has just ended."""
        if self._warm_up > 1:
            self._warm_up -= 1
        else:
            self._ends.append(self._clock())

    @property
    def measured_steps(self) -> int:
        """Number of steps that the pace is measured on."""
        return max(0, len(self._ends) - 1)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step, including the time between steps; None if no step was measured."""
        return (self._ends[-1] - self._ends[0]) / self.measured_steps if self.measured_steps else None

    @property
    def seconds_per_step_so_far(self) -> float | None:
        """Seconds per step, including the time since the last one, such as the validation at the end of an epoch."""
        return (self._clock() - self._ends[0]) / self.measured_steps if self.measured_steps else None

    @property
    def is_meaningful(self) -> bool:
        """Whether enough steps were measured to say when the run will end."""
        measured = (self.seconds_per_step or 0.0) * self.measured_steps
        return self.measured_steps >= MEASURED_STEPS or (self.measured_steps >= SLOW_STEPS and measured >= SLOW_S)


class RunProgress:
    """Shows how far a run is: a bar on a terminal, and in any case one line that says when the run will end.

    Args:
        tell: Function that passes a line to the user.
        device: Device of the run.
        is_first: Whether this is the first process; the others show nothing.
        clock: Function that returns the time in seconds from any starting point.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        device: torch.device,
        is_first: bool = True,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._tell, self._device, self._is_first, self._clock = tell, device, is_first, clock
        self._pace = Pace(clock)
        self._total = self._done = 0
        self._name = ""
        self._announced = False
        self._bar: Any = None
        self._shown_s = -REFRESH_S

    @contextmanager
    def following(self, name: str, first_step: int, total_steps: int) -> Iterator[None]:
        """Follow the steps of a run inside a ``with`` block; the bar appears with the first step and disappears at the end.

        Args:
            name: Name of the run, which begins the line and the bar.
            first_step: Step that the run begins or resumes at.
            total_steps: Number of steps of the whole run.
        """
        self._name, self._done, self._total = name, first_step, total_steps
        self._pace, self._announced = Pace(self._clock), False
        with lines_above(self._hide_bar, self._draw_bar):
            try:
                yield
            finally:
                if self._bar is not None:
                    self._bar.close()
                self._bar = None
                self._total = 0

    def step(self, loss: Any) -> None:
        """Record that a step has just ended; outside ``following`` nothing happens.

        Args:
            loss: Loss of the step, which the bar shows; anything that ``float`` takes.
        """
        if not self._total or not self._is_first:
            return
        self._done += 1
        if not self._announced and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels of the steps that are measured may still be waiting
        self._pace.step()
        self._advance_bar(loss)
        if not self._announced and self._pace.is_meaningful and self._done < self._total:
            self._announced = True
            self._tell(f"{self._name}: {self._expected_end()}")

    def left(self) -> str:
        """Return the time that the run still takes, as the end of a line: ``", 3.2 h left"``; empty if not measured or over."""
        per_step = self._pace.seconds_per_step_so_far
        if per_step is None or self._done >= self._total:
            return ""
        return f", {format_duration(per_step * (self._total - self._done))} left"

    def _expected_end(self) -> str:
        per_step = self._pace.seconds_per_step
        assert per_step is not None
        now, left = datetime.now(), per_step * (self._total - self._done)
        end = now + timedelta(seconds=left)
        day = "" if end.date() == now.date() else f"{end:%a %d %b %Y}, "
        return f"{per_step:.3g} s per step, {format_duration(left)} left, ends at about {day}{end:%H:%M}"

    def _advance_bar(self, loss: Any) -> None:
        if self._bar is None:
            if not sys.stderr.isatty():
                return
            self._bar = tqdm(
                desc=self._name,
                initial=self._done - 1,
                total=self._total,
                unit="step",
                mininterval=REFRESH_S,
                dynamic_ncols=True,
                leave=False,
            )
        if self._clock() - self._shown_s >= REFRESH_S:
            self._shown_s = self._clock()
            self._bar.set_postfix_str(f"loss {float(loss):.4f}", refresh=False)
        self._bar.update()

    def _hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def _draw_bar(self) -> None:
        if self._bar is not None:
            self._bar.refresh()


def format_duration(seconds: float) -> str:
    """Return a duration in a readable unit: ``50 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for limit, unit, text in ((90, 1, "{:.0f} s"), (5400, 60, "{:.0f} min"), (172800, 3600, "{:.1f} h")):
        if seconds < limit:
            return text.format(seconds / unit)
    return f"{seconds / 86400:.1f} days"
