"""Does work in this process, in the processes that torchrun started, or in new processes of one group."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from nnssl.errors import DivergedError, UserError
from nnssl.interrupts import INTERRUPTED, TERMINATED, interrupts_blocked, receive_interrupts
from nnssl.log import prints

LONGEST_WAIT = timedelta(hours=24)
"""Timeout of the process group: all processes wait while the first one pairs or examines whole scans."""


FORWARDED: tuple[type[Exception], ...] = (UserError, DivergedError)
"""Errors that a new process passes on to the one that started it; others arrive with their traceback."""


class Job(Protocol):
    """A dataclass of plain values, which can be sent to other processes, with the device to train on."""

    @property
    def device(self) -> torch.device:
        """Device of this process; with several GPUs each process gets its own."""


J = TypeVar("J", bound=Job)


def launch(work: Callable[[J], Any], job: J, processes: int) -> None:
    """Do work in the processes that torchrun started, or else in ``processes`` processes on this machine.

    Args:
        work: Importable function that is called with the job.
        job: What to do.
        processes: Number of processes, unless torchrun has started them.

    Raises:
        UserError: If one of the new processes raises it.
        DivergedError: If one of the new processes raises it.
    """
    if _launched():
        _run_in_group(work, job, *(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    elif processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
        with interrupts_blocked():
            started: Any = torch.multiprocessing.spawn(
                _run_rank, args=(work, job, processes, port, errors), nprocs=processes, join=False
            )
        _wait_for(started, errors)
    else:
        work(job)


def _wait_for(started: Any, errors: Any) -> None:
    """Wait for the processes of a group, pass on signals to them, and raise what ended them."""
    received: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in started.processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    in_main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {signum: signal.signal(signum, pass_on) for signum in signals}
    try:
        while not started.join():
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        if not errors.empty():
            kind, text = errors.get()
            raise FORWARDED[kind](text) from error
        if not received and getattr(error, "exit_code", None) not in (INTERRUPTED, TERMINATED):
            raise
        received.append(signal.SIGINT if getattr(error, "exit_code", None) == INTERRUPTED else signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(TERMINATED)


def number_of_processes(wanted: int) -> int:
    """Return the number of processes that a job will run in: that of torchrun, or else the wanted number."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else wanted


def is_first_process() -> bool:
    """Return whether this is the only process so far, or the first one that torchrun started."""
    return prints()


def _launched() -> bool:
    """Return whether torchrun started this process, perhaps on several nodes."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _run_rank(rank: int, work: Callable[[J], Any], job: J, processes: int, port: int, errors: Any) -> None:
    """Work as one process; the kind and the text of an error to pass on are put into the queue ``errors``."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    try:
        receive_interrupts()
        _run_in_group(work, job, rank, rank, processes)
    except FORWARDED as error:
        errors.put((next(kind for kind, each in enumerate(FORWARDED) if isinstance(error, each)), str(error)))
        raise
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _run_in_group(work: Callable[[J], Any], job: J, rank: int, local_rank: int, processes: int) -> None:
    """Join the process group and work as one of its processes; ``MASTER_ADDR`` and ``MASTER_PORT`` must be set."""
    if job.device.type == "cuda":
        torch.cuda.set_device(local_rank)
        job = replace(job, device=torch.device("cuda", local_rank))  # type: ignore[type-var]
    backend = "nccl" if job.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=processes, timeout=LONGEST_WAIT)
    try:
        work(job)
        # The first process writes the files that others read next.
        dist.barrier()
    except UserError as error:
        if _launched() and rank:  # commands print errors in the first process only
            print(f"process {rank}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        raise
    finally:
        dist.destroy_process_group()
