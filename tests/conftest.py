"""What all tests share: axis names are checked, and real data is found through NNSSL_TEST_DATA."""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from tests.warm_start import COLD, warm_start

install_import_hook(["nnssl.losses", "nnssl.views", "nnssl.networks", "nnssl.methods"], "beartype.beartype")

# tensors are so small here that threads cost more than they give, and on a busy machine many times more
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start


def pytest_collection_finish() -> None:
    """Leave what is imported out of the garbage collection, which would look through it again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def processes_start_warm() -> Iterator[None]:
    """Processes are forked from one that has torch and nnU-Net imported, where the code spawns them."""
    with warm_start():
        yield


@pytest.fixture(scope="session", autouse=True)
def fingerprints_take_few_samples() -> Iterator[None]:
    """nnU-Net's fingerprint draws 10,000 voxels instead of 100 million; it draws with replacement, and volumes here are small."""
    own = DatasetFingerprintExtractor.__init__

    def initialize(extractor: DatasetFingerprintExtractor, *arguments: Any, **options: Any) -> None:
        own(extractor, *arguments, **options)
        extractor.num_foreground_voxels_for_intensitystats = 10_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetFingerprintExtractor, "__init__", initialize)
        yield


@pytest.fixture
def cold_start(monkeypatch) -> None:
    """Processes of this test are spawned, and import all they need, as a user's are."""
    monkeypatch.setattr(multiprocessing, "get_context", COLD)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets; the test is skipped, and says so, where there is none."""
    folder = os.environ.get("NNSSL_TEST_DATA")
    if not folder:
        pytest.skip("real data: set NNSSL_TEST_DATA to the folder of the data sets")
    return Path(folder).absolute()


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch) -> Path:
    """Point nnU-Net's three folders below a temporary folder and return that folder."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path
