# ruff: noqa: NPY002 (the global random state is what is tested)
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnssl.cli.finetune import main
from nnssl.data.phantoms import LABELS, write_phantom_dataset
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json, write_json
from nnssl.log import lines_to
from nnssl.networks.backbone import planned_configuration
from nnssl.paths import resolve_folders
from planners.finetune_planner import AdoptedPlan
from tests.trainers.finetuning.runs import (
    CASES,
    CPU,
    DATASET,
    TEST_CASES,
    assert_stock_nnunet_predicts_the_same,
    is_segmentation_layer,
    trainer_of,
)
from tests.trainers.tiny_plan import PATCH_SIZE, tiny_plan, write_weights
from trainers.finetuning import arm as finetune_arm
from trainers.finetuning import finetune as finetune_run
from trainers.finetuning.finetune import finetune
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.keyed_batches import KeyedBatches, fix_transforms
from trainers.finetuning.labelled_cases import Split, find_labelled_cases, fold_split, label_order, split_cases
from trainers.finetuning.labelled_data import missing_cases
from trainers.finetuning.pretrained_weights import load_weights, open_weights
from trainers.finetuning.recipes import Choices, make_schedule
from trainers.finetuning.result import comparison, read_dice, read_result
from trainers.finetuning.settings import FinetuneSettings

# which cases


def test_smaller_label_subsets_lie_in_larger_ones_and_depend_on_the_seed():
    cases = [f"case{number}" for number in range(20)]
    subsets = [set(split_cases(cases, 5, labels=count).train) for count in range(1, 20)]
    assert [len(subset) for subset in subsets] == list(range(1, 20))
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))
    assert label_order(cases, 5) == label_order(cases[::-1], 5)
    assert label_order(cases, 5) != label_order(cases, 6)


def test_cases_that_are_not_trained_on_are_held_out(tmp_path):
    (tmp_path / "train.txt").write_text("b\n  a \n")
    (tmp_path / "test.txt").write_text("c\n")
    cases = ("a", "b", "c", "d", "e")
    assert split_cases(cases, 0) is None
    assert split_cases(cases, 0, cases=tmp_path / "train.txt").train == ("a", "b")
    assert split_cases(cases, 0, cases=tmp_path / "train.txt").test == ("c", "d", "e")
    assert split_cases(cases, 0, cases=tmp_path / "train.txt", test_cases=tmp_path / "test.txt").test == ("c",)
    assert split_cases(cases, 0, test_cases=tmp_path / "test.txt").train == ("a", "b", "d", "e")
    chosen = [split_cases(cases, seed, labels=4, test_cases=tmp_path / "test.txt") for seed in range(5)]
    assert all(split.train == ("a", "b", "d", "e") and split.test == ("c",) for split in chosen)


@pytest.mark.parametrize(
    ("lists", "labels", "message"),
    [
        ({"cases": "a\nb\n", "test_cases": "c\nb\n"}, None, "b in both"),
        ({"cases": "a\nx1\n"}, None, "x1 not among the 4 labelled cases"),
        ({"test_cases": "a_0000\n"}, None, "a_0000 not among"),
        ({"cases": "a\na\n"}, None, "a more than once"),
        ({"cases": "# nothing\n"}, None, "holds no case name"),
        ({"cases": "a\nb\nc\nd\n"}, None, "labelled cases is left to be held out"),
        ({"test_cases": "a\nb\nc\nd\n"}, None, "labelled cases is left to be trained on"),
        ({"test_cases": "a\nb\n"}, 3, "labels must be between 1 and 2"),
        ({}, 0, "labels must be between 1 and 4"),
        ({}, 4, "labelled cases is left to be held out"),
        ({"cases": "a\n"}, 2, "labels and cases cannot be combined"),
    ],
)
def test_case_choices_that_cannot_be_are_refused(tmp_path, lists, labels, message):
    paths = {}
    for name, text in lists.items():
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(text)
    with pytest.raises(UserError, match=message):
        split_cases(("a", "b", "c", "d"), 0, labels=labels, **paths)


