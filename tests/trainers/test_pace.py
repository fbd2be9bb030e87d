"""The pace of a run on a clock that the test moves, and the bar on a terminal that is a text."""

import io
import re
import sys

import torch

from nnssl.log import lines_to, logger
from trainers.pace import MEASURED_STEPS, WARM_UP_STEPS, Pace, RunProgress, format_duration

CPU = torch.device("cpu")


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Follower:
    """A run whose steps take what the test says, and what it tells the user."""

    def __init__(self, is_first: bool = True) -> None:
        self.clock, self.told = Clock(), []
        self.progress = RunProgress(self.told.append, CPU, is_first, self.clock)

    def steps(self, *seconds: float) -> None:
        for each in seconds:
            self.clock.now += each
            self.progress.step(torch.tensor(0.25))


def test_first_steps_and_nothing_else_are_left_out_of_the_pace():
    clock = Clock()
    pace = Pace(clock)
    for seconds in (100.0, 40.0):
        clock.now += seconds
        pace.step()
    assert pace.seconds_per_step is None
    for seconds in (2.0, 4.0, 6.0):  # the last includes 2 s of validation between the steps
        clock.now += seconds
        pace.step()
    assert (pace.measured_steps, pace.seconds_per_step) == (3, 4.0)
    assert not pace.is_meaningful


def test_it_says_once_when_the_run_ends_after_enough_steps():
    run = Follower()
    with run.progress.following("reprec.generative", 0, 1000):
        run.steps(*[50.0] * WARM_UP_STEPS, *[2.0] * (MEASURED_STEPS - 1))
        assert run.told == []
        run.steps(2.0)
        (line,) = run.told
        assert re.fullmatch(
            r"reprec.generative: 2 s per step, 33 min left, ends at about (\w+ \d+ \w+ \d+, )?\d\d:\d\d", line
        )
        run.steps(*[2.0] * 50)
        assert run.told == [line]


def test_it_says_so_earlier_if_steps_are_slow():
    run = Follower()
    with run.progress.following("sam", 0, 100):
        run.steps(12.0, 12.0, 12.0, 12.0)
        assert run.told == []
        run.steps(12.0)
    assert "sam: 12 s per step, 19 min left" in run.told[0]


def test_a_resumed_run_says_it_again_for_the_steps_that_are_left():
    run = Follower()
    for first in (0, 980):
        with run.progress.following("sam", first, 1000):
            run.steps(*[3.0] * 12)
    assert ["49 min left" in run.told[0], "24 s left" in run.told[1]] == [True, True]


def test_a_line_of_an_epoch_ends_with_the_time_left_once_it_is_known():
    run = Follower()
    with run.progress.following("sam", 0, 8):
        run.steps(5.0, 5.0)
        assert run.progress.left() == ""
        run.steps(5.0, 5.0)
        assert run.progress.left() == ", 20 s left"
        run.clock.now += 4  # validation at the end of an epoch counts
        assert run.progress.left() == ", 28 s left"
        run.clock.now -= 4
        run.steps(5.0, 5.0, 5.0, 5.0)
        assert run.progress.left() == ""  # it is over
    run.steps(5.0)  # steps outside are not followed
    assert run.told == []


def show_terminal(monkeypatch) -> Terminal:
    """Return one text that both standard output and standard error go to from now on; pytest would undo it after a fixture."""
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    return both


def test_messages_are_whole_lines_above_the_bar(monkeypatch):
    run, terminal = Follower(), show_terminal(monkeypatch)
    with run.progress.following("sam", 40, 100):
        run.steps(5.0)
        logger.info("Epoch 3: loss 0.2500")
        run.steps(5.0, 5.0)
        logger.info("Epoch 4: loss 0.1250")
    logger.info("finished")
    written = terminal.getvalue()
    assert "sam:  41%" in written
    assert "43/100" in written
    assert "loss 0.2500" in written
    # what a terminal shows of a line is what follows the last return to its beginning
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in written.split("\n")]
    assert [line for line in shown if line] == ["Epoch 3: loss 0.2500", "Epoch 4: loss 0.1250", "finished"]


def test_lines_go_where_they_went_before(monkeypatch):
    run, received, terminal = Follower(), [], show_terminal(monkeypatch)
    with lines_to(received.append), run.progress.following("sam", 0, 100):
        run.steps(5.0)
        logger.info("in the log of a study")
    assert received == ["in the log of a study"]
    assert "sam" in terminal.getvalue()
    assert "in the log" not in terminal.getvalue()


def test_other_processes_show_nothing(monkeypatch):
    run, terminal = Follower(is_first=False), show_terminal(monkeypatch)
    with run.progress.following("sam", 0, 100):
        run.steps(*[5.0] * 50)
    assert run.told == []
    assert terminal.getvalue() == ""


def test_there_is_no_bar_without_a_terminal(capsys):
    run = Follower()
    with run.progress.following("sam", 0, 100):
        run.steps(*[5.0] * 50)
    assert len(run.told) == 1
    assert capsys.readouterr().err == ""


def test_durations():
    assert [format_duration(s) for s in (50, 600, 12600, 180000)] == ["50 s", "10 min", "3.5 h", "2.1 days"]
