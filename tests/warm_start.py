"""New processes for tests that begin with torch, nnU-Net and nnssl imported, which takes a process longer than its work here.

A process that is started by ``spawn`` imports all of it anew. Within ``warm_start`` such a process is forked from a server
instead that has imported it once and done nothing else. As with ``spawn``, what a process gets is pickled, and it has the
environment, the working folder and the paths that its parent had when it was started.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from typing import Any

import pytest

IMPORTED = (
    "nnssl.cli.plan_and_preprocess",
    "nnssl.data.preprocess",
    "planners.pretrain_planner",
    "trainers.pretraining.pretrain",
    "trainers.finetuning.finetune",
)
COLD: Callable[..., Any] = multiprocessing.get_context


class WarmProcess(ForkServerProcess):
    """A forked process with the environment of its parent, one thread, and random states of its own."""

    def start(self) -> None:
        """Start it, with the environment of this moment."""
        self.environment = dict(os.environ)
        super().start()

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        import numpy as np
        import torch

        gc.freeze()  # what the server has imported, of which a collection would make copies
        os.environ.clear()
        os.environ.update(self.environment)
        torch.set_num_threads(1)
        np.random.seed()  # noqa: NPY002 (the server's state, which all would share)
        return super()._bootstrap(parent_sentinel)  # type: ignore[misc]


class WarmContext(ForkServerContext):
    """Starts processes warm, for code that asks for ``spawn``."""

    Process = WarmProcess  # type: ignore[assignment]


def get_context(method: str | None = None) -> BaseContext:
    """Return the context of a start method, the warm one for ``spawn``."""
    return WarmContext() if method == "spawn" else COLD(method)


@contextmanager
def warm_start() -> Iterator[None]:
    """Within it processes that are asked of ``spawn`` start warm, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", get_context)
        yield
