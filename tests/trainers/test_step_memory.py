"""The tool that compares the estimate of a step's memory with what it takes."""

import math
import mmap

import torch

from nnssl.plan import read_plan
from tests.trainers.conftest import NAME
from tools import step_memory


def test_memory_that_was_freed_counts():
    device, size = torch.device("cpu"), 2**28
    base = step_memory._start_peak(device)
    with mmap.mmap(-1, size) as pages:  # new pages, where an allocator may reuse those of an earlier test
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
    assert step_memory._peak(device, base) > 0.9 * size / 1e9
    base = step_memory._start_peak(device)
    assert step_memory._peak(device, base) < 0.1 * size / 1e9


def test_a_step_is_run_beside_the_bare_network(toy):
    plan = read_plan(toy.preprocessed / NAME / "nnsslPlans.json")
    threads = torch.get_num_threads()
    try:
        dense = step_memory.measure(plan, "3d_fullres", "pix2rep.dense", "cpu")
        alone = step_memory.measure(plan, "3d_fullres_hybrid", "reprec.generative", "cpu")
    finally:
        torch.set_num_threads(threads)
    assert dense["seconds"] > 0
    assert dense["ratio"] > 0
    assert dense["peak_gb"] >= 0
    assert math.isnan(alone["ratio"])  # it differentiates a transformer, which the bare network lacks
