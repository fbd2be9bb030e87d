"""Commands that are killed with SIGKILL and started again end with the same results as commands that were never killed.

A killed process leaves only its files, and these change only when a file is written under a temporary name, renamed to its
final name, or deleted. Killing a process at any moment therefore leaves the same files as killing it just before the next of
these calls. The first test kills just before these calls, for every file from which a restarted command reads its progress;
the second test kills at random moments.
"""

import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nnssl.checkpoint import read_checkpoint
from nnssl.data.case_store import CaseStore
from nnssl.data.phantoms import write_phantom_dataset
from nnssl.environment import variables
from tests.waiting import HUNG_S
from trainers.pretraining import pretrain_trainer

NAME = "Dataset501_Phantoms"
CASES = Path("preprocessed", NAME, "nnsslPlans_cases_3d")
EPOCHS = 5
PLAN = ["plan_and_preprocess", "-d", "501", "--preset", "cpu", "--processes", "1", "-c", "3d_fullres_hybrid"]
PRETRAIN = [
    "pretrain", "-m", "reprec", "-d", "501", "--device", "cpu", "--workers", "1", "--epochs", str(EPOCHS),
    "--iterations-per-epoch", "2", "--set", "batch_size=2",
]  # fmt: skip
STAGES = {"Contrastive": "reprec.contrastive", "Generative": "reprec.generative"}
LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"


@dataclass(frozen=True)
class Moment:
    """The moment just before a function of ``os`` is called on a file whose path contains ``parts``.

    Temporary names end in ``.tmp``.
    """

    call: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """So many seconds of computing after a pretext stage has begun."""

    name: str
    seconds: float


def moment(call: str, *parts: str) -> Moment:
    return Moment(call, parts)


PREPROCESSING = (
    moment("replace", "nnsslPlans.json.", ".tmp"),  # the fingerprint exists, the plan does not
    moment("replace", "cases_3d", ".json.", ".tmp"),  # the voxels of a case exist, its description does not
)
PRETRAINING = (
    moment("replace", "Contrastive", "run.json.", ".tmp"),  # only the folder exists
    moment("fsync", "Contrastive", f"{LATEST}.", ".tmp"),  # the first checkpoint is partly written
    moment("replace", "Contrastive", f"{LATEST}.", ".tmp"),  # it is written but not renamed
    moment("unlink", "Contrastive", f"{LATEST}.", ".tmp"),  # it has just been renamed
    moment(
        "replace", "Contrastive", "metrics.csv.", ".tmp"
    ),  # an epoch has ended that neither table nor checkpoint contains
    moment("replace", "Contrastive", f"{LATEST}.", ".tmp"),  # the table contains it, the checkpoint does not
    moment("fsync", "Contrastive", f"{FINAL}.", ".tmp"),  # all steps are done
    moment("replace", "Contrastive", f"{FINAL}.", ".tmp"),
    moment("unlink", "Contrastive", f"/{LATEST}"),  # both checkpoints exist
    moment("replace", "Generative", "run.json.", ".tmp"),  # between the stages
    moment("unlink", "Generative", f"{LATEST}.", ".tmp"),
    moment("replace", "Generative", f"{FINAL}.", ".tmp"),
)


