"""Methods that restore or segment what was destroyed, and regions: resuming, two processes, loading into stock nnU-Net."""

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.checkpoint import read_checkpoint
from nnssl.plan import read_plan
from tests.trainers.conftest import NAME
from tests.trainers.pretraining.stopping import stopped_at
from tests.trainers.pretraining.test_pix2rep import run
from tests.trainers.pretraining.test_pretrain import assert_same, tensors_of

TRAINERS = {"mae": "MAETrainer", "models_genesis": "ModelsGenesisTrainer", "volume_fusion": "VolumeFusionTrainer"} | {
    "regions": "RegionsTrainer"
}
ONE_STEP = ("optimizer=sgd", "epochs=1", "iterations_per_epoch=1", "warmup_epochs=0", "gradient_clip=1e9")
PRIMUS = "3d_fullres_primus"


@pytest.mark.parametrize(
    ("method", "configuration"),
    [*((method, dimension) for method in TRAINERS for dimension in ("3d_fullres", "2d")), ("mae", PRIMUS)],
)
def test_stock_nnunet_takes_what_was_pretrained(toy, method, configuration):
    final = run(toy, method, configuration=configuration)
    content, provenance = read_checkpoint(final)
    assert final.parent.parent.name == f"{TRAINERS[method]}__nnsslPlans__{configuration}"
    unet = ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
    assert provenance.pretrained == (("down_projection.", "eva.") if configuration == PRIMUS else unet)
    assert not any(part in key for key in content["network_weights"] for part in ("output", "skip_tokens"))
    manager = PlansManager(read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 5, True)
    load_pretrained_weights(network, str(final))
    for key, value in network.state_dict().items():
        assert ".seg_layers." in key or torch.equal(value, content["network_weights"][key]), key


@pytest.mark.parametrize(
    ("method", "options"),
    [("mae", ()), ("mae", ("sparse=true",)), ("models_genesis", ()), ("volume_fusion", ()), ("regions", ())],
)
def test_two_processes_equal_one(toy, method, options):
    options = (*ONE_STEP, "batch_size=4", *options)
    alone = tensors_of(run(toy, method, *options, configuration="2d"))
    together = tensors_of(run(toy, method, *options, configuration="2d", restart=True, num_gpus=2))
    largest = max(float(value.abs().max()) for key, value in alone.items() if key.endswith("momentum_buffer"))
    assert largest > 1e-3
    assert_same(together, alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


@pytest.mark.parametrize(
    "method", ["mae", pytest.param("models_genesis", marks=pytest.mark.nightly), "volume_fusion", "regions"]
)
def test_stopped_run_ends_bit_identical(toy, monkeypatch, method):
    final = run(toy, method, configuration="2d")
    expected = tensors_of(final)
    with stopped_at(monkeypatch, 3):
        run(toy, method, configuration="2d", restart=True)
    run(toy, method, configuration="2d")
    assert_same(tensors_of(final), expected)
