import multiprocessing
import os
import random
import sys

import numpy as np
import pytest
import torch

from tests.waiting import receive
from tests.warm_start import IMPORTED


def describe(parent):
    modules = {name for name in IMPORTED if name in sys.modules}
    numbers = random.random(), float(np.random.rand())  # noqa: NPY002
    parent.send((modules, os.environ.get("NNSSL_WARM"), os.getcwd(), torch.get_num_threads(), numbers))


def describe_some(number: int) -> list:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(number)]
    processes = [context.Process(target=describe, args=(there,)) for _, there in pipes]
    for process in processes:
        process.start()
    found = [receive(here, process) for (here, _), process in zip(pipes, processes, strict=True)]
    for process in processes:
        process.join()
    return found


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_warm_process_is_as_a_spawned_one_but_for_what_it_has_imported(tmp_path, monkeypatch):
    for value in ("first", "second"):
        folder = tmp_path / value
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("NNSSL_WARM", value)
        one, other = describe_some(2)
        assert one[:4] == other[:4] == (set(IMPORTED), value, str(folder), 1)
        assert one[4][0] != other[4][0]
        assert one[4][1] != other[4][1]


def test_a_cold_process_has_imported_nothing(cold_start):
    ((modules, *_),) = describe_some(1)
    assert modules == set()
