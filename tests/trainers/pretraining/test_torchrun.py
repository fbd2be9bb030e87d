"""Pretraining on two nodes by torchrun: a node that is killed rejoins, and the run ends as if undisturbed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.trainers.conftest import NAME
from tests.trainers.pretraining.test_pretrain import assert_same, tensors_of
from tests.waiting import HUNG_S
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

EPOCHS, STEPS = 20, 4
OVERRIDES = ("batch_size=4", "points_per_image=16", "optimizer=sgd", "learning_rate=0.001")
FOLDER = Path(NAME, "Pix2RepTrainer__nnsslPlans__3d_fullres", "fold_all")


def command(port: int) -> list[str]:
    torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"]
    length = ["--epochs", str(EPOCHS), "--iterations-per-epoch", str(STEPS)]
    chosen = ["-m", "pix2rep", "-d", "501", "-c", "3d_fullres", "--workers", "0", "--device", "cpu"]
    return [
        *(sys.executable, "-m", *torchrun, *rendezvous, "-m", "nnssl.cli.pretrain"),
        *(*chosen, *length, "--retrieval-every", "0", "--set", *OVERRIDES),
    ]


@contextmanager
def node(port: int, log: Path) -> Iterator[subprocess.Popen]:
    """Start torchrun in a session of its own, as on another machine, and end all its processes at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(command(port), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield process
        finally:
            kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """Kill torchrun and the processes that it started, which have sessions of their own, as a power failure does."""
    if process.poll() is not None:
        return
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until_saved(latest: Path, nodes: list[subprocess.Popen], logs: list[Path]) -> None:
    """Wait for the first checkpoint of a run, which must not have ended before it."""
    while not latest.exists():
        assert all(each.poll() is None for each in nodes), "\n".join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.05)


@pytest.mark.nightly
def test_a_killed_node_is_started_again_and_the_run_ends_as_if_undisturbed(toy, tmp_path, monkeypatch):
    schedule = {"epochs": EPOCHS, "iterations_per_epoch": STEPS, "retrieval_every": 0}
    settings = PretrainSettings(
        configuration="3d_fullres", overrides=OVERRIDES, workers=0, device="cpu", num_gpus=2, **schedule
    )
    pretrain("pix2rep", NAME, settings, toy)
    undisturbed = tensors_of(toy.results / FOLDER / "checkpoint_final.pth")
    results = tmp_path / "other_results"
    results.mkdir()
    monkeypatch.setenv("nnUNet_results", str(results))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as the documentation says
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [tmp_path / f"node{index}.log" for index in range(3)]
    with node(port, logs[0]) as first:
        while first.poll() is None:  # it holds the rendezvous
            with socket.socket() as probe:
                if probe.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.1)
        with node(port, logs[1]) as second:
            wait_until_saved(results / FOLDER / "checkpoint_latest.pth", [first, second], logs[:2])
            kill_all(second)
            assert not (results / FOLDER / "checkpoint_final.pth").exists()
        with node(port, logs[2]) as again:
            codes = [first.wait(HUNG_S), again.wait(HUNG_S)]
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert "Resuming at step" in logs[0].read_text() + logs[2].read_text()
    assert_same(tensors_of(results / FOLDER / "checkpoint_final.pth"), undisturbed)
