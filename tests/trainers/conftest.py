"""A planned and preprocessed toy data set, small enough that a pretraining step takes a fraction of a second."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from nnssl.data.case_store import CaseProperties, write_case
from nnssl.data.raw import RawCase, RawDataset
from nnssl.paths import Folders, resolve_folders
from nnssl.plan import Plan, read_plan
from planners.case_record import CaseRecord, IntensityStatistics
from planners.fingerprint import Fingerprint
from planners.pretrain_planner import plan_pretraining
from tests.trainers import phantom_study
from tests.trainers.finetuning.runs import Run, folders_set, make_run
from trainers.pretraining import retrieval_run


@pytest.fixture(autouse=True)
def few_patches_are_retrieved(monkeypatch) -> None:
    """Measure the retrieval of views on few patches, which would otherwise take most of a short run."""
    monkeypatch.setattr(retrieval_run, "PATCHES", 6)


phantoms, folders = phantom_study.phantoms, phantom_study.folders
SHAPE, SPACING_MM = (16, 24, 20), (2.0, 1.0, 1.25)
NAME = "Dataset501_Toy"
SCHEDULE = {"batch_size": 4, "epochs": 2, "iterations_per_epoch": 3, "warmup_epochs": 0}
WIDTH, DEPTH, HEADS = 48, 2, 3
"""Of the transformers, whose planned size would take most of a step."""


def make_volume(seed: int, channels: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return waves whose direction and length belong to the case."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    volume = [sum(rng.uniform(-1, 1) * axis for axis in axes) for _ in range(channels)]
    return (np.sin(np.stack(volume)) + 0.1 * rng.standard_normal((channels, *shape))).astype(np.float32)


def plan_toy(folders: Folders, channels: int = 1, cases: int = 6, narrow: bool = True) -> Plan:
    """Plan a toy data set for a CPU, write its preprocessed cases, shorten every schedule, and narrow the networks if asked."""
    statistics = IntensityStatistics(0.0, 0.0, 1.0, -3.0, 3.0, -2.5, 2.5)
    names = tuple(f"c{i}" for i in range(channels))
    records = tuple(
        CaseRecord(f"toy_{i:02}", SHAPE, SPACING_MM, "LPS", channels, SHAPE, 1.0, 1.0, (statistics,) * channels,
                   (0.0,) * channels, str(i))
        for i in range(cases)
    )  # fmt: skip
    dataset_json = {
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": {"background": 0, "foreground": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    raw_cases = tuple(
        RawCase(r.name, tuple(Path(f"/x/{r.name}_{c:04}.nii.gz") for c in range(channels))) for r in records
    )
    dataset = RawDataset(NAME, Path("/x"), ".nii.gz", names, raw_cases, "SimpleITKIO", dataset_json, ())
    fingerprint = Fingerprint(
        1, NAME, "digest", names, names, records, (), (), {str(c): statistics for c in range(channels)}
    )
    plan = plan_pretraining(dataset, fingerprint, folders, "cpu")
    path = folders.preprocessed / NAME / "nnsslPlans.json"
    content = json.loads(path.read_text())
    for name, configuration in content["pretext"]["configurations"].items():
        for stage in configuration["stages"].values():
            stage["schedule"].update(SCHEDULE)
        narrow_transformer(configuration, content["configurations"][name])
        if narrow:
            phantom_study.narrow_unet(content["configurations"][name])
        folder = folders.preprocessed / NAME / configuration["case_folder"]
        if not folder.exists():
            folder.mkdir()
            for i, record in enumerate(records):
                volume = make_volume(i, channels, SHAPE)
                everywhere = np.argwhere(np.ones(SHAPE, bool))[::7].astype(np.int16)
                learnable = np.ones(SHAPE, bool)
                learnable[:, : SHAPE[1] * (i % 4) // 6] = False  # another share in every case, up to a half
                share = float(learnable.mean())
                properties = CaseProperties(2, SHAPE, channels, SPACING_MM, (), "digest", 1.0, share, None)
                patch = plan.configuration("3d_fullres").patch_size
                write_case(folder, record.name, volume, everywhere, properties, patch, learnable)
    path.write_text(json.dumps(content))
    return read_plan(path)


def narrow_transformer(configuration: dict[str, Any], nnunet: dict[str, Any]) -> None:
    """Give the hybrid network of a configuration, in both parts of a plan, a transformer of the least size."""
    arguments = nnunet["architecture"]["arch_kwargs"] if "architecture" in nnunet else {}
    if "transformer_width" in arguments:
        configuration["transformer"] = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "decoder_depth": 1}
        arguments.update(transformer_width=WIDTH, transformer_depth=DEPTH, transformer_heads=HEADS)


@pytest.fixture(scope="session")
def planned_toy(tmp_path_factory) -> Path:
    """The preprocessed folder of a planned toy data set; made once."""
    folder = tmp_path_factory.mktemp("toy")
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
    with folders_set(folder):
        plan_toy(resolve_folders())
    return folder / "preprocessed"


@pytest.fixture
def toy(planned_toy, nnunet_folders, monkeypatch) -> Folders:
    """Folders with a planned toy data set; float32, so that results can be compared to the bit and across processes."""
    monkeypatch.setenv("NNSSL_PRECISION", "float32")
    folders = resolve_folders()
    shutil.copytree(planned_toy, folders.preprocessed, dirs_exist_ok=True)
    return folders


@pytest.fixture(autouse=True)
def figures_are_not_drawn(request, monkeypatch) -> None:
    """Put a figure together and leave its picture out, which takes longer than a training here, unless a test is marked."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: None)


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory) -> Run:
    """Both arms of one tiny comparison; made once for all tests."""
    return make_run(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def run(finetuned) -> Iterator[Run]:
    """The comparison, with nnU-Net's folders set to its own for the tests of a module."""
    with folders_set(finetuned.folder):
        yield finetuned
