"""Random batches of nnU-Net as a function of seed, purpose and step, whatever was drawn before and in which process."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.dataloading import data_loader
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import ThreadpoolController
from torch.utils.data import DataLoader, Dataset

from nnssl.data.loader import start_of_readers
from nnssl.draws import draw_seed


@contextmanager
def global_seed(*key: int | str) -> Iterator[None]:
    """Seed the global random states, from which nnU-Net draws, with a key, and restore them at the end."""
    seed = draw_seed(*key)
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (nnU-Net's augmentation uses it)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def thread_pools_searched_once() -> Iterator[None]:
    """Let nnU-Net's loader limit the threads of the libraries that the first call in this process has found.

    The loader searches all loaded libraries anew for every batch, which takes as long as drawing a small patch.
    """
    original = data_loader.threadpool_limits
    data_loader.threadpool_limits = _limit_threads
    try:
        yield
    finally:
        data_loader.threadpool_limits = original


def _limit_threads(limits: int, user_api: str | None) -> AbstractContextManager[Any]:
    limiter: AbstractContextManager[Any] = _thread_pools().limit(limits=limits, user_api=user_api)
    return limiter


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


class KeyedBatches(Dataset):
    """Random batches of nnU-Net by step: a sample is a function of (seed, purpose, step, row of the batch).

    Each of several processes makes the rows that it trains on, and together they have the batch of one process.

    Args:
        loader: Loader of nnU-Net, whose batch size is that of the whole batch.
        seed: Random seed of the run.
        purpose: Purpose of the batches.
        rows: Rows of the batch that this process needs.
    """

    def __init__(self, loader: nnUNetDataLoader, seed: int, purpose: str, rows: Sequence[int]):
        self.rows = rows
        self.key = (seed, purpose)
        self.loader = copy.copy(loader)
        self.loader.batch_size = 1
        self._is_foreground = loader.get_do_oversample  # bound to the loader with the whole batch

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return the rows of the batch of a step: ``data`` (row, channel, [z,] y, x), ``target`` and ``keys``."""
        samples = [self._sample(step, row) for row in self.rows]
        targets = [sample["target"] for sample in samples]
        several = isinstance(targets[0], list)  # one per resolution
        return {
            "data": torch.cat([sample["data"] for sample in samples]),
            "target": [torch.cat(each) for each in zip(*targets, strict=True)] if several else torch.cat(targets),
            "keys": [key for sample in samples for key in sample["keys"]],
        }

    def _sample(self, step: int, row: int) -> dict[str, Any]:
        with global_seed(*self.key, step, row), thread_pools_searched_once():
            self.loader.get_do_oversample = lambda _: self._is_foreground(row)
            sample: dict[str, Any] = self.loader.generate_train_batch()
        return sample

    def iterate(self, first: int, last: int, processes: int, pin_memory: bool) -> Iterator[dict[str, Any]]:
        """Iterate over the batches of the steps ``first`` to ``last - 1`` in order."""
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(first, last),
                num_workers=processes,
                pin_memory=pin_memory,
                multiprocessing_context=start_of_readers(processes),
            )
        )


def fix_transforms(transforms: BasicTransform) -> None:
    """Make the results of nnU-Net's transforms depend only on their random draws. The transforms are changed in place.

    Gaussian blur uses the faster of two algorithms according to a measurement. Their results differ in the last digits, so
    that values would depend on timing.
    """
    for transform in getattr(transforms, "transforms", []):
        inner = getattr(transform, "transform", transform)  # RandomTransform wraps one
        if isinstance(inner, GaussianBlurTransform):
            inner.benchmark = False
