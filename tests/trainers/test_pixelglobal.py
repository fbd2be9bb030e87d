"""Pixel-global in the loop: resume, two processes with the teacher, and what stock nnU-Net loads, in 2D and 3D."""

import os
import signal

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.checkpoint import read_checkpoint
from planners.plan import read_plan
from tests.trainers.conftest import NAME
from tests.trainers.test_pix2rep import run
from tests.trainers.test_pretrain import assert_same, tensors_of
from trainers import pretrain_trainer

SMALL = ("points=64", "uncertainty_passes=2")
ONE_STEP = ("optimizer=sgd", "epochs=1", "iterations_per_epoch=1", "gradient_clip=1e9", *SMALL)


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_stock_nnunet_takes_encoder_and_decoder(toy, configuration):
    """Every tensor but the segmentation layers is the student's; teacher and heads stay behind."""
    final = run(toy, "pixelglobal", *SMALL, configuration=configuration)
    content, provenance = read_checkpoint(final)
    assert final.parent.parent.name == f"PixelGlobalTrainer__nnsslPlans__{configuration}"
    assert provenance.pretrained == ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
    assert not any("teacher" in key or "head" in key for key in content["network_weights"])
    manager = PlansManager(read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 5, True)
    load_pretrained_weights(network, str(final))
    for key, value in network.state_dict().items():
        assert ".seg_layers." in key or torch.equal(value, content["network_weights"][key]), key
    teacher = content["nnssl"]["state"]["method"]
    moved = [k for k in teacher if k.startswith("teacher.decoder.stages.")]
    assert moved
    assert any(not torch.equal(teacher[k], content["network_weights"][k.removeprefix("teacher.")]) for k in moved)


@pytest.mark.parametrize("stabilizer", ["none", "literal"])
def test_two_processes_equal_one(toy, stabilizer):
    """Gradients of network and heads and the moved teacher: partners stay together, statistics are of all ranks."""
    options = (*ONE_STEP, f"stabilizer={stabilizer}")
    alone = tensors_of(run(toy, "pixelglobal", *options))
    together = tensors_of(run(toy, "pixelglobal", *options, restart=True, processes=2))
    gradients = [value for key, value in alone.items() if key.endswith("momentum_buffer")]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 1e-3
    assert_same(together, alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


def test_stopped_run_ends_bit_identical(toy, monkeypatch):
    final = run(toy, "pixelglobal", *SMALL)
    expected = tensors_of(final)
    original = pretrain_trainer.PretrainTrainer.train_step

    def interrupted(self, batch):
        if self.current_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain_trainer.PretrainTrainer, "train_step", interrupted)
        with pytest.raises(SystemExit):
            run(toy, "pixelglobal", *SMALL, restart=True)
    run(toy, "pixelglobal", *SMALL)
    assert_same(tensors_of(final), expected)
