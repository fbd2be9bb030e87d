"""One tiny comparison of a pretrained and a random start on phantoms, and trainers on its data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nnssl.data.phantoms import write_phantom_dataset
from nnssl.environment import variables
from nnssl.files import read_json
from tests.trainers.tiny_plan import tiny_plan, write_weights
from trainers.finetune import FinetuneSettings, make_trainer
from trainers.finetune_result import ArmResult
from trainers.finetune_run import finetune

DATASET = "Dataset004_Phantoms"
CASES = tuple(f"phantom_{number:04d}" for number in range(6))
TEST_CASES = (CASES[5], CASES[1])
SCHEDULE = {"epochs": 2, "iterations_per_epoch": 2, "warmup_epochs": 1, "learning_rate": 0.01}
CPU = torch.device("cpu")


@dataclass
class Run:
    folder: Path
    weights: Path
    tensors: dict[str, torch.Tensor]
    arguments: dict
    results: list[ArmResult]
    said: list[str]

    def fold(self, arm: int) -> Path:
        return Path(self.results[arm].model_folder, "fold_0")


@contextmanager
def folders_set(folder: Path) -> Iterator[None]:
    """Point nnU-Net's variables at the folders of a run."""
    with variables(**{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}):
        yield


def make_run(folder: Path) -> Run:
    """Do both arms of one tiny comparison, from raw images to Dice."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
    with folders_set(folder):
        write_phantom_dataset(folder / "raw", DATASET, len(CASES), seed=0, shape=(24, 32, 28))
        weights = folder / "results" / "Dataset501_Source" / "Pretrainer" / "fold_all" / "checkpoint_final.pth"
        tensors = write_weights(weights, tiny_plan())
        (folder / "test.txt").write_text("# held out\n\n" + "\n".join(TEST_CASES) + "\n")
        arguments = {
            **SCHEDULE, "scratch": True, "labels": 3, "test_cases": folder / "test.txt", "seed": 3, "processes": 1,
            "device": CPU,
        }  # fmt: skip
        said: list[str] = []
        results = finetune(4, "latest", **arguments, say=said.append)
    return Run(folder, weights, tensors, arguments, results, said)


def make_settings(folder: Path, **changes) -> FinetuneSettings:
    values = {
        "train_cases": CASES[:3],
        "test_cases": CASES[3:],
        "model_folder": folder,
        "seed": 3,
        **SCHEDULE,
        **changes,
    }
    return FinetuneSettings(**values)


def trainer_of(run: Run, folder: Path, say=lambda line: None, resume=False, trainer_class=None, **changes):
    dataset_json = read_json(run.folder / "preprocessed" / DATASET / "dataset.json", "dataset.json")
    settings = make_settings(folder, **changes)
    return make_trainer(tiny_plan(DATASET), "3d_fullres", dataset_json, CPU, settings, say, resume, trainer_class)


def is_segmentation_layer(key: str) -> bool:
    return ".seg_layers." in key
