"""Commands and their workers that the user or a batch scheduler stops: exit code, one line, and no process left behind."""

import os
import signal
import subprocess
import sys

import pytest

from nnssl.cli.command import CommandParser, add_verbose_argument, run_command
from nnssl.errors import UserError
from nnssl.interrupts import ends_on_sigterm
from nnssl.log import print_line
from tests.waiting import HUNG_S, has_ended, wait_until

ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
SCRIPT = """
import os, multiprocessing, sys, time
from pathlib import Path
from nnssl.cli.command import CommandParser, add_verbose_argument, run_command
from nnssl.data.jobs import run_jobs
from nnssl.interrupts import pools_without_interrupts

def work(job):
    Path(sys.argv[1], f"{os.getpid()}").touch()
    time.sleep(1800)

def run_in_jobs(args):
    list(run_jobs(work, range(100), 2, None))

def run_in_pool(args):
    with pools_without_interrupts(), multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(work, range(100))

if __name__ == "__main__":
    parser = CommandParser("work")
    add_verbose_argument(parser)
    sys.exit(run_command(parser, globals()[sys.argv[2]], []))
elif sys.argv[3] == "starting":
    work(0)  # a worker that takes long to import
"""


def ends(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Return the exit code of a process and the lines of its standard error."""
    _, errors = process.communicate(timeout=HUNG_S)
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize(("signum", "code", "word"), ENDS)
def test_a_command_that_is_stopped_while_it_imports_ends_with_one_line(tmp_path, signum, code, word):
    command = [sys.executable, "-m", "nnssl.cli.pretrain", "-m", "reprec", "-d", "501"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Loading PyTorch")
        process.send_signal(signum)
        assert ends(process) == (code, [f"nnssl_pretrain: {word}; run the same command again to resume"])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("function", ["run_in_jobs", "run_in_pool"])
@pytest.mark.parametrize(
    ("moment", "signum", "code", "word"), [("starting", *ENDS[0]), ("working", *ENDS[0]), ("starting", *ENDS[1])]
)
def test_workers_end_without_a_word_when_their_command_is_stopped(tmp_path, function, moment, signum, code, word):
    (tmp_path / "work.py").write_text(SCRIPT)
    begun = tmp_path / "begun"
    begun.mkdir()
    command = [sys.executable, str(tmp_path / "work.py"), str(begun), function, moment]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: len(list(begun.iterdir())) == 2 or process.poll() is not None)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)  # as a terminal does
        else:
            process.send_signal(signum)
        assert ends(process) == (code, [f"work: {word}; run the same command again to resume"])
    wait_until(lambda: all(has_ended(int(path.name)) for path in begun.iterdir()))


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_only_the_first_process_of_torchrun_prints(monkeypatch, capsys, rank, printed):
    def fail(args):
        print_line("a line")
        raise UserError("an error")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", rank)
    parser = CommandParser("work")
    add_verbose_argument(parser)
    assert run_command(parser, fail, []) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (("a line\n", "work: error: an error\n") if printed else ("", ""))


def test_forked_processes_have_the_default_of_sigterm():
    """nnU-Net's pools fork; a Python handler in a worker is not called while it waits for a lock, and its pool would hang."""
    with ends_on_sigterm("command"):
        assert callable(signal.getsignal(signal.SIGTERM))
        child = os.fork()
        if child == 0:
            os._exit(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        assert os.waitpid(child, 0)[1] == 0
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
