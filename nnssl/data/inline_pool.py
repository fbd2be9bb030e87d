"""Functions of nnU-Net without the worker processes that they start.

nnU-Net starts twelve processes to put together the names of files. It exports and evaluates predictions in workers, while on a
CPU the cores are busy with the prediction itself. Starting a worker takes longer than the few files of a short training.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class Finished:
    """The results of jobs that are done, as ``multiprocessing`` returns them.

    Args:
        results: Results in the order of the jobs.
    """

    def __init__(self, results: list[Any]) -> None:
        self.results = results

    def ready(self) -> bool:
        """Return whether the jobs are done, which they always are."""
        return True

    def get(self) -> list[Any]:
        """Return the results."""
        return self.results


class InlinePool:
    """A pool that does each job at once in this process, with the part of ``multiprocessing.Pool`` that nnU-Net uses."""

    _pool: tuple[()] = ()  # nnU-Net checks that the workers in it are alive

    def __enter__(self) -> "InlinePool":
        """Return the pool."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing; there is no worker to end."""

    def starmap(self, function: Callable[..., Any], jobs: Iterable[Iterable[Any]]) -> list[Any]:
        """Return the results of a function for several tuples of arguments."""
        return [function(*job) for job in jobs]

    def starmap_async(self, function: Callable[..., Any], jobs: Iterable[Iterable[Any]]) -> Finished:
        """Do the jobs of ``starmap`` now."""
        return Finished(self.starmap(function, jobs))


class _InlineMultiprocessing:
    """Stands for the module ``multiprocessing`` in a module of nnU-Net."""

    def get_context(self, method: str) -> "_InlineMultiprocessing":
        return self

    def Pool(self, processes: int) -> InlinePool:  # noqa: N802 (the name in multiprocessing)
        return InlinePool()

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)


@contextmanager
def without_workers(*modules: ModuleType) -> Iterator[None]:
    """Let modules that start pools work in this process.

    Args:
        *modules: Modules that import ``multiprocessing``, or its ``Pool``, by that name.
    """
    inline = _InlineMultiprocessing()
    names = [next(name for name in ("multiprocessing", "Pool") if name in vars(module)) for module in modules]
    before = [vars(module)[name] for module, name in zip(modules, names, strict=True)]
    for module, name in zip(modules, names, strict=True):
        vars(module)[name] = inline if name == "multiprocessing" else inline.Pool
    try:
        yield
    finally:
        for module, name, original in zip(modules, names, before, strict=True):
            vars(module)[name] = original
