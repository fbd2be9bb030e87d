import os
import signal

import pytest

from nnssl.data.jobs import run_jobs
from nnssl.errors import UserError


def double(job):
    return job * 2


def fail_at_three(job):
    if job == 3:
        raise UserError("three: is not wanted")
    return job


def die_at_three(job):
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_job_is_done_once(processes):
    assert sorted(run_jobs(double, range(20), processes, None)) == list(range(0, 40, 2))


def test_jobs_are_taken_as_they_are_needed():
    taken = []

    def jobs():
        for job in range(30):
            taken.append(job)
            yield job

    most = max(len(taken) - done for done, _ in enumerate(run_jobs(double, jobs(), 2, None)))
    assert len(taken) == 30
    assert most <= 4


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_job_comes_through(processes):
    with pytest.raises(UserError, match="three: is not wanted"):
        list(run_jobs(fail_at_three, range(1000), processes, None))


def test_a_killed_process_gives_one_error_that_names_job_and_signal():
    with pytest.raises(
        UserError, match=r"^3: the process that worked on it ended by signal 9 \(SIGKILL\); run the command"
    ):
        list(run_jobs(die_at_three, range(10), 2, None))
