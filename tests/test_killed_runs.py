"""Real commands killed with SIGKILL at ten random moments and started again end like commands never disturbed."""

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nnssl.checkpoint import read_checkpoint
from nnssl.data.case_store import CaseStore
from nnssl.data.phantoms import write_phantom_dataset

NAME = "Dataset501_Phantoms"
PLAN = ["plan_and_preprocess", "-d", "501", "--preset", "cpu", "--processes", "1", "-c", "3d_fullres_hybrid"]
PRETRAIN = [
    "pretrain", "-m", "reprec", "-d", "501", "--device", "cpu", "--workers", "1", "--epochs", "6",
    "--iterations-per-epoch", "4", "--set", "batch_size=2",
]  # fmt: skip
STAGES = {"Contrastive": "reprec.contrastive", "Generative": "reprec.generative"}


def start(root: Path, command: list[str]) -> tuple[subprocess.Popen, list[str]]:
    """Start a command on the folders below ``root``; its lines are collected as they come."""
    environment = {**os.environ, **{f"nnUNet_{n}": str(root / n) for n in ("raw", "preprocessed", "results")}}
    environment |= {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"nnssl.cli.{command[0]}", *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    assert process.stdout is not None
    threading.Thread(target=lambda out: lines.extend(out), args=(process.stdout,), daemon=True).start()
    return process, lines


def finish(root: Path, command: list[str]) -> None:
    process, lines = start(root, command)
    assert process.wait(timeout=300) == 0, "".join(lines)


def kill_once(root: Path, command: list[str], begun: Callable[[list[str]], bool], delay_s: float) -> bool:
    """Kill a command some time after its phase has begun; returns whether it was still running then."""
    process, lines = start(root, command)
    deadline = time.time() + 300
    while process.poll() is None and not begun(lines) and time.time() < deadline:
        time.sleep(0.002)
    time.sleep(delay_s)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def stage_folder(root: Path, stage: str) -> Path:
    return root / "results" / NAME / f"RepRec{stage}Trainer__nnsslPlans__3d_fullres_hybrid" / "fold_all"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    content, provenance = read_checkpoint(path)
    assert provenance.finished
    found = {**content["network_weights"], **content["nnssl"]["state"]["method"]}
    for number, entry in content["optimizer_state"]["state"].items():
        found |= {f"optimizer/{number}/{key}": value for key, value in entry.items() if torch.is_tensor(value)}
    return found


def test_killed_at_ten_moments(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for root in (calm, killed):
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir(parents=True)
        write_phantom_dataset(root / "raw", NAME, 10, 0, (16, 24, 20), (2.5, 1.5, 1.7), labelled=False)
    finish(calm, PLAN)
    finish(calm, PRETRAIN)

    draw = random.Random(20)
    cases = killed / "preprocessed" / NAME / "nnsslPlans_cases_3d"
    hits = {"preprocessing": 0, **dict.fromkeys(STAGES, 0)}
    for _ in range(2):
        before = len(list(cases.glob("*.json")))
        hits["preprocessing"] += kill_once(
            killed, PLAN, lambda lines, n=before: len(list(cases.glob("*.json"))) > n, draw.uniform(0, 0.03)
        )
    finish(killed, PLAN)
    for stage, name in STAGES.items():
        for _ in range(4):
            mark = f"Pretext stage {name}"
            hits[stage] += kill_once(
                killed, PRETRAIN, lambda lines, mark=mark: any(mark in line for line in lines), draw.uniform(0, 1.2)
            )
    finish(killed, PRETRAIN)

    assert min(hits.values()) >= 1, hits
    assert sum(hits.values()) >= 8, hits
    stores = [CaseStore(root / "preprocessed" / NAME / "nnsslPlans_cases_3d") for root in (calm, killed)]
    assert stores[0].names == stores[1].names
    for case in stores[0].names:
        one, other = (store.case(case) for store in stores)
        np.testing.assert_array_equal(one.read_box((0, 0, 0), one.shape), other.read_box((0, 0, 0), other.shape))
        np.testing.assert_array_equal(one.foreground_vox, other.foreground_vox)
    for stage in STAGES:
        first, second = (tensors(stage_folder(root, stage) / "checkpoint_final.pth") for root in (calm, killed))
        assert set(first) == set(second)
        for key in first:
            assert torch.equal(first[key], second[key]), (stage, key)
        rows = list(csv.DictReader((stage_folder(killed, stage) / "metrics.csv").open()))
        assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(6)]
    assert not [path for path in cases.rglob("*.tmp")]