def die_at(moment: Moment) -> None:
    """Make this process kill itself just before the first such call."""
    original = getattr(os, moment.call)

    def die(target, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if all(part in path for part in moment.parts):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(target, *arguments, **options)

    setattr(os, moment.call, die)


def die_after(stage: Stage) -> None:
    """Let this process end at once, without any cleanup, after so much computing in a pretext stage.

    Only time in which this process computes is counted, so it ends in the stage however busy the machine is.
    """
    original = pretrain_trainer.opening_lines

    def start_timer(run, *arguments):
        if run.stage.name == stage.name:
            signal.setitimer(signal.ITIMER_PROF, stage.seconds)
        return original(run, *arguments)

    pretrain_trainer.opening_lines = start_timer


def run_command(command: list[str], log: Path, at: Moment | Stage | None) -> None:
    """Run a command in a process of its own, with its lines in a file, to its end or to a moment."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    Figure.savefig = lambda figure, *arguments, **options: None  # a picture takes longer than an epoch here
    if isinstance(at, Moment):
        die_at(at)
    elif at is not None:
        die_after(at)
    raise SystemExit(import_module(f"nnssl.cli.{command[0]}").main(command[1:]))


def run(root: Path, command: list[str], at: Moment | Stage | None = None) -> int:
    """Run a command on the folders below ``root``, to its end or to a moment, and return its exit code."""
    log = root / "log.txt"
    log.write_text("")
    with variables(**{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}):
        process = multiprocessing.get_context("spawn").Process(target=run_command, args=(command, log, at))
        process.start()
    process.join(HUNG_S)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode is not None, f"it hangs: {log.read_text()}"
    return process.exitcode


def finish(root: Path, command: list[str]) -> None:
    assert run(root, command) == 0, (root / "log.txt").read_text()


def kill_at(root: Path, command: list[str], at: Moment) -> None:
    code = run(root, command, at)
    assert code == -signal.SIGKILL, (at, code, (root / "log.txt").read_text())


def kill_in_stage(root: Path, stage: Stage) -> bool:
    """End the pretraining in the middle of a stage; returns whether it had not finished before."""
    code = run(root, PRETRAIN, stage)
    assert code in (0, -signal.SIGPROF), (stage, code, (root / "log.txt").read_text())
    return code == -signal.SIGPROF


def stage_folder(root: Path, stage: str) -> Path:
    return root / "results" / NAME / f"RepRec{stage}Trainer__nnsslPlans__3d_fullres_hybrid" / "fold_all"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    content, provenance = read_checkpoint(path)
    assert provenance.finished
    found = {**content["network_weights"], **content["nnssl"]["state"]["method"]}
    for number, entry in content["optimizer_state"]["state"].items():
        found |= {f"optimizer/{number}/{key}": value for key, value in entry.items() if torch.is_tensor(value)}
    return found


def make_raw(root: Path) -> Path:
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir(parents=True)
    write_phantom_dataset(root / "raw", NAME, 4, 0, (16, 24, 20), (2.5, 1.5, 1.7), labelled=False)
    return root


def assert_same_cases(folder: Path, other_folder: Path) -> None:
    first, second = CaseStore(folder), CaseStore(other_folder)
    assert len(first) == 4
    assert first.names == second.names
    for name in first.names:
        one, other = first.case(name), second.case(name)
        np.testing.assert_array_equal(one.read_box((0, 0, 0), one.shape), other.read_box((0, 0, 0), other.shape))
        np.testing.assert_array_equal(one.foreground_vox, other.foreground_vox)
    assert not list(other_folder.rglob("*.tmp"))


def assert_same_stage(folder: Path, other_folder: Path) -> None:
    first, second = tensors(folder / FINAL), tensors(other_folder / FINAL)
    assert set(first) == set(second)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    rows = list(csv.DictReader((other_folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(EPOCHS)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """A data set that was planned and pretrained on by commands that were not killed."""
    root = make_raw(tmp_path_factory.mktemp("killed") / "calm")
    finish(root, PLAN)
    finish(root, PRETRAIN)
    return root


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="open files are looked up in /proc")
def test_killed_where_files_change(calm, tmp_path):
    root = make_raw(tmp_path / "killed")
    for at in PREPROCESSING:
        kill_at(root, PLAN, at)
    finish(root, PLAN)
    for at in PRETRAINING:
        kill_at(root, PRETRAIN, at)
    finish(root, PRETRAIN)

    assert_same_cases(calm / CASES, root / CASES)
    for stage in STAGES:
        assert_same_stage(stage_folder(calm, stage), stage_folder(root, stage))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system does not count the time of a process")
def test_killed_at_random_moments(calm, tmp_path):
    root = make_raw(tmp_path / "killed")
    shutil.copytree(calm / "preprocessed", root / "preprocessed", dirs_exist_ok=True)
    draw = random.Random(20)
    for name in STAGES.values():
        killed = [kill_in_stage(root, Stage(name, draw.uniform(0.001, 0.1))) for _ in range(2)]
        assert killed[0]
    finish(root, PRETRAIN)
    for stage in STAGES:
        assert_same_stage(stage_folder(calm, stage), stage_folder(root, stage))
