"""SAM in the training loop: exported weights, examination, resuming, two processes, loading into stock nnU-Net."""

import json

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
from trainers.pretraining import pretrain_trainer

SMALL = ("dimensions=8", "fine_queries=10", "fine_pool=60", "fine_negatives=20", "coarse_queries=4", "coarse_pool=10",
         "coarse_negatives=6", "other_negatives=8")  # fmt: skip


def test_it_says_how_well_places_are_found_and_leaves_what_it_trained(toy, capsys):
    final = run(toy, "sam", *SMALL)
    examined = json.loads((final.parent / "examination.json").read_text())
    assert 0 <= examined["self_hit_share"] <= 1
    assert examined["usable"] is (not examined["reasons"])
    assert "Places found in other scans: cycle error" in capsys.readouterr().out
    assert not (final.parent / "checkpoint_latest.pth").exists()
    content, provenance = read_checkpoint(final)
    manager = PlansManager(read_plan(toy.preprocessed / NAME / "nnsslPlans.json").nnunet)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 5, True)
    load_pretrained_weights(network, str(final))
    for key, value in network.state_dict().items():
        assert ".seg_layers." in key or torch.equal(value, content["network_weights"][key]), key
    last = max(int(key.split(".")[2]) for key in content["network_weights"] if key.startswith("decoder.stages."))
    assert f"decoder.stages.{last}." not in provenance.pretrained
    assert not any("embedding" in key for key in content["network_weights"])


def test_a_failed_examination_loses_nothing(toy, monkeypatch):
    """The training is saved before the examination, so the same command then only repeats the examination."""
    import nnssl.matching.anatomical_sanity as sanity

    def fail(*_):
        raise UserError("the disk is full")

    steps = []
    original = pretrain_trainer.PretrainTrainer.train_step
    monkeypatch.setattr(
        pretrain_trainer.PretrainTrainer, "train_step", lambda self, batch: steps.append(1) or original(self, batch)
    )
    with monkeypatch.context() as patched:
        patched.setattr(sanity, "examine", fail)
        with pytest.raises(UserError, match="disk is full"):
            run(toy, "sam", *SMALL)
    done = len(steps)
    assert done > 0
    final = run(toy, "sam", *SMALL)
    assert len(steps) == done
    assert (final.parent / "examination.json").exists()


def test_two_processes_equal_one(toy):
    """Coarse negatives include cells of the other process's patches."""
    options = ("optimizer=sgd", "epochs=1", "iterations_per_epoch=1", "gradient_clip=1e9", "batch_size=4", *SMALL)
    alone = tensors_of(run(toy, "sam", *options))
    together = tensors_of(run(toy, "sam", *options, restart=True, num_gpus=2))
    gradients = [value for key, value in alone.items() if key.endswith("momentum_buffer")]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 1e-4
    assert_same(together, alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


@pytest.mark.nightly
def test_stopped_run_ends_bit_identical(toy, monkeypatch):
    final = run(toy, "sam", *SMALL)
    expected = tensors_of(final)
    with stopped_at(monkeypatch, 3):
        run(toy, "sam", *SMALL, restart=True)
    run(toy, "sam", *SMALL)
    assert_same(tensors_of(final), expected)


def test_slices_are_refused(toy):
    with pytest.raises(UserError, match="sam needs a convolutional U-Net for volumes"):
        run(toy, "sam", configuration="2d")
