"""Pretraining that is planned around a user's own nnU-Net plan: the weights drop into that plan as it is."""

import shutil

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.checkpoint import load_tensors
from nnssl.cli.plan_and_preprocess import main
from nnssl.files import read_json
from nnssl.paths import resolve_folders
from tests.trainers.finetuning.runs import DATASET, folders_set
from trainers.finetuning.labelled_data import make_fingerprint
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

UNLABELLED = "Dataset501_Unlabelled"


@pytest.mark.parametrize(
    ("planner", "plans_name"),
    [
        (ExperimentPlanner, "nnUNetPlans"),
        pytest.param(nnUNetPlannerResEncL, "nnUNetResEncUNetLPlans", marks=pytest.mark.nightly),
    ],
)
def test_weights_drop_into_the_unchanged_plan(finetuned, tmp_path, capsys, planner, plans_name):
    for name in ("preprocessed", "results", f"raw/{UNLABELLED}"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "raw" / DATASET).symlink_to(finetuned.folder / "raw" / DATASET)
    shutil.copytree(tmp_path / "raw" / DATASET / "imagesTr", tmp_path / "raw" / UNLABELLED / "imagesTr")
    with folders_set(tmp_path):
        folders = resolve_folders()
        make_fingerprint(DATASET, folders, 1)
        planner(DATASET, plans_name=plans_name).plan_experiment()
        path = folders.preprocessed / DATASET / f"{plans_name}.json"
        before = path.read_bytes()
        arguments = ["-d", "501", "--like", "4", "--like-plans", plans_name, "-c", "3d_fullres", "--processes", "1"]
        assert main([*arguments, "--preset", "8gb"]) == 0, capsys.readouterr().err
        overrides = ["batch_size=2", "epochs=1", "iterations_per_epoch=1", "points_per_image=10"]
        final = pretrain(
            "pix2rep", UNLABELLED, PretrainSettings(configuration="3d_fullres", overrides=overrides, workers=0), folders
        )
        assert path.read_bytes() == before
        manager = PlansManager(read_json(path, "plan"))
        network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 5, True)
        load_pretrained_weights(network, str(final))
    weights = load_tensors(final)["network_weights"]
    for name, value in network.state_dict().items():
        assert ".seg_layers." in name or torch.equal(value, weights[name]), name
