"""Commands and their workers that the user or a batch scheduler stops: exit code, one line, and no process left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl.cli.command import CommandParser, add_verbose_argument, run_command
from nnssl.errors import UserError
from nnssl.log import print_line
from tests.waiting import HUNG_S, has_ended, wait_until

ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
WORK = """
import os, sys, time
from pathlib import Path
from nnssl.cli.command import CommandParser, add_verbose_argument, run_command
from nnssl.data.jobs import run_jobs

def work(job):
    Path(sys.argv[1], f"{os.getpid()}").touch()
    time.sleep(1800)

def run(args):
    list(run_jobs(work, range(100), 2, None))

if __name__ == "__main__":
    parser = CommandParser("work")
    add_verbose_argument(parser)
    sys.exit(run_command(parser, run, []))
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


def children_of(process: int) -> list[int]:
    """Return the processes that were spawned by a process to do jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process and "spawn_main" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    ("moment", "signum", "code", "word"), [("starting", *ENDS[0]), ("working", *ENDS[0]), ("starting", *ENDS[1])]
)
def test_workers_end_without_a_word_when_their_command_is_stopped(tmp_path, moment, signum, code, word):
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "begun").mkdir()
    command = [sys.executable, str(tmp_path / "work.py"), str(tmp_path / "begun")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        if moment == "working":
            wait_until(lambda: len(list((tmp_path / "begun").iterdir())) == 2)
        else:
            wait_until(lambda: len(children_of(process.pid)) == 2)
        workers = children_of(process.pid)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)  # as a terminal does
        else:
            process.send_signal(signum)
        assert ends(process) == (code, [f"work: {word}; run the same command again to resume"])
        wait_until(lambda: all(map(has_ended, workers)))


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
