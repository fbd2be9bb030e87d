"""Primus in training: its one resolution has to count in the loss of stock nnU-Net, and in ours."""

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.errors import UserError
from nnssl.plan import TransformerSize
from planners.primus_rules import primus_architecture
from tests.nnssl.weights.tiny_networks import dataset_json, plans
from tests.trainers.finetuning.runs import CPU, make_settings
from trainers.finetuning.finetune_trainer import make_trainer

PATCH, TOKEN = (8, 24, 16), (2, 8, 8)


def primus_plan(single: bool = False) -> dict:
    """A plan as the planner writes it, or one of an earlier version whose strides have no second resolution."""
    architecture = primus_architecture(TransformerSize(36, 2, 3, 2), TOKEN, PATCH)
    if single:
        architecture["arch_kwargs"]["strides"] = architecture["arch_kwargs"]["strides"][:2]
    return plans(architecture, 3, 1)


def targets(scales: list[list[float]]) -> list[torch.Tensor]:
    """Labels at every resolution that nnU-Net's loader makes."""
    labels = torch.randint(0, 3, (2, 1, *PATCH), generator=torch.Generator().manual_seed(0)).float()
    return [torch.nn.functional.interpolate(labels, scale_factor=scale, mode="nearest") for scale in scales]


def assert_learns(trainer: nnUNetTrainer) -> None:
    volumes = torch.randn(2, 1, *PATCH, generator=torch.Generator().manual_seed(1))
    loss = trainer.loss(trainer.network(volumes), targets(trainer._get_deep_supervision_scales()))
    assert torch.isfinite(loss)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainer.network.parameters())
    last = trainer.network.decoder.seg_layers[0].weight
    assert last.grad.abs().max() > 0
    wrapped = trainer.loss.loss
    whole = wrapped.loss if isinstance(wrapped, DeepSupervisionWrapper) else wrapped
    expected = whole(trainer.network(volumes)[0], targets([[1, 1, 1]])[0])
    torch.testing.assert_close(loss, expected)  # the full resolution has all the weight


def test_stock_nnunet_trains_it(nnunet_folders):
    plan = primus_plan() | {"continue_training": False}
    trainer = nnUNetTrainer(plan, "3d_fullres", 0, dataset_json(["CT"]), CPU)
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, trainer.enable_deep_supervision
    )
    trainer.loss = trainer._build_loss()
    assert_learns(trainer)


@pytest.mark.parametrize("single", [False, True])
def test_fine_tuning_trains_it_also_with_an_earlier_plan(nnunet_folders, tmp_path, single):
    data = nnunet_folders / "preprocessed" / "Dataset004_Labelled" / "nnsslPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # tells nnU-Net what kind of files there are
    settings = make_settings(tmp_path / "model", optimizer="adamw", learning_rate=3e-4)
    described = dataset_json(["CT"])
    trainer = make_trainer(primus_plan(single), "3d_fullres", described, CPU, settings, False, None)
    trainer.initialize()
    assert_learns(trainer)
    with pytest.raises(UserError, match="the loss of epoch 0 is not finite"):
        trainer.on_train_epoch_end([{"loss": np.array(float("nan"))}])
