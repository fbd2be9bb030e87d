"""Mean teacher: its formulas, which images and labels it uses, and that stock nnU-Net predicts with the result."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl.data.phantoms import write_phantom_dataset
from nnssl.data.raw import RawCase, RawDataset
from nnssl.errors import ArgumentError, UserError
from nnssl.log import lines_to
from tests.trainers.finetuning.runs import (
    CASES,
    DATASET,
    TEST_CASES,
    assert_stock_nnunet_predicts_the_same,
    final_weights,
    finetune_and_catch_trainers,
    killed_and_resumed,
    trainer_of,
)
from trainers.finetuning.finetune import finetune
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.held_out import without_held_out
from trainers.finetuning.labelled_cases import Split, choose_unlabelled
from trainers.finetuning.mean_teacher import (
    STUDENT_KEY,
    Consistency,
    MeanTeacherTrainer,
    consistency_weight,
    teacher_momentum,
)
from trainers.finetuning.result import read_result
from trainers.finetuning.settings import FinetuneSettings

UNLABELLED = {"train_cases": CASES[:2], "test_cases": CASES[4:], "unlabelled_cases": CASES[2:4]}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("NNSSL_PRECISION", "float32")


def teacher_of(run, folder, **changes):
    return trainer_of(run, folder, trainer_class=MeanTeacherTrainer, **{**UNLABELLED, **changes})


def test_weight_rises_as_a_gaussian_and_momentum_as_a_mean():
    numbers = Consistency(weight=0.2, ramp_share=0.5, momentum=0.9)
    weights = [consistency_weight(step, 20, numbers) for step in range(20)]
    assert weights[0] == pytest.approx(0.2 * math.exp(-5))
    assert weights[5] == pytest.approx(0.2 * math.exp(-5 * 0.25))
    assert weights[10:] == [pytest.approx(0.2)] * 10
    assert [teacher_momentum(step, numbers) for step in (0, 1, 3)] == [0, 0.5, 0.75]
    assert teacher_momentum(100, numbers) == 0.9


def test_the_numbers_are_those_of_the_papers():
    numbers = Consistency()
    ramp = [consistency_weight(step, 1000, numbers) for step in (0, 100, 200, 400, 999)]
    assert ramp == pytest.approx([0.000673795, 0.006005, 0.02865048, 0.1, 0.1], rel=1e-4)
    assert [teacher_momentum(step, numbers) for step in (9, 98, 99, 5000)] == pytest.approx(
        [0.9, 0.98989899, 0.99, 0.99]
    )


def test_consistency_is_the_squared_difference_of_probabilities(run, tmp_path):
    """Voxel by voxel, from the logits of both networks on what each of them saw."""
    trainer = teacher_of(run, tmp_path / "model")
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
    assert all(key == "student" or not seen[key][1].requires_grad for key in seen)
    assert any(
        parameter.grad.abs().sum() > 0 for parameter in trainer.network.parameters() if parameter.grad is not None
    )


def test_probabilities_are_those_that_nnunet_predicts_with(run, tmp_path):
    """One sigmoid per region where labels are regions that overlap."""
    labels = {"labels": {"background": 0, "whole": [1, 2, 3, 4], "part": [2, 3]}, "regions_class_order": [1, 2]}
    trainer = teacher_of(run, tmp_path / "model", labels=labels)
    trainer.on_train_start()
    assert trainer.label_manager.has_regions
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(1.1)
    logits = []
    for network in (trainer.teacher, trainer.network):
        network.register_forward_hook(lambda m, args, output: logits.append(output[0].detach()))
    loss = trainer.consistency_loss(next(trainer.dataloader_train)["unlabelled"])
    teacher, student = (1 / (1 + torch.exp(-side.double())) for side in logits)
    assert teacher.shape[1] == 2
    assert loss.item() == pytest.approx(((student - teacher) ** 2).mean().item(), rel=1e-4)


def test_loss_is_that_of_fine_tuning_and_the_weighted_consistency(run, tmp_path):
    trainer = teacher_of(run, tmp_path / "model")
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    trainer.steps_done = 1
    supervised, consistency = FinetuneTrainer.batch_loss(trainer, batch), trainer.consistency_loss(batch["unlabelled"])
    weight = 0.1 * math.exp(-5 * (1 - 1 / (0.4 * 4)) ** 2)
    assert weight * consistency.item() > 1e-8
    terms = [term.item() for term in trainer.batch_losses(batch)]
    assert terms == pytest.approx([supervised.item(), weight * consistency.item()], rel=1e-4)
    assert trainer.train_step(batch)["loss"] == pytest.approx(sum(terms), rel=1e-4)


def test_one_loss_gives_up_its_graph_before_the_next_is_made(run, tmp_path):
    """Else a batch that fits fine-tuning would not fit the mean teacher. The gradient is that of the sum."""
    trainer = teacher_of(run, tmp_path / "model")
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    trainer.optimizer.zero_grad()
    sum(trainer.batch_losses(batch)).backward()
    expected = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
    graphs = []
    consistency = trainer.consistency_loss

    def watched(volumes):
        graphs.append([p.grad is not None for p in trainer.network.parameters()])
        return consistency(volumes)

    trainer.consistency_loss = watched
    trainer.optimizer.step = lambda: None
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected]))
    trainer.train_step(batch)
    assert any(graphs[0])  # the first backward pass is done when the second loss is made
    found = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other * min(1.0, 12 / float(norm)), rtol=1e-3, atol=1e-6)


def test_teacher_is_the_average_of_the_students(run, tmp_path):
    trainer = teacher_of(run, tmp_path / "model")
    students = []
    original = trainer.train_step

    def watched(batch):
        result = original(batch)
        students.append(copy.deepcopy(trainer.network.state_dict()))
        return result

    trainer.train_step = watched
    trainer.run_training()
    assert len(students) == 4
    saved = torch.load(tmp_path / "model" / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert STUDENT_KEY not in saved
    for key, found in saved["network_weights"].items():
        expected = torch.zeros_like(found)
        for step, student in enumerate(students):
            momentum = min(1 - 1 / (step + 1), 0.99)
            expected = momentum * expected + (1 - momentum) * student[key]
        torch.testing.assert_close(found, expected)
        assert torch.equal(trainer.network.state_dict()[key], found)
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.allclose(saved["network_weights"][key], students[-1][key], atol=1e-6)


def test_the_curve_is_that_of_the_teacher(run, tmp_path):
    trainer = teacher_of(run, tmp_path / "model")
    trainer.on_train_start()
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(1.5)
    batch = next(trainer.dataloader_val)
    student = trainer.network
    with torch.no_grad():
        found = trainer.validation_step(copy.deepcopy(batch))["loss"]
        assert trainer.network is student
        expected = trainer.loss(trainer.teacher(batch["data"]), batch["target"]).item()
        other = trainer.loss(student(batch["data"]), batch["target"]).item()
    assert found == pytest.approx(expected)
    assert found != pytest.approx(other)


def test_without_weight_the_student_is_fine_tuned_as_ever(run, tmp_path):
    plain = trainer_of(run, tmp_path / "plain", **{**UNLABELLED, "unlabelled_cases": ()})
    plain.run_training()
    trainer = teacher_of(run, tmp_path / "model")
    trainer.consistency = Consistency(weight=0.0)
    students = {}
    original = trainer.on_train_end
    trainer.on_train_end = lambda: (students.update(copy.deepcopy(trainer.network.state_dict())), original())
    trainer.run_training()
    for key, value in plain.network.state_dict().items():
        assert torch.equal(students[key], value), key


def test_labels_of_unlabelled_cases_do_not_matter(run, tmp_path, monkeypatch):
    """With their segmentations replaced by others and their class locations gone, the weights are the same to the bit."""
    first = teacher_of(run, tmp_path / "first")
    first.run_training()
    second = teacher_of(run, tmp_path / "second")
    second.initialize()
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


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(run, tmp_path):
    def make(folder, **options):
        return teacher_of(run, folder, epochs=3, **options)

    make(tmp_path / "whole").run_training()
    latest, found, resumed = killed_and_resumed(make, tmp_path / "killed")
    assert set(latest[STUDENT_KEY]) == set(latest["network_weights"])
    assert any(not torch.equal(value, latest[STUDENT_KEY][key]) for key, value in latest["network_weights"].items())
    assert resumed.steps_done == 6
    for key, value in final_weights(tmp_path / "whole").items():
        assert torch.equal(found[key], value), key


# cases and results


def test_unlabelled_cases_are_those_that_are_left(tmp_path):
    split = Split(CASES[:2], CASES[4:], "2cases")
    assert choose_unlabelled(CASES, split) == CASES[2:4]
    listed = tmp_path / "unlabelled.txt"
    listed.write_text(f"{CASES[3]}\n{CASES[0]}")  # training cases are used in any case
    assert choose_unlabelled(CASES, split, listed) == (CASES[3],)
    listed.write_text(f"{CASES[3]}\n{CASES[5]}")
    with pytest.raises(UserError, match=f"{CASES[5]} also held out; remove such cases"):
        choose_unlabelled(CASES, split, listed)
    with pytest.raises(
        UserError, match="needs images of other cases, but all 6 labelled ones are trained on, held out or of held-out"
    ):
        choose_unlabelled(CASES, Split(CASES[:2], CASES[2:], "2cases"))


def test_other_scans_of_held_out_patients_are_not_used(tmp_path):
    cases = ("anna_frame01", "anna_frame12", "ben_frame01", "carl_frame01", "carl_frame09")
    split = Split(("ben_frame01",), ("anna_frame12",), "1cases")
    said = []
    with lines_to(said.append):
        assert choose_unlabelled(cases, split) == ("carl_frame01", "carl_frame09")
        table = {**{case: case for case in cases}, "carl_frame01": "anna", "anna_frame12": "anna"}
        assert choose_unlabelled(cases, split, patients=table) == ("anna_frame01", "carl_frame09")
    assert said == [
        "1 cases are of held-out patients and are not used without labels (anna_frame01)",
        "1 cases are of held-out patients and are not used without labels (carl_frame01)",
    ]
    (tmp_path / "list.txt").write_text("anna_frame01")
    with pytest.raises(UserError, match="needs images of other cases"):
        choose_unlabelled(cases, split, tmp_path / "list.txt")


def raw_dataset(name: str, images: dict[str, Path]) -> RawDataset:
    cases = tuple(RawCase(case, (image,)) for case, image in sorted(images.items()))
    return RawDataset(name, Path(), ".nii.gz", ("MRI",), cases, "NibabelIO", {}, ())


def write_image(path: Path, seed: int, shape=(6, 7, 8)) -> Path:
    path.parent.mkdir(exist_ok=True)
    voxels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    return path


def test_held_out_images_of_another_data_set_are_not_used(tmp_path):
    """By file, also through a link, by voxels under another name and in another format, and by patient."""
    tests = {"t1": 1, "t2_frame01": 2}
    mine = {name: write_image(tmp_path / "a" / f"{name}_0000.nii.gz", seed) for name, seed in tests.items()}
    mine["train"] = write_image(tmp_path / "a" / "train_0000.nii.gz", 3)
    (tmp_path / "b").mkdir()
    link = tmp_path / "b" / "linked_0000.nii.gz"
    link.symlink_to(mine["t1"])
    others = {
        "linked": link,
        "copied": write_image(tmp_path / "b" / "copied_0000.nii", 1),
        "t2_frame09": write_image(tmp_path / "b" / "t2_frame09_0000.nii.gz", 9),
        "shape": write_image(tmp_path / "b" / "shape_0000.nii.gz", 5, (5, 7, 8)),
        "other": write_image(tmp_path / "b" / "other_0000.nii.gz", 6),
        "trained": write_image(tmp_path / "b" / "trained_0000.nii.gz", 3),
    }
    source, labelled = raw_dataset("Dataset501_B", others), raw_dataset("Dataset004_A", mine)
    said = []
    with lines_to(said.append):
        left = without_held_out(source, labelled, tuple(tests))
    assert [case.name for case in left.cases] == ["other", "shape", "trained"]
    assert said == [
        "Dataset501_B: 1 of 6 images are files of held-out cases and are not used (linked)",
        "Dataset501_B: 1 of 6 images have the name of a held-out patient and are not used (t2_frame09)",
        "Dataset501_B: 1 of 6 images have the voxels of held-out cases and are not used (copied)",
    ]
    with pytest.raises(ArgumentError, match=r"^unlabelled must be a data set with images .* all of whose 2 images"):
        without_held_out(raw_dataset("Dataset501_B", {n: others[n] for n in ("linked", "copied")}), labelled, ("t1",))


def test_unlabelled_batches_hold_labelled_and_unlabelled_images(run, tmp_path):
    """All cases alike, also where both folders have a case of the same name, and never a held-out one."""
    own = run.folder / "preprocessed" / DATASET / "nnsslPlans_3d_fullres"
    other = tmp_path / "others"
    other.mkdir()
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copyfile(own / f"{CASES[3]}{ending}", other / f"{CASES[0]}{ending}")
    first = teacher_of(run, tmp_path / "first", epochs=10)
    second = teacher_of(run, tmp_path / "second", epochs=10, unlabelled_folder=other, unlabelled_cases=(CASES[0],))
    expected = ({*CASES[:4]}, {CASES[0], CASES[1]})
    for trainer, names in zip((first, second), expected, strict=True):
        trainer.initialize()
        joined = {}

        def watched(*args, joined=joined, original=trainer.iterate):
            joined.setdefault(args[1], args[0]._data)
            return original(*args)

        trainer.iterate = watched
        trainer.get_dataloaders()
        data = joined["finetune/unlabelled"]
        assert {identifier.split("/")[1] for identifier in data.identifiers} == names
    data = joined["finetune/unlabelled"]
    assert len(data.identifiers) == 3
    volumes = {identifier: data.load_case(identifier)[0][:] for identifier in data.identifiers}
    kind = infer_dataset_class(str(own))
    for identifier, name in ((f"0/{CASES[0]}", CASES[0]), (f"0/{CASES[1]}", CASES[1]), (f"1/{CASES[0]}", CASES[3])):
        assert np.array_equal(volumes[identifier], kind(str(own), [name]).load_case(name)[0][:])


def test_from_the_command_to_what_stock_nnunet_predicts(run, tmp_path, monkeypatch):
    options = {**run.arguments, "labels": 2, "mode": "mean_teacher", "epochs": 1, "warmup": None}
    options = {**options, "scratch": False, "learning_rate": None}
    (result,), (trainer,) = finetune_and_catch_trainers(monkeypatch, 4, run.weights, **options)
    assert "nnssl_rep-rec-mean-teacher_2cases_seed3_" in result.model_folder
    assert read_result(trainer.settings.model_folder / "finetune.json") == result
    assert (result.mode, result.schedule.learning_rate, result.schedule.optimizer) == ("mean_teacher", 0.001, "sgd")
    assert result.unlabelled_cases == tuple(sorted(set(CASES) - set(result.train_cases) - set(TEST_CASES)))
    assert_stock_nnunet_predicts_the_same(run, result, trainer, tmp_path)


@pytest.mark.nightly
def test_images_of_a_data_set_without_labels(run, tmp_path, monkeypatch):
    """Preprocessed as the labelled ones: a copy of a labelled image gives the same voxels; that of a held-out one is not used."""
    raw = run.folder / "raw"
    source = raw / "Dataset777_Images"
    write_phantom_dataset(raw, source.name, 2, 0, (24, 32, 28), labelled=False, first_case=50)
    for case, name in ((CASES[3], "copy"), (TEST_CASES[0], "held_out")):
        shutil.copyfile(raw / DATASET / "imagesTr" / f"{case}_0000.nii.gz", source / "imagesTr" / f"{name}_0000.nii.gz")
    options = {**run.arguments, "labels": 2, "mode": "mean_teacher", "epochs": 1, "warmup": None, "scratch": False}
    options = {**options, "learning_rate": None, "unlabelled": "777"}
    (result,), (trainer,) = finetune_and_catch_trainers(monkeypatch, 4, run.weights, **options)
    assert result.unlabelled_cases == ("copy", "phantom_0050", "phantom_0051")
    folder = trainer.settings.unlabelled_folder
    assert folder is not None
    assert folder.parent.name.endswith("_unlabelled")
    assert not list(folder.glob("held_out*"))
    dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    labelled = dataset_class(trainer.preprocessed_dataset_folder, [CASES[3]]).load_case(CASES[3])[0]
    copied = dataset_class(str(folder), ["copy"]).load_case("copy")[0]
    assert np.array_equal(copied[:], labelled[:])
    with pytest.raises(UserError, match="not found"):
        finetune(4, run.weights, FinetuneSettings(**{**options, "unlabelled": 888}))
    content = json.loads((source / "dataset.json").read_text())
    content["channel_names"] = {"0": "T1", "1": "T2"}
    (source / "dataset.json").write_text(json.dumps(content))
    for image in list((source / "imagesTr").iterdir()):
        shutil.copyfile(image, str(image).replace("_0000.", "_0001."))
    with pytest.raises(UserError, match=r"with 1 channel\(s\), as Dataset004_Phantoms has, got .* with 2"):
        finetune(4, run.weights, FinetuneSettings(**{**options, "unlabelled": 777}))
    shutil.rmtree(source)


def test_nothing_is_prepared_when_no_case_is_left(run, monkeypatch):
    monkeypatch.setattr("trainers.finetuning.finetune.prepare_data", lambda *args: pytest.fail("prepared"))
    with pytest.raises(UserError, match="mode mean_teacher needs images of other cases, but all 6"):
        finetune(4, run.weights, FinetuneSettings(**{**run.arguments, "labels": 4, "mode": "mean_teacher"}))