def test_without_a_choice_it_is_nnunets_fold_0(nnunet_folders):
    folders = resolve_folders()
    (folders.preprocessed / DATASET).mkdir()
    cases = tuple(f"case{number}" for number in range(11))
    split = fold_split(cases, DATASET, folders)
    # scikit-learn's shuffled 5-fold split with nnU-Net's seed, spelled out
    order = np.random.RandomState(12345).permutation(11)
    assert sorted(split.test) == sorted(sorted(cases)[place] for place in order[:3])
    assert set(split.train) == set(cases) - set(split.test)
    splits_file = folders.preprocessed / DATASET / "splits_final.json"
    splits = read_json(splits_file, "folds")
    assert len(splits) == 5
    splits_file.write_text('[{"train": ["case1"], "val": ["case2"]}]')
    assert fold_split(cases, DATASET, folders).train == ("case1",)
    with pytest.raises(UserError, match="case1, case2 not among"):
        fold_split(cases[3:], DATASET, folders)
    splits_file.unlink()
    with pytest.raises(UserError, match="too few"):
        fold_split(cases[:4], DATASET, folders)


def test_images_without_labels_are_named(nnunet_folders):
    folder = write_phantom_dataset(nnunet_folders / "raw", DATASET, 3, seed=0, shape=(8, 10, 9))
    assert find_labelled_cases(DATASET, resolve_folders()) == CASES[:3]
    (folder / "labelsTr" / "phantom_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images have no label \(phantom_0001\)"):
        find_labelled_cases(DATASET, resolve_folders())


# schedule


def test_both_arms_followed_the_schedule(run):
    for arm in (0, 1):
        logged = torch.load(run.fold(arm) / "checkpoint_final.pth", weights_only=True)["logging"]
        # nnU-Net logs the rate of an epoch's first step: half of a warm-up of two steps, then its end; scratch decays at once
        assert logged["lrs"] == pytest.approx([[0.005, 0.01], [0.01, 0.01 * 0.5**0.9]][arm])
        assert len(logged["train_losses"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 3, "warmup": 6},
        {"warmup": 2.5},
        {"recipe": "nnunet", "warmup": 2},
        {"iterations_per_epoch": 0},
        {"learning_rate": 0.0},
    ],
)
def test_schedules_that_cannot_be_are_refused(run, wrong):
    with pytest.raises(UserError):
        finetune(4, run.weights, FinetuneSettings(**{**run.arguments, **wrong}))


