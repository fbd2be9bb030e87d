"""Linear probe and mean teacher: what is trained, what the formulas are, and that stock nnU-Net predicts with the result."""

import copy
import math

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl.errors import UserError
from tests.trainers.finetuning import CASES, CPU, TEST_CASES, is_segmentation_layer, trainer_of
from trainers.finetune import learning_rate
from trainers.finetune_result import read_result
from trainers.finetune_run import finetune
from trainers.labelled_cases import Split, choose_unlabelled
from trainers.linear_probe import LinearProbeTrainer
from trainers.mean_teacher import STUDENT_KEY, Consistency, MeanTeacherTrainer, consistency_weight, teacher_momentum
from trainers.pretrained_weights import load_weights, open_weights

LAYER = "decoder.seg_layers.1."
"""The segmentation layer of full resolution in the tiny network."""
UNLABELLED = {"train_cases": CASES[:2], "test_cases": CASES[4:], "unlabelled_cases": CASES[2:4]}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("NNSSL_PRECISION", "float32")


def weights_of(run):
    return open_weights(run.weights, None, lambda line: None)


# linear probe


def test_linear_probe_changes_the_last_segmentation_layer_only(run, tmp_path):
    trainer = trainer_of(run, tmp_path / "model", trainer_class=LinearProbeTrainer)
    load_weights(trainer, weights_of(run))
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.run_training()
    saved = torch.load(tmp_path / "model" / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert set(saved) == set(before)
    changed = {key for key, value in saved.items() if not torch.equal(value, before[key])}
    assert changed == {f"{LAYER}weight", f"{LAYER}bias"}
    for key, value in run.tensors.items():
        assert is_segmentation_layer(key) or torch.equal(saved[key], value), key


def test_linear_probe_is_adam_on_a_linear_layer(run, tmp_path):
    """One epoch by hand: the same layer on the same features, with a fresh Adam at the schedule's learning rates."""
    trainer = trainer_of(run, tmp_path / "model", trainer_class=LinearProbeTrainer)
    load_weights(trainer, weights_of(run))
    batches = list(copy.copy(trainer).get_dataloaders()[0])
    network = copy.deepcopy(trainer.network)
    trainer.run_training()
    features = {}
    network.decoder.stages[-1].register_forward_hook(lambda module, args, output: features.update(last=output.detach()))
    layer = network.decoder.seg_layers[-1]
    optimizer = torch.optim.Adam(layer.parameters(), lr=1.0)
    for step, batch in enumerate(batches):
        network(batch["data"])
        loss = trainer.loss(layer(features["last"]), batch["target"])
        optimizer.param_groups[0]["lr"] = learning_rate(step // 2, 0.01, 2, 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 12)
        optimizer.step()
    found = trainer.network.decoder.seg_layers[-1]
    torch.testing.assert_close(found.weight, layer.weight, atol=1e-6, rtol=1e-5)


# mean teacher


def test_weight_rises_as_a_gaussian_and_momentum_as_a_mean():
    numbers = Consistency(weight=0.2, ramp_share=0.5, momentum=0.9)
    weights = [consistency_weight(step, 20, numbers) for step in range(20)]
    assert weights[0] == pytest.approx(0.2 * math.exp(-5))
    assert weights[5] == pytest.approx(0.2 * math.exp(-5 * 0.25))
    assert weights[10:] == [pytest.approx(0.2)] * 10
    assert [teacher_momentum(step, numbers) for step in (0, 1, 3)] == [0, 0.5, 0.75]
    assert teacher_momentum(100, numbers) == 0.9


def test_consistency_is_the_squared_difference_of_probabilities(run, tmp_path):
    """Voxel by voxel, from the logits of both networks on what each of them saw."""
    trainer = trainer_of(run, tmp_path / "model", trainer_class=MeanTeacherTrainer, **UNLABELLED)
    trainer.on_train_start()
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(1.1)
    seen = {}
    trainer.network.register_forward_hook(lambda m, args, output: seen.update(student=(args[0], output[0])))
    trainer.teacher.register_forward_hook(lambda m, args, output: seen.update(teacher=(args[0], output[0])))
    volumes = next(trainer.dataloader_train)["unlabelled"]
    loss = trainer.consistency_loss(volumes)
    student, teacher = (logits.detach().double().numpy() for _, logits in (seen["student"], seen["teacher"]))
    total = 0.0
    for sample in range(student.shape[0]):
        for voxel in range(student[sample, 0].size):
            exponents = [
                [math.exp(side[sample, c].flat[voxel]) for c in range(student.shape[1])] for side in (student, teacher)
            ]
            shares = [[e / sum(row) for e in row] for row in exponents]
            total += sum((a - b) ** 2 for a, b in zip(*shares, strict=True))
    assert loss.item() == pytest.approx(total / student.size, rel=1e-4)
    noises = [seen[who][0] - volumes for who in ("student", "teacher")]
    assert not torch.equal(*noises)
    for noise in noises:
        assert noise.abs().max() <= 0.2 + 1e-6
        assert noise.std().item() == pytest.approx(0.1, rel=0.1)
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())
    assert any(
        parameter.grad.abs().sum() > 0 for parameter in trainer.network.parameters() if parameter.grad is not None
    )


def test_teacher_is_the_average_of_the_students(run, tmp_path):
    trainer = trainer_of(run, tmp_path / "model", trainer_class=MeanTeacherTrainer, **UNLABELLED)
    students = []
    original = trainer.train_step

    def watched(batch):
        result = original(batch)
        students.append(trainer.network.encoder.stages[0][0].convs[0].conv.weight.detach().clone())
        return result

    trainer.train_step = watched
    trainer.run_training()
    expected = torch.zeros_like(students[0])
    for step, student in enumerate(students):
        momentum = teacher_momentum(step, trainer.consistency)
        expected = momentum * expected + (1 - momentum) * student
    saved = torch.load(tmp_path / "model" / "fold_0" / "checkpoint_final.pth", weights_only=True)
    key = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(saved["network_weights"][key], expected)
    assert not torch.allclose(expected, students[-1], atol=1e-6)
    assert STUDENT_KEY not in saved
    assert torch.equal(trainer.network.state_dict()[key], saved["network_weights"][key])


def test_without_weight_the_student_is_fine_tuned_as_ever(run, tmp_path):
    plain = trainer_of(run, tmp_path / "plain", **{**UNLABELLED, "unlabelled_cases": ()})
    plain.run_training()
    trainer = trainer_of(run, tmp_path / "model", trainer_class=MeanTeacherTrainer, **UNLABELLED)
    trainer.consistency = Consistency(weight=0.0)
    students = {}
    original = trainer.on_train_end
    trainer.on_train_end = lambda: (students.update(copy.deepcopy(trainer.network.state_dict())), original())
    trainer.run_training()
    for key, value in plain.network.state_dict().items():
        assert torch.equal(students[key], value), key


def test_labels_of_unlabelled_cases_do_not_matter(run, tmp_path, monkeypatch):
    """With their segmentations replaced by others and their class locations gone, the weights are the same to the bit."""
    first = trainer_of(run, tmp_path / "first", trainer_class=MeanTeacherTrainer, **UNLABELLED)
    first.run_training()
    second = trainer_of(run, tmp_path / "second", trainer_class=MeanTeacherTrainer, **UNLABELLED)
    second.initialize()
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    dataset_class = infer_dataset_class(second.preprocessed_dataset_folder)
    original = dataset_class.load_case
    spoiled = []

    def load_case(self, identifier):
        data, segmentation, previous, properties = original(self, identifier)
        if identifier in UNLABELLED["unlabelled_cases"]:
            spoiled.append(identifier)
            segmentation = torch.randint(0, 2, segmentation.shape, generator=torch.Generator().manual_seed(0)).numpy()
            properties = {**properties, "class_locations": None}
        return data, segmentation, previous, properties

    monkeypatch.setattr(dataset_class, "load_case", load_case)
    second.run_training()
    assert set(spoiled) == set(UNLABELLED["unlabelled_cases"])
    other = second.network.state_dict()
    for key, value in first.network.state_dict().items():
        assert torch.equal(other[key], value), key


def test_a_killed_mean_teacher_goes_on_and_ends_with_the_same_weights(run, tmp_path):
    changes = {**UNLABELLED, "trainer_class": MeanTeacherTrainer, "epochs": 3}
    whole = trainer_of(run, tmp_path / "whole", **changes)
    whole.run_training()

    def die(line):
        raise KeyboardInterrupt

    killed = trainer_of(run, tmp_path / "killed", say=die, **changes)
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    latest = tmp_path / "killed" / "fold_0" / "checkpoint_latest.pth"
    content = torch.load(latest, weights_only=True)
    assert set(content[STUDENT_KEY]) == set(content["network_weights"])
    resumed = trainer_of(run, tmp_path / "killed", resume=True, **changes)
    resumed.load_checkpoint(str(latest))
    resumed.run_training()
    expected = whole.network.state_dict()
    for key, tensor in resumed.network.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


# cases and results


def test_unlabelled_cases_are_those_that_are_left(tmp_path):
    split = Split(CASES[:2], CASES[4:], "2cases")
    assert choose_unlabelled(CASES, split) == CASES[2:4]
    listed = tmp_path / "unlabelled.txt"
    listed.write_text(CASES[3])
    assert choose_unlabelled(CASES, split, listed) == (CASES[3],)
    for name, side in ((CASES[0], "trained on"), (CASES[5], "held out")):
        listed.write_text(f"{CASES[3]}\n{name}")
        with pytest.raises(UserError, match=f"{name} {side} too"):
            choose_unlabelled(CASES, split, listed)
    with pytest.raises(UserError, match="needs others; hold out fewer with --test-cases"):
        choose_unlabelled(CASES, Split(CASES[:2], CASES[2:], "2cases"))


@pytest.mark.parametrize("mode", ["linear", "mean_teacher"])
def test_from_the_command_to_what_stock_nnunet_predicts(run, tmp_path, mode):
    """The whole way; the folder names the mode, and the stock predictor loads the weights that were evaluated."""
    arguments = {**run.arguments, "scratch": False, "labels": 2, "mode": mode, "epochs": 1, "warmup_epochs": 0}
    (result,) = finetune(4, run.weights, **arguments)
    assert f"nnssl_rep-rec-{mode.replace('_', '-')}_2cases_seed3_" in result.model_folder
    stored = read_result(type(run.folder)(result.model_folder) / "finetune.json")
    assert stored == result
    assert stored.mode == mode
    left = tuple(sorted(set(CASES) - set(stored.train_cases) - set(TEST_CASES)))
    assert stored.unlabelled_cases == (left if mode == "mean_teacher" else ())
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(result.model_folder, (0,), "checkpoint_final.pth")
    weights = torch.load(f"{result.model_folder}/fold_0/checkpoint_final.pth", weights_only=True)["network_weights"]
    loaded = predictor.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())


def test_a_list_for_another_mode_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--unlabelled .*: is for --mode mean_teacher"):
        finetune(4, run.weights, **{**run.arguments, "unlabelled": tmp_path / "list.txt"})
