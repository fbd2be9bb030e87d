"""Pretrained weights for nnU-Net's 3d_lowres and cascade: trained here, or refused with the command that trains them."""

import copy
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.errors import ArgumentError
from nnssl.files import read_json, write_json
from nnssl.paths import resolve_folders
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from tests.trainers.finetuning.runs import CASES, CPU, DATASET, folders_set
from tests.trainers.tiny_plan import tiny_plan, write_weights
from trainers.finetuning.finetune import finetune
from trainers.finetuning.settings import FinetuneSettings


@pytest.fixture
def cascade(run, tmp_path):
    """Weights for the full resolution, and a plan of the labelled data set with 3d_lowres and a cascade."""
    plan = tiny_plan(DATASET) | {
        "plans_name": "cascadePlans",
        "image_reader_writer": "SimpleITKIO",
        "continue_training": False,
    }
    low = copy.deepcopy(plan["configurations"]["3d_fullres"])
    low |= {"spacing": [5.0, 3.0, 3.4], "data_identifier": "cascadePlans_3d_lowres"}
    low["next_stage"] = "3d_cascade_fullres"
    # its cases are not preprocessed, and the first stage must not ask for them
    full = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres", "data_identifier": "cascadePlans_3d_fullres"}
    plan["configurations"] |= {"3d_lowres": low, "3d_cascade_fullres": full}
    write_weights(tmp_path / "weights.pth", tiny_plan())
    with folders_set(run.folder):
        path = resolve_folders().preprocessed / DATASET / "cascadePlans.json"
        write_json(path, plan)
        yield tmp_path / "weights.pth", plan, path
        path.unlink()


def exported(weights: Path, plan_file: Path, configuration: str, out: Path) -> Path:
    settings = ExportSettings(for_plans=str(plan_file), configuration=configuration, out=out)
    return export(weights, settings, resolve_folders()).path


def test_stock_nnunet_loads_the_weights_of_the_second_stage(cascade, run, tmp_path):
    weights, plan, path = cascade
    made = exported(weights, path, "3d_cascade_fullres", tmp_path / "cascade.pth")
    plan["configurations"]["3d_cascade_fullres"]["data_identifier"] = "nnsslPlans_3d_fullres"  # any preprocessed cases
    trainer = nnUNetTrainer(plan, "3d_cascade_fullres", 0, read_json(path.parent / "dataset.json", "dataset.json"), CPU)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(made))
    first, source = (
        network["encoder.stages.0.0.convs.0.conv.weight"]
        for network in (trainer.network.state_dict(), torch.load(weights, weights_only=True)["network_weights"])
    )
    assert torch.equal(first[:, :1], source)
    assert first.shape[1] == 1 + len(trainer.label_manager.foreground_labels)
    assert not first[:, 1:].any()


def test_the_second_stage_is_refused_with_nnunets_command(cascade, tmp_path):
    weights, _, path = cascade
    made = exported(weights, path, "3d_cascade_fullres", tmp_path / "cascade.pth")
    with pytest.raises(ArgumentError, match="second stage of a cascade") as raised:
        finetune(4, made, FinetuneSettings(labels=3, epochs=1, iterations_per_epoch=1, device=CPU))
    assert f"nnUNetv2_train {DATASET} 3d_cascade_fullres FOLD -p cascadePlans -pretrained_weights {made}" in str(
        raised.value
    )


def test_the_first_stage_is_trained_like_any_other(cascade, tmp_path):
    weights, _, path = cascade
    made = exported(weights, path, "3d_lowres", tmp_path / "lowres.pth")
    settings = FinetuneSettings(labels=3, epochs=1, iterations_per_epoch=1, processes=1, device=CPU, mirroring=False)
    (result,) = finetune(4, made, settings)
    assert result.configuration == "3d_lowres"
    assert len(list((Path(result.model_folder) / "fold_0" / "validation").glob("*.nii.gz"))) == len(CASES) - 3
