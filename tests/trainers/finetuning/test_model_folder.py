"""A fine-tuned model predicts by nnU-Net where nothing of nnssl can be imported, or only its networks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnssl.networks.backbone import build_network
from tests.nnssl.weights.tiny_networks import primus, unet
from tests.trainers.finetuning.runs import DATASET, TEST_CASES
from tests.trainers.tiny_plan import PATCH_SIZE

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Missing())
"""
COMMAND = """
from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder
sys.argv = ["nnUNetv2_predict_from_modelfolder", "-i", {images!r}, "-o", {out!r}, "-m", {model!r}, "-f", "0",
            "-device", "cpu", "-npp", "1", "-nps", "1"]
predict_entry_point_modelfolder()
"""
WITHOUT_WORKERS = """
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder({model!r}, (0,), "checkpoint_final.pth")
predictor.predict_from_files_sequential({images!r}, {out!r})
"""


def predict(how: str, folder: Path, images: Path, out: Path, missing: set[str]) -> subprocess.CompletedProcess:
    out.mkdir()
    code = MISSING.format(missing=missing) + how.format(images=str(images), out=str(out), model=str(folder))
    return run_python(code, out.parent)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code without any variable of nnU-Net's or ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet", "NNSSL"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=folder
    )


@pytest.fixture
def images(run, tmp_path):
    (tmp_path / "images").mkdir()
    name = f"{TEST_CASES[0]}_0000.nii.gz"
    shutil.copy(run.folder / "raw" / DATASET / "imagesTr" / name, tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.mark.nightly
def test_without_nnssl(run, images, tmp_path):
    model = Path(run.results[0].model_folder)
    done = predict(COMMAND, model, images, tmp_path / "out", {"nnssl", "planners", "trainers"})
    assert done.returncode == 0, done.stderr[-2000:]
    ours = sitk.ReadImage(str(model / "fold_0" / "validation" / f"{TEST_CASES[0]}.nii.gz"))
    stock = sitk.ReadImage(str(tmp_path / "out" / f"{TEST_CASES[0]}.nii.gz"))
    assert (sitk.GetArrayFromImage(ours) == sitk.GetArrayFromImage(stock)).all()
    # what is said to be missing is: the network of the next test could not be built
    assert "is not installed here" in predict(COMMAND, model, images, tmp_path / "none", {"nnunetv2"}).stderr


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(unet("hybrid", 3), id="hybrid"),
        pytest.param(
            primus(input_shape=list(PATCH_SIZE), patch_embed_size=[2, 4, 4]), id="primus", marks=pytest.mark.nightly
        ),
    ],
)
def test_networks_of_nnssl_need_the_package_nnssl_alone(run, images, tmp_path, network):
    model = tmp_path / "model"
    shutil.copytree(run.results[0].model_folder, model)
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"] = network
    (model / "plans.json").write_text(json.dumps(plans))
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=True)
    classes = len(json.loads((model / "dataset.json").read_text())["labels"])
    content["network_weights"] = build_network(network, 1, classes, 0).state_dict()
    torch.save(content, checkpoint)
    done = predict(WITHOUT_WORKERS, model, images, tmp_path / "out", {"planners", "trainers"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / f"{TEST_CASES[0]}.nii.gz").exists()


def test_every_file_of_a_comparison_opens_without_running_code(run):
    folders = [Path(result.model_folder) for result in run.results]  # other tests leave broken files elsewhere
    paths = [run.weights, *(path for folder in folders for path in sorted(folder.rglob("*.pth")))]
    assert len(paths) >= 3  # the pretrained weights and both arms
    for path in paths:
        torch.load(path, weights_only=True)
    assert not [path for folder in folders for path in folder.rglob("*.pkl")]
