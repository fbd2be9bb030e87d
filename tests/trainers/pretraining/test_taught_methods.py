"""Methods with a moving average of a U-Net, in 2D and 3D: resuming, two processes, loading into stock nnU-Net."""

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
from tests.trainers.pretraining.test_pix2rep import run
from tests.trainers.pretraining.test_pretrain import assert_same, tensors_of

SMALL = {"pixelglobal": ("points=64", "uncertainty_passes=2"), "pcrl": ("queue_length=12",)}
TRAINERS = {"pixelglobal": "PixelGlobalTrainer", "pcrl": "PCRLTrainer"}
ONE_STEP = ("optimizer=sgd", "epochs=1", "iterations_per_epoch=1", "gradient_clip=1e9")
LONGER = ("epochs=2", "iterations_per_epoch=12")
"""A run long enough for a constant momentum above 0; up to 20 steps it is 0, and the moving average equals the student."""
methods = pytest.mark.parametrize("method", SMALL)


@methods
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_stock_nnunet_takes_encoder_and_decoder(toy, method, configuration):
    """All tensors except the segmentation layers are the student's; moving average, heads and attention are not exported."""
    final = run(toy, method, *SMALL[method], configuration=configuration)
    content, provenance = read_checkpoint(final)
    assert final.parent.parent.name == f"{TRAINERS[method]}__nnsslPlans__{configuration}"
    assert provenance.pretrained == ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
    inside = ("teacher", "head", "attention", "output")
    assert not any(part in key for key in content["network_weights"] for part in inside)
    manager = PlansManager(read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 5, True)
    load_pretrained_weights(network, str(final))
    for key, value in network.state_dict().items():
        assert ".seg_layers." in key or torch.equal(value, content["network_weights"][key]), key
    state = content["nnssl"]["state"]["method"]
    averaged = [key for key in state if key.startswith("teacher.")]
    assert averaged
    if method == "pixelglobal":  # pcrl's is 0 in so short a run
        moved = [key for key in averaged if key.startswith("teacher.decoder.stages.")]
        student = content["network_weights"]
        assert any(not torch.equal(state[key], student[key.removeprefix("teacher.")]) for key in moved)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pixelglobal", ("stabilizer=none",)),
        ("pixelglobal", ("stabilizer=literal",)),
        ("pcrl", ()),
        ("pcrl", ("negatives=both", "hybrid_target=turned_then_mixed", "attention=gate")),
    ],
)
def test_two_processes_equal_one(toy, method, options):
    """Compare gradients, moving average and queue. Partners stay in one process; statistics and keys use all ranks."""
    options = (*ONE_STEP, *SMALL[method], *options)
    alone = tensors_of(run(toy, method, *options))
    together = tensors_of(run(toy, method, *options, restart=True, num_gpus=2))
    gradients = [value for key, value in alone.items() if key.endswith("momentum_buffer")]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 1e-3
    assert_same(together, alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


def test_two_processes_in_pieces_equal_one_at_once(toy):
    """A process passes its own part of the batch in pieces, under ``DistributedDataParallel``."""
    options = (*ONE_STEP, *SMALL["pcrl"], "batch_size=4")
    alone = tensors_of(run(toy, "pcrl", *options))
    final = run(toy, "pcrl", *options, "pieces=2", "checkpointing=true", restart=True, num_gpus=2)
    settings = read_checkpoint(final)[1].settings
    assert (settings["pieces"], settings["checkpointing"]) == (2, True)
    largest = max(float(value.abs().max()) for key, value in alone.items() if key.endswith("momentum_buffer"))
    assert_same(tensors_of(final), alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


def test_more_pieces_than_patches_of_a_process_are_refused(toy):
    with pytest.raises(UserError, match=r"^pieces must be at most the 2 patches of a process, got 3$"):
        run(toy, "pcrl", "batch_size=4", "pieces=3", num_gpus=2)


@pytest.mark.nightly
def test_two_processes_have_the_moving_average_and_the_queue_of_one(toy):
    """Enough steps for a moving average that differs from its student, but so few and small that rounding is negligible."""
    options = (*ONE_STEP, *SMALL["pcrl"], *LONGER, "learning_rate=0.03", "learning_rate_schedule=constant")
    options += ("head_normalisation=none",)  # it enlarges rounding; RepRec's test and test_distributed.py cover it
    final = run(toy, "pcrl", *options, "negatives=queue")
    alone = {key: value for key, value in tensors_of(final).items() if not key.startswith("optimizer")}
    run(toy, "pcrl", *options, "negatives=queue", restart=True, num_gpus=2)
    together = {key: value for key, value in tensors_of(final).items() if not key.startswith("optimizer")}
    assert "method/queue.keys" in alone
    assert_same(together, alone, rtol=0, atol=3e-6)
    prefix = "method/teacher."
    averaged = [key for key in alone if key.startswith(prefix)]
    apart = [(alone[key] - alone[f"encoder.{key.removeprefix(prefix)}"]).abs().max() for key in averaged]
    assert max(apart) > 9e-6, "a moving average that is its student shows nothing"


@pytest.mark.parametrize("method", ["pixelglobal", pytest.param("pcrl", marks=pytest.mark.nightly)])
def test_stopped_run_ends_bit_identical(toy, monkeypatch, method):
    options = (*SMALL[method], *(LONGER if method == "pcrl" else ()))
    final = run(toy, method, *options)
    expected = tensors_of(final)
    with stopped_at(monkeypatch, 3):
        run(toy, method, *options, restart=True)
    run(toy, method, *options)
    assert_same(tensors_of(final), expected)
