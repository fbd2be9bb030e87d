"""What all tests share: axis names are checked, and real data is found through NNSSL_TEST_DATA."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["nnssl.losses", "nnssl.views", "nnssl.networks", "nnssl.methods"], "beartype.beartype")

torch.set_num_threads(2)


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
