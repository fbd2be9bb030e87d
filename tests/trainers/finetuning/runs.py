"""One tiny comparison of a pretrained and a random start on phantoms, and trainers on its data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl.data.phantoms import write_phantom_dataset
from nnssl.environment import variables
from nnssl.files import read_json
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from planners.finetune_planner import adopt_plan
from tests.trainers.tiny_plan import PATCH_SIZE, tiny_plan, write_weights
from trainers.finetuning import training
from trainers.finetuning.arm_settings import ArmSettings
from trainers.finetuning.finetune import finetune
from trainers.finetuning.finetune_trainer import FinetuneTrainer, make_trainer
from trainers.finetuning.labelled_data import prepare_data
from trainers.finetuning.pretrained_weights import open_weights
from trainers.finetuning.result import ArmResult
from trainers.finetuning.schedule import FinetuneSchedule
from trainers.finetuning.settings import FinetuneSettings

DATASET = "Dataset004_Phantoms"
CASES = tuple(f"phantom_{number:04d}" for number in range(6))
TEST_CASES = (CASES[5], CASES[1])
SCHEDULE = {"epochs": 2, "iterations_per_epoch": 2, "warmup": 2, "learning_rate": 0.01}
CPU = torch.device("cpu")


@dataclass
class Run:
    folder: Path
    weights: Path
    tensors: dict[str, torch.Tensor]
    arguments: dict
    results: list[ArmResult]
    said: list[str]
    preprocessed: list[str]
    """Cases that the comparison preprocessed; the others were added afterwards."""

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
        with lines_to(said.append):
            results = finetune(4, "latest", FinetuneSettings(**arguments))
        folders = resolve_folders()
        made = sorted(path.stem for path in folders.preprocessed.glob(f"{DATASET}/nnsslPlans_3d_fullres/*.pkl"))
        prepare_data(DATASET, adopt_plan(tiny_plan(), DATASET, folders), "3d_fullres", CASES, folders, 1)
    return Run(folder, weights, tensors, arguments, results, said, made)


def make_settings(folder: Path, **changes) -> ArmSettings:
    values = {
        "train_cases": CASES[:3],
        "test_cases": CASES[3:],
        "model_folder": folder,
        "seed": 3,
        "validation_iterations": 1,
        **changes,
    }
    schedule = {
        "epochs": 2, "iterations_per_epoch": 2, "recipe": "warmup", "warmup_steps": 2, "new_steps": 0,
        "learning_rate": 0.01, "head_learning_rate": None, "batch_size": None, "optimizer": "sgd", "trained": "everything",
    }  # fmt: skip
    schedule |= {key: values.pop(key) for key in schedule if key in values}
    schedule["head_learning_rate"] = schedule["head_learning_rate"] or schedule["learning_rate"]
    return ArmSettings(FinetuneSchedule(**schedule), **values)


def trainer_of(
    run: Run,
    folder: Path,
    resume=False,
    trainer_class=None,
    norm_op="InstanceNorm3d",
    labels=None,
    **changes,
):
    """Make a trainer on the data of a run; a network with another normalisation, or other labels or regions, on request."""
    dataset_json = read_json(run.folder / "preprocessed" / DATASET / "dataset.json", "dataset.json")
    plan = tiny_plan(DATASET)
    module = {"InstanceNorm3d": "instancenorm", "BatchNorm3d": "batchnorm"}[norm_op]
    plan["image_reader_writer"] = "SimpleITKIO"  # as in the adopted plan
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = f"torch.nn.modules.{module}.{norm_op}"
    settings = make_settings(folder, **changes)
    return make_trainer(plan, "3d_fullres", {**dataset_json, **(labels or {})}, CPU, settings, resume, trainer_class)


def weights_of(run: Run) -> OpenedCheckpoint:
    return open_weights(run.weights, resolve_folders())


def killed_and_resumed(make: Callable[..., FinetuneTrainer], folder: Path) -> tuple[dict, dict, FinetuneTrainer]:
    """Stop a training at its first line for the user and go on from its checkpoint.

    Returns:
        The content of ``checkpoint_latest.pth``, the final ``network_weights``, and the trainer that went on.
    """

    def die(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lines_to(die):
        make(folder).run_training()
    latest = folder / "fold_0" / "checkpoint_latest.pth"
    content = torch.load(latest, weights_only=True)
    resumed = make(folder, resume=True)
    resumed.load_checkpoint(str(latest))
    resumed.run_training()
    return content, final_weights(folder), resumed


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return what stock nnU-Net predicts with."""
    return torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]


def assert_stock_nnunet_predicts_the_same(run: Run, result: ArmResult, trainer: FinetuneTrainer | None, folder: Path):
    """Compare what stock nnU-Net makes of the model folder with the trainer's network and with its prediction files."""
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(result.model_folder, (0,), "checkpoint_final.pth")
    assert predictor.trainer_name == "nnUNetTrainer"
    if trainer is not None:
        volume = torch.randn(1, 1, *PATCH_SIZE, generator=torch.Generator().manual_seed(0))
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        with torch.no_grad():
            trainer.set_deep_supervision_enabled(False)
            expected = trainer.network.eval()(volume)
            assert torch.equal(predictor.network.eval()(volume), expected)
        assert expected.std() > 0
    image = run.folder / "raw" / DATASET / "imagesTr" / f"{TEST_CASES[0]}_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], str(folder), save_probabilities=False)
    ours = sitk.ReadImage(str(Path(result.model_folder, "fold_0", "validation", f"{TEST_CASES[0]}.nii.gz")))
    stock = sitk.ReadImage(str(folder / f"{TEST_CASES[0]}.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(stock))


def finetune_and_catch_trainers(monkeypatch, *arguments, **options) -> tuple[list[ArmResult], list[FinetuneTrainer]]:
    """Call ``finetune`` and return its results and the trainers that it made."""
    trainers = []

    def make(*args):
        trainers.append(make_trainer(*args))
        return trainers[-1]

    monkeypatch.setattr(training, "make_trainer", make)
    return finetune(*arguments, FinetuneSettings(**options)), trainers


def is_segmentation_layer(key: str) -> bool:
    return ".seg_layers." in key