# weights


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_with_code_is_refused_and_does_not_run(run, tmp_path):
    content = torch.load(run.weights, weights_only=True)
    torch.save({**content, "surprise": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could run code"):
        finetune(4, tmp_path / "bad.pth", FinetuneSettings(**run.arguments))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload would have run"


def test_every_weight_but_the_segmentation_layers_arrives(run, tmp_path):
    trainer = trainer_of(run, tmp_path / "model")
    with lines_to(run.said.append):
        load_weights(trainer, open_weights(run.weights, resolve_folders()))
    state = trainer.network.state_dict()
    arrived = [key for key in state if not is_segmentation_layer(key)]
    assert len(arrived) > 20
    for key in arrived:
        assert torch.equal(state[key], run.tensors[key]), key
    scratch = trainer_of(run, tmp_path / "scratch")
    scratch.initialize()
    initial = scratch.network.state_dict()
    assert not any(torch.equal(initial[key], run.tensors[key]) for key in arrived)
    for key in filter(is_segmentation_layer, state):  # what is not loaded is the seed's, in both arms
        assert torch.equal(state[key], initial[key])


def test_random_weights_depend_on_the_seed_alone(run, tmp_path):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed + len(states))
        trainer = trainer_of(run, tmp_path / str(len(states)), seed=seed)
        trainer.initialize()
        states.append(trainer.network.state_dict()["encoder.stages.1.0.convs.0.conv.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_weights_of_another_network_end_in_one_line(run):
    with pytest.raises(UserError, match="use 3d_fullres, which the weights were pretrained with") as caught:
        finetune(4, run.weights, FinetuneSettings(configuration="3d_fullres_wide", **run.arguments))
    assert "\n" not in str(caught.value)
    assert "features" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_unknown_configuration_lists_the_known_ones(run):
    with pytest.raises(UserError, match="3d_fullres, 3d_fullres_wide"):
        finetune(4, run.weights, FinetuneSettings(configuration="2d", **run.arguments))


def test_latest_is_the_newest_pretraining_and_no_finetuned_model(run, tmp_path):
    assert any(str(run.weights) in line for line in run.said)
    folders = resolve_folders()
    assert run.fold(0).is_relative_to(folders.results)
    newer = folders.results / "Dataset502_Other" / "fold_all" / "checkpoint_final.pth"
    write_weights(newer, tiny_plan())
    os.utime(newer, (0, 0))
    assert open_weights("latest", folders).path == run.weights
    os.utime(newer)
    assert open_weights("latest", folders).path == newer
    newer.unlink()


# batches and restarts


def test_batches_depend_on_seed_and_step_and_on_nothing_else(run, tmp_path):
    trainer = trainer_of(run, tmp_path / "model", epochs=3)
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    in_order = [next(train) for _ in range(6)]
    assert next(train, None) is None
    again = trainer_of(run, tmp_path / "again", epochs=3, augmentation_processes=2)
    again.initialize()
    again.current_epoch = 1
    np.random.seed(99)
    resumed = list(again.get_dataloaders()[0])
    assert len(resumed) == 4
    for expected, found in zip(in_order[2:], resumed, strict=True):
        assert list(expected["keys"]) == list(found["keys"])
        assert torch.equal(expected["data"], found["data"])
        assert all(torch.equal(*pair) for pair in zip(expected["target"], found["target"], strict=True))
    assert not torch.equal(in_order[0]["data"], in_order[1]["data"])
    other = trainer_of(run, tmp_path / "other", epochs=3, seed=4)
    other.initialize()
    assert not torch.equal(next(other.get_dataloaders()[0])["data"], in_order[0]["data"])
    larger = trainer_of(run, tmp_path / "larger", batch_size=3)
    larger.initialize()
    assert len(next(larger.get_dataloaders()[0])["data"]) == 3 != len(in_order[0]["data"])


def test_drawing_a_batch_leaves_the_global_random_states_alone():
    class Draws:
        get_do_oversample = staticmethod(lambda row: False)

        def generate_train_batch(self):
            drawn = torch.rand(1, 2)
            return {"data": drawn, "target": torch.from_numpy(np.random.rand(1, 2)), "keys": ["case"]}

    batches = KeyedBatches(Draws(), 0, "test", range(2))
    torch.manual_seed(1)
    np.random.seed(1)
    first = batches[0]
    after = torch.rand(1), np.random.rand(1)
    torch.manual_seed(1)
    np.random.seed(1)
    assert (torch.rand(1), np.random.rand(1)) == after
    assert torch.equal(batches[0]["data"], first["data"])
    assert not torch.equal(batches[1]["target"], first["target"])
    assert not torch.equal(first["data"][0], first["data"][1])


def test_blur_does_not_choose_its_algorithm_by_the_clock(run, tmp_path):
    trainer = trainer_of(run, tmp_path / "model")
    transforms = trainer.get_training_transforms((8, 16, 12), (-0.5, 0.5), None, (0, 1, 2), False)
    blurs = [
        inner
        for transform in transforms.transforms
        if type(inner := getattr(transform, "transform", transform)).__name__ == "GaussianBlurTransform"
    ]
    assert [blur.benchmark for blur in blurs] == [True]
    fix_transforms(transforms)
    assert [blur.benchmark for blur in blurs] == [False]


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(run, tmp_path):
    whole = trainer_of(run, tmp_path / "whole", epochs=3)
    whole.run_training()

    def die(line):
        raise KeyboardInterrupt

    killed = trainer_of(run, tmp_path / "killed", epochs=3)
    with pytest.raises(KeyboardInterrupt), lines_to(die):
        killed.run_training()
    latest = tmp_path / "killed" / "fold_0" / "checkpoint_latest.pth"
    assert torch.load(latest, weights_only=True)["current_epoch"] == 1
    resumed = trainer_of(run, tmp_path / "killed", epochs=3, resume=True)
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 1
    resumed.run_training()
    assert not latest.exists()
    expected = whole.network.state_dict()
    for key, tensor in resumed.network.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_finished_arms_are_recognised(run):
    files = [run.fold(arm) / "checkpoint_final.pth" for arm in (0, 1)]
    before = [path.stat().st_mtime_ns for path in files]
    said: list[str] = []
    with lines_to(said.append):
        assert finetune(4, run.weights, FinetuneSettings(**run.arguments)) == run.results
    assert [path.stat().st_mtime_ns for path in files] == before
    assert sum("finished already" in line for line in said) == 2
    assert any("all 5 exist already" in line for line in said)
    assert sum("exists and fits the weights" in line for line in said) == 1


def test_an_arm_that_was_trained_but_not_evaluated_is_evaluated_only(run, monkeypatch):
    Path(run.results[1].model_folder, "finetune.json").unlink()
    monkeypatch.setattr(FinetuneTrainer, "run_training", lambda trainer: pytest.fail("trained again"))
    said: list[str] = []
    with lines_to(said.append):
        assert finetune(4, run.weights, FinetuneSettings(**run.arguments)) == run.results
    assert any("Arm scratch: trained, but not evaluated yet" in line for line in said)


@pytest.mark.nightly
def test_restart_deletes_what_there_is(run, monkeypatch):
    seen = []

    def note(trainer, job):
        seen.append((job.folder, sorted(path.name for path in job.folder.glob("*.pth"))))
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_arm, "train", note)
    for restart in (False, False, True):
        with pytest.raises(KeyboardInterrupt):
            finetune(4, run.weights, FinetuneSettings(**{**run.arguments, "seed": 8, "restart": restart}))
        (seen[0][0] / "checkpoint_latest.pth").touch()
    assert [names for _, names in seen] == [[], ["checkpoint_latest.pth"], []]


@pytest.mark.nightly
def test_another_seed_schedule_or_case_list_gets_a_folder_of_its_own(run, monkeypatch):
    folders = []

    def note(task, weights, nnunet_folders, restart):
        folders.append(finetune_arm.arm_folder(task, weights, nnunet_folders).name)
        return run.results[0]

    monkeypatch.setattr(finetune_run, "run_arm", note)
    changes = [
        {},
        {"seed": 4},
        {"labels": 2},
        {"epochs": 3},
        {"learning_rate": 0.02},
        {"batch_size": 3},
        {"configuration": "3d_fullres_wide"},
    ]
    changes.append({"test_cases": None})
    for change in changes:
        finetune(4, run.weights, FinetuneSettings(**{**run.arguments, **change}))
    assert len(set(folders)) == 2 * len(changes)
    assert folders[:2] == [Path(result.model_folder).name for result in run.results]
    for name in folders:
        assert len(name.split("__")) == 3  # nnU-Net's trainer__plans__configuration
    assert folders[0].startswith("nnssl_rep-rec_3cases_seed3_")
    assert folders[1].startswith("nnssl_scratch_3cases_seed3_")


# results


def test_the_arms_share_everything_but_the_weights(run):
    pretrained, scratch = run.results
    assert (pretrained.arm, scratch.arm) == ("rep-rec", "scratch")
    for field in ("train_cases", "test_cases", "seed", "num_parameters", "plans_name", "configuration"):
        assert getattr(pretrained, field) == getattr(scratch, field)
    recipe = {"recipe": "nnunet", "warmup_steps": 0}  # the only parts of the schedule that an arm has of its own here
    assert dataclasses.replace(pretrained.schedule, **recipe) == scratch.schedule
    assert pretrained.train_cases == tuple(sorted(label_order(sorted(set(CASES) - set(TEST_CASES)), 3)[:3]))
    assert pretrained.test_cases == tuple(sorted(TEST_CASES))
    assert pretrained.weights == str(run.weights)
    assert scratch.weights is None
    states = [
        torch.load(run.fold(arm) / "checkpoint_final.pth", weights_only=True)["network_weights"] for arm in (0, 1)
    ]
    # a segmentation layer without weight in the loss is the seed's in both
    assert not any(torch.equal(states[0][key], states[1][key]) for key in states[0] if not is_segmentation_layer(key))
    assert pretrained.num_parameters == sum({t.data_ptr(): t.numel() for t in states[0].values()}.values())


def test_reported_dice_is_that_of_the_predicted_files(run):
    for arm, result in enumerate(run.results):
        assert read_result(Path(result.model_folder, "finetune.json")) == result
        summary = read_json(run.fold(arm) / "validation" / "summary.json", "summary")
        assert result.mean_dice == summary["foreground_mean"]["Dice"]
        assert {Path(case["prediction_file"]).name for case in summary["metric_per_case"]} == {
            f"{name}.nii.gz" for name in TEST_CASES
        }
        assert list(result.dice) == [name for name in LABELS if name != "background"]
        per_class = []
        for name, dice in result.dice.items():
            values = []
            for case in TEST_CASES:
                truth, predicted = (
                    sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz"))) == LABELS[name]
                    for folder in (run.folder / "raw" / DATASET / "labelsTr", run.fold(arm) / "validation")
                )
                assert truth.any()
                values.append(2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()))
            assert dice == pytest.approx(np.mean(values))
            per_class.append(np.mean(values))
        assert result.mean_dice == pytest.approx(np.mean(per_class))
    assert any(
        line.startswith("Dice (points) on 2 held-out cases") and "rep-rec" in line and "gain" in line
        for line in run.said
    )
    assert any(line.split()[:2] == ["mean", f"{100 * run.results[0].mean_dice:.1f}"] for line in run.said)


def test_stock_nnunet_predicts_the_same_from_the_model_folder(run, tmp_path):
    assert_stock_nnunet_predicts_the_same(run, run.results[0], None, tmp_path)
    assert f"-m {run.results[0].model_folder} -f 0 -device cpu" in run.results[0].predict_command


def test_arms_keep_the_names_of_their_folders(tmp_path):
    task = finetune_arm.Task(
        dataset_name=DATASET,
        dataset_json={},
        plan=AdoptedPlan("nnsslPlans", tmp_path, {"plans_name": "nnsslPlans"}),
        configuration="2d",
        split=Split(("b", "a"), ("c",), "2cases"),
        schedule=make_schedule("finetune", Choices(10, 5, recipe="warmup")),
        seed=3,
        device=CPU,
        processes=1,
        mode="finetune",
        unlabelled=(),
    )
    folder = finetune_arm.arm_folder(task, None, resolve_folders())
    assert folder.name == "nnssl_scratch_2cases_seed3_7db7b81b__nnsslPlans__2d"


def test_a_damaged_result_is_rejected(run, tmp_path):
    content = read_json(Path(run.results[0].model_folder, "finetune.json"), "result")
    for wrong in ({**content, "schema_version": 1}, {**content, "schema_version": 4}, {**content, "schedule": 1}):
        write_json(tmp_path / "finetune.json", wrong)
        with pytest.raises(
            ArgumentError, match="finetune.json: schedule|finetune.json: schema_version must be 3, got [14]"
        ) as raised:
            read_result(tmp_path / "finetune.json")
        assert raised.value.with_flags({"restart": "--restart"}).endswith("; fine-tune again with --restart")


def test_nothing_else_is_left_in_the_results_folder(run):
    folder = run.folder / "results" / DATASET
    finished = {path.parents[1].name for path in folder.glob("*/fold_0/checkpoint_final.pth")}
    assert {Path(result.model_folder).name for result in run.results} <= finished
    assert not list(folder.glob("FinetuneTrainer*"))
    assert not list(folder.rglob("checkpoint_best.pth"))
    assert (run.fold(0) / "nnunet_output.txt").stat().st_size > 0


def test_regions_and_absent_classes_are_read_by_name(tmp_path):
    cases = [
        {"reference_file": f"/gt/{name}.nii.gz", "metrics": {"(1, 2)": {"Dice": whole}, "3": {"Dice": core}}}
        for name, whole, core in (("a", 0.25, math.nan), ("b", 0.75, math.nan), ("c", 0.5, 0.5))
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    labels = {"background": 0, "whole": [1, 2], "core": 3, "ignore": 4}
    assert read_dice(tmp_path / "summary.json", labels, ["a", "b"]) == ({"whole": 0.5, "core": None}, None)
    assert read_dice(tmp_path / "summary.json", labels, ["c", "a"]) == ({"whole": 0.375, "core": 0.5}, 0.4375)


def test_dots_in_the_name_of_a_case_belong_to_it(tmp_path):
    cases = [{"reference_file": f"/gt/1.3.6.{n}.nii.gz", "metrics": {"1": {"Dice": n / 4}}} for n in (1, 2)]
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    assert read_dice(tmp_path / "summary.json", {"organ": 1}, ["1.3.6.2"]) == ({"organ": 0.5}, 0.5)


def test_dice_is_that_of_nnunets_summary(run):
    """Over all held-out cases, the numbers are those that nnU-Net wrote."""
    summary = run.fold(0) / "validation" / "summary.json"
    written, labels = (
        read_json(summary, "summary"),
        read_json(run.fold(0).parent / "dataset.json", "dataset.json")["labels"],
    )
    dice, mean = read_dice(summary, labels, TEST_CASES)
    for name, value in dice.items():
        expected = written["mean"][str(labels[name])]["Dice"]
        assert value == pytest.approx(expected) if value is not None else math.isnan(expected)
    assert mean == pytest.approx(written["foreground_mean"]["Dice"]) if mean is not None else True


def test_gain_is_against_scratch_and_absent_values_stay_open(run):
    from dataclasses import replace

    first = replace(run.results[0], dice={"a": 0.75, "b": None}, mean_dice=0.75)
    second = replace(run.results[1], dice={"a": 0.5, "b": 0.25}, mean_dice=0.375)
    rows = [line.split() for line in comparison([first, second])][1:]
    assert rows[:3] == [
        ["a", "75.0", "50.0", "+25.0"],
        ["b", "-", "25.0", "-"],
        ["mean", "75.0", "37.5", "+37.5"],
    ]
    assert [line.split() for line in comparison([first])][1] == ["a", "75.0"]
    assert [" ".join(row) for row in rows[3:]] == [
        "rep-rec: 4 steps, recipe sawtooth (0 steps of new layers alone, 2 of warm-up), sgd at 0.01",
        "scratch: 4 steps, recipe nnunet, sgd at 0.01",
    ]


def test_a_preprocessed_case_that_is_not_complete_is_seen(run, tmp_path):
    data, references = tmp_path / "data", tmp_path / "gt"
    data.mkdir()
    references.mkdir()
    for case in CASES[:2]:
        (references / f"{case}.nii.gz").touch()
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (data / f"{case}{ending}").touch()
    assert missing_cases(data, references, CASES[:2]) == []
    assert missing_cases(data, references, CASES[:3]) == [CASES[2]]
    (data / f"{CASES[0]}.pkl").unlink()
    assert missing_cases(data, references, CASES[:2]) == [CASES[0]]
    assert missing_cases(data, tmp_path / "nowhere", CASES[1:2]) == [CASES[1]]


# command


def test_the_command_ends_in_one_line_for_the_user(run, capsys):
    assert main(["-d", "77", "-w", str(run.weights), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnssl_finetune: error: data set 77 was not found")
    assert error.count("\n") == 1
    assert main(["-d", "77", "--verbose", "--device", "cpu"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_command_shows_a_finished_run(run, capsys):
    options = ["--labels", "3", "--test-cases", str(run.folder / "test.txt"), "--seed", "3", "--epochs", "2"]
    options += [
        "--iterations-per-epoch",
        "2",
        "--warmup",
        "2",
        "--learning-rate",
        "0.01",
        "--scratch",
        "--device",
        "cpu",
        "--processes",
        "1",
    ]
    assert main(["-d", "4", "-w", str(run.weights), *options]) == 0
    out = capsys.readouterr().out
    assert out.count("finished already") == 2
    assert "nnUNetv2_predict_from_modelfolder" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom nnssl.cli.finetune import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'nnunetv2', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--test-cases" in result.stdout
    assert result.stderr.strip() == "[]"


def test_the_network_is_found_where_a_configuration_inherits_it():
    plan = tiny_plan()
    plan["configurations"]["larger"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    planned = planned_configuration(plan, "larger")
    assert planned["architecture"] == plan["configurations"]["3d_fullres"]["architecture"]
    assert (planned["batch_size"], planned["patch_size"]) == (3, list(PATCH_SIZE))


def test_adamw_by_hand(run, tmp_path, monkeypatch):
    """A whole training with nnU-Net's numbers for Primus: betas, weight decay, and gradients clipped at 1."""
    monkeypatch.setenv("NNSSL_PRECISION", "float32")
    trainer = trainer_of(run, tmp_path / "model", optimizer="adamw", learning_rate=3e-4)
    trainer.initialize()
    network = copy.deepcopy(trainer.network)
    batches = list(copy.copy(trainer).get_dataloaders()[0])
    clip, limits = torch.nn.utils.clip_grad_norm_, []
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: limits.append(limit) or clip(p, limit))
        trainer.run_training()
    assert limits == [1] * len(batches)
    # fused as there: biases before a normalisation have rounding as their gradient, which Adam scales to the learning rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 3e-4 * [0.5, 1, 1, 0.5**0.9][step]
        optimizer.zero_grad()
        trainer.loss(network(batch["data"]), batch["target"]).backward()
        clip(network.parameters(), 1)
        optimizer.step()
    for found, expected in zip(trainer.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
