"""Pix2Rep v1 and v2 in the training loop, in 2D and 3D: resuming, two processes, loading into stock nnU-Net."""

from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.checkpoint import read_checkpoint
from nnssl.errors import UserError
from nnssl.plan import read_plan
from tests.trainers.conftest import NAME
from tests.trainers.pretraining.stopping import stopped_at
from tests.trainers.pretraining.test_pretrain import assert_same, tensors_of
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

VERSIONS = ("pix2rep", "pix2rep_v2")
# after one step of SGD its buffer is the gradient; later steps blow up rounding where a point sits on a kink
ONE_STEP = ("optimizer=sgd", "epochs=1", "iterations_per_epoch=1", "points_per_image=16", "gradient_clip=1e9")


def run(folders, method: str, *overrides: str, configuration: str = "3d_fullres", **arguments) -> Path:
    return pretrain(
        method,
        NAME,
        PretrainSettings(configuration=configuration, overrides=overrides, workers=0, device="cpu", **arguments),
        folders,
    )


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_stock_nnunet_takes_encoder_and_decoder(toy, configuration):
    """All tensors except the segmentation layers are the pretrained ones; the head is not exported."""
    final = run(toy, "pix2rep", configuration=configuration)
    content, provenance = read_checkpoint(final)
    assert final.parent.parent.name == f"Pix2RepTrainer__nnsslPlans__{configuration}"
    assert provenance.pretrained == ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
    assert not any("head" in key for key in content["network_weights"])
    manager = PlansManager(read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 5, True)
    random = {key: value.clone() for key, value in network.state_dict().items()}
    load_pretrained_weights(network, str(final))
    changed = 0
    for key, value in network.state_dict().items():
        if ".seg_layers." in key:
            assert torch.equal(value, random[key]), key
        else:
            assert torch.equal(value, content["network_weights"][key]), key
            changed += key.startswith("decoder.stages.") and not torch.equal(value, random[key])
    assert changed > 0


@pytest.mark.parametrize("method", VERSIONS)
def test_two_processes_equal_one(toy, method):
    """Equal gradients show that points, the head's statistics and the negatives of all ranks are the same."""
    alone = tensors_of(run(toy, method, *ONE_STEP))
    together = tensors_of(run(toy, method, *ONE_STEP, restart=True, num_gpus=2))
    gradients = [value for key, value in alone.items() if key.endswith("momentum_buffer")]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 0.01
    # rounding is relative to the sums that a gradient is made of, and one of them may be near 0
    assert_same(together, alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


def test_stopped_run_ends_bit_identical(toy, monkeypatch):
    final = run(toy, "pix2rep")
    expected = tensors_of(final)
    with stopped_at(monkeypatch, 3):
        run(toy, "pix2rep", restart=True)
    assert not final.exists()
    assert read_checkpoint(final.with_name("checkpoint_latest.pth"))[1].step == 4
    run(toy, "pix2rep")
    assert_same(tensors_of(final), expected)


def test_needs_the_plain_network(toy):
    with pytest.raises(
        UserError, match="pix2rep needs a convolutional U-Net; configuration must be .*, got 3d_fullres_hybrid"
    ):
        run(toy, "pix2rep", configuration="3d_fullres_hybrid")


@pytest.mark.parametrize(
    "setting", ["temperature=0", "features=all", "points_per_image=1", "foreground_share=2", "embedding_dimensions=1"]
)
def test_values_out_of_range_are_refused(toy, setting):
    with pytest.raises(UserError, match=f"^{setting.partition('=')[0]} must be .*, got {setting.partition('=')[2]}$"):
        run(toy, "pix2rep", setting)
