"""Alice in the training loop, with Primus and U-Net: stages, pairs, resuming, two processes, loading into stock nnU-Net."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.checkpoint import read_checkpoint
from nnssl.data.case_store import CaseStore
from nnssl.data.patch_pairs import read_pairs
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.log import lines_to
from nnssl.plan import read_plan
from tests.trainers.conftest import NAME
from tests.trainers.pretraining.stopping import stopped_at
from tests.trainers.pretraining.test_pix2rep import run
from tests.trainers.pretraining.test_pretrain import assert_same, tensors_of
from tests.trainers.pretraining.test_sam import SMALL as SMALL_SAM
from trainers.pretraining.pairing import usable_matcher
from trainers.pretraining.settings import PretrainSettings

SMALL = ("projection_hidden=16", "projection_bottleneck=8", "projection_dimensions=16", "alignment_heads=2")
CONFIGURATIONS = ("3d_fullres_primus", "3d_fullres")
configurations = pytest.mark.parametrize("configuration", CONFIGURATIONS)


@configurations
def test_stock_nnunet_takes_the_encoder(toy, configuration):
    """The encoder loads with and without deep supervision and for another number of classes; nothing else is exported."""
    final = run(toy, "alice", *SMALL, configuration=configuration)
    content, provenance = read_checkpoint(final)
    assert final.parent.parent.name == f"AliceTrainer__nnsslPlans__{configuration}"
    plan = read_plan(toy.preprocessed / NAME / "nnsslPlans.json")
    manager = PlansManager(plan.nnunet)
    if configuration == "3d_fullres_primus":
        assert provenance.pretrained == ("down_projection.", "eva.")
    else:
        stages = [
            f"encoder.stages.{index}."
            for index in range(plan.configuration(configuration).for_stage("alice.alignment").tokens.stage + 1)
        ]
        assert set(stages) <= set(provenance.pretrained)
    planned = manager.get_configuration(configuration)
    for deep_supervision in (True, False):
        network = nnUNetTrainer.build_network_architecture(manager, planned, 1, 5, deep_supervision)
        load_pretrained_weights(network, str(final))
        for key, value in network.state_dict().items():
            assert ".seg_layers." in key or torch.equal(value, content["network_weights"][key]), key
        logits = network(torch.zeros(1, 1, *planned.patch_size))
        shown = logits[0] if deep_supervision else logits
        assert shown.shape == (1, 5, *planned.patch_size)


def test_a_stage_that_nothing_asks_for_is_left_out(toy):
    """The toy scans are hardly larger than a patch, so the plan does not need embeddings."""
    lines: list[str] = []
    with lines_to(lines.append):
        final = run(toy, "alice", *SMALL)
    assert "sam.embedding: skipped, these settings do not need it" in lines
    results = final.parents[2]
    assert not list(results.glob("SAMTrainer*"))
    assert not read_pairs(final.parent / "pairs.npz").matched.any()


def test_scans_are_not_paired_where_no_loss_compares_them(toy):
    final = run(toy, "alice", "inter_weight=0", *SMALL)
    assert not (final.parent / "pairs.npz").exists()


def test_sam_runs_first_in_its_own_configuration_and_its_weights_are_not_taken(toy, capsys):
    """Embeddings that fail their examination pair no places, and a message reports this."""
    from_sam = run(toy, "alice", "partners=sam", *SMALL, *SMALL_SAM, configuration="3d_fullres_primus")
    out = capsys.readouterr().out
    sam = toy.results / NAME / "SAMTrainer__nnsslPlans__3d_fullres" / "fold_all"
    examined = json.loads((sam / "examination.json").read_text())
    matched = read_pairs(from_sam.parent / "pairs.npz").matched
    assert not examined["usable"]
    assert "Places are paired by the body's box instead of embeddings" in out
    assert not matched.any()
    assert read_checkpoint(from_sam)[1].init is None
    lines: list[str] = []
    with lines_to(lines.append):
        run(toy, "alice", "partners=sam", *SMALL, *SMALL_SAM, configuration="3d_fullres_primus")
    assert lines[0].startswith("sam.embedding: already finished")


def test_embeddings_that_pass_pair_places(toy):
    run(toy, "sam", *SMALL_SAM)
    path = toy.results / NAME / "SAMTrainer__nnsslPlans__3d_fullres" / "fold_all" / "examination.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "usable": True}))
    final = run(toy, "alice", "partners=sam", *SMALL, *SMALL_SAM)
    pairs = read_pairs(final.parent / "pairs.npz")
    assert pairs.matched.any()
    assert (pairs.query != pairs.key).all()


def test_embeddings_of_another_plan_are_refused(toy):
    """A new plan may have another spacing under the same name."""
    final = run(toy, "sam", *SMALL_SAM)
    path = final.parent / "examination.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "usable": True}))
    plan = read_plan(toy.preprocessed / NAME / "nnsslPlans.json")
    store = CaseStore(toy.preprocessed / NAME / plan.configuration("3d_fullres").case_folder)
    arguments = (store, torch.device("cpu"), nullcontext)
    assert usable_matcher(final, plan, *arguments) is not None
    own = plan.configuration("3d_fullres")
    changed = {**plan.pretext.configurations, "3d_fullres": replace(own, spacing_mm=(9.0, 1.0, 1.25))}
    with pytest.raises(UserError, match="another data set or spacing than this plan's"):
        usable_matcher(final, replace(plan, pretext=replace(plan.pretext, configurations=changed)), *arguments)


def test_a_stage_alone_says_what_it_misses(toy):
    from trainers.pretraining.pretrain import pretrain

    with pytest.raises(UserError, match="run nnssl_pretrain -m sam"):
        pretrain("alice", NAME, PretrainSettings(overrides=("partners=sam", *SMALL), stages=("alice.alignment",)), toy)


@pytest.mark.nightly
def test_initial_weights_go_to_alice_not_to_sam(toy):
    first = run(toy, "alice", *SMALL)
    kept = first.rename(toy.results / "first.pth")
    final = run(toy, "alice", "partners=sam", *SMALL, *SMALL_SAM, restart=True, init=kept)
    assert read_checkpoint(final)[1].init == str(kept)
    sam = toy.results / NAME / "SAMTrainer__nnsslPlans__3d_fullres" / "fold_all" / "checkpoint_final.pth"
    assert read_checkpoint(sam)[1].init is None


def take_tokens_of_an_earlier_stage(toy) -> None:
    """Change the plan so that the U-Net has stages beyond that of its tokens, which are not trained."""
    path = toy.preprocessed / NAME / "nnsslPlans.json"
    plan = read_json(path, "plan")
    tokens = plan["pretext"]["configurations"]["3d_fullres"]["stages"]["alice.alignment"]["tokens"]
    network = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert tokens["stage"] == 2
    grid = [n * step for n, step in zip(tokens["grid"], network["strides"][2], strict=True)]
    size = [n // step for n, step in zip(tokens["size_vox"], network["strides"][2], strict=True)]
    tokens.update(stage=1, grid=grid, size_vox=size, width=network["features_per_stage"][1])
    write_json(path, plan)


@pytest.mark.parametrize(
    ("configuration", "similarity"),
    [
        ("3d_fullres_primus", "cosine"),
        pytest.param("3d_fullres_primus", "info_nce", marks=pytest.mark.nightly),
        ("3d_fullres", "cosine"),
    ],
)
def test_two_processes_equal_one(toy, configuration, similarity):
    """Compare gradients and moving averages over two steps. Pairs stay in one process; statistics and keys use both."""
    options = ("optimizer=sgd", "epochs=1", "iterations_per_epoch=2", "gradient_clip=1e9", f"similarity={similarity}")
    options = (*options, *SMALL)
    take_tokens_of_an_earlier_stage(toy)
    alone = tensors_of(run(toy, "alice", *options, configuration=configuration))
    together = tensors_of(run(toy, "alice", *options, configuration=configuration, restart=True, num_gpus=2))
    gradients = [value for key, value in alone.items() if key.endswith("momentum_buffer")]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 1e-3
    assert_same(together, alone, rtol=1e-3, atol=2e-5 * max(1.0, largest))


def test_a_batch_that_would_part_a_pair_is_refused(toy):
    with pytest.raises(
        UserError, match=r"multiple of 4 for 2 processes, with a multiple of 2 in each, got 6; set batch_size=4"
    ):
        run(toy, "alice", "batch_size=6", *SMALL, num_gpus=2)


@configurations
def test_stopped_run_ends_bit_identical(toy, monkeypatch, configuration):
    final = run(toy, "alice", *SMALL, configuration=configuration)
    expected = tensors_of(final)
    pairs = read_pairs(final.parent / "pairs.npz")
    with stopped_at(monkeypatch, 3):
        run(toy, "alice", *SMALL, configuration=configuration, restart=True)
    run(toy, "alice", *SMALL, configuration=configuration)
    assert_same(tensors_of(final), expected)
    assert np.array_equal(read_pairs(final.parent / "pairs.npz").query_vox, pairs.query_vox)


def test_other_cases_than_the_pairs_are_refused(toy, monkeypatch):
    """A run that resumes after a case was deleted would draw pairs of the deleted case."""
    with stopped_at(monkeypatch, 3):
        run(toy, "alice", *SMALL)
    folder = toy.preprocessed / NAME / "nnsslPlans_cases_3d"
    for file in folder.glob("toy_05*"):
        file.unlink()
    with pytest.raises(UserError, match=r"pairs.npz: the pairs are of other cases"):
        run(toy, "alice", *SMALL)


def test_the_probe_needs_feature_maps(toy):
    with pytest.raises(
        UserError, match="probe needs the feature maps of a U-Net, which 3d_fullres_primus does not have"
    ):
        run(toy, "alice", *SMALL, configuration="3d_fullres_primus", probe=502)
