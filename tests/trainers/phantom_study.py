"""Phantoms without labels, planned and preprocessed, and labelled ones that pretraining has not seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnssl.cli.plan_and_preprocess import main as plan_and_preprocess
from nnssl.data.phantoms import write_phantom_dataset
from nnssl.environment import variables
from nnssl.paths import Folders, resolve_folders

SOURCE, LABELLED = "Dataset501_Unlabelled", "Dataset004_Labelled"
SHAPE, SPACING_MM = (16, 24, 20), (2.5, 1.5, 1.7)
SCHEDULE = {"batch_size": 2, "epochs": 1, "iterations_per_epoch": 2, "warmup_epochs": 0}
UNLABELLED_CASES, LABELLED_CASES = 4, 8


def narrow_unet(nnunet: dict[str, Any]) -> None:
    """Divide the widths of a configuration's U-Net by four, as most of a step is its convolutions."""
    arguments = nnunet["architecture"]["arch_kwargs"] if "architecture" in nnunet else {}
    if "features_per_stage" in arguments:
        arguments["features_per_stage"] = [width // 4 for width in arguments["features_per_stage"]]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder with raw, preprocessed and results; made once."""
    folder = tmp_path_factory.mktemp("benchmark")
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
    write_phantom_dataset(folder / "raw", SOURCE, UNLABELLED_CASES, 0, SHAPE, SPACING_MM, labelled=False)
    write_phantom_dataset(folder / "raw", LABELLED, LABELLED_CASES, 0, SHAPE, SPACING_MM, first_case=UNLABELLED_CASES)
    with variables(**{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}):
        assert plan_and_preprocess(["-d", "501", "--preset", "cpu", "--processes", "1", "-c", "3d_fullres"]) == 0
    path = folder / "preprocessed" / SOURCE / "nnsslPlans.json"
    content = json.loads(path.read_text())
    for configuration in content["pretext"]["configurations"].values():
        for stage in configuration["stages"].values():
            stage["schedule"].update(SCHEDULE)
    for configuration in content["configurations"].values():
        narrow_unet(configuration)
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def folders(phantoms, tmp_path) -> Iterator[Folders]:
    """nnU-Net's folders: the phantoms', with a results folder of the test's own."""
    (tmp_path / "results").mkdir()
    names = {name: str(phantoms / name) for name in ("raw", "preprocessed")}
    names["results"] = str(tmp_path / "results")
    with variables(NNSSL_PRECISION="float32", **{f"nnUNet_{name}": path for name, path in names.items()}):
        yield resolve_folders()
