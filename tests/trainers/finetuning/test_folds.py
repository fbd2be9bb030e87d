"""nnU-Net's folds in one model folder, their cross-validation, and what stock nnU-Net makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from nnssl.errors import ArgumentError
from nnssl.files import read_json
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from tests.trainers.finetuning.runs import CASES, CPU, DATASET, folders_set
from trainers.finetuning.finetune import finetune
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.labelled_cases import fold_split
from trainers.finetuning.settings import FinetuneSettings

SETTINGS = FinetuneSettings(epochs=1, iterations_per_epoch=1, processes=1, device=CPU, seed=5, mirroring=False)


def test_folds_share_a_model_folder_and_hold_out_every_case_once(run):
    """Two folds in one call, the others in another; both arms are evaluated over all cases once the fifth is finished."""
    with folders_set(run.folder):
        first = finetune(4, run.weights, replace(SETTINGS, folds=(0, 1), scratch=True))
        assert [(result.arm, result.fold) for result in first] == [
            (arm, fold) for fold in (0, 1) for arm in ("rep-rec", "scratch")
        ]
        assert len({result.model_folder for result in first}) == 2
        folder = Path(first[0].model_folder)
        assert not (folder / "crossval_results_folds_0_1_2_3_4").exists()
        said: list[str] = []
        with lines_to(said.append):
            rest = finetune(4, run.weights, replace(SETTINGS, folds=(1, 2, 3, 4)))
        splits = [fold_split(CASES, DATASET, resolve_folders(), fold) for fold in range(5)]
    assert sum("finished already" in line for line in said) == 1
    results = {result.fold: result for result in (first[0], *rest)}
    assert [set(results[fold].test_cases) for fold in range(5)] == [set(split.test) for split in splits]
    assert sorted(case for split in splits for case in split.test) == sorted(CASES)
    summary = read_json(folder / "crossval_results_folds_0_1_2_3_4" / "summary.json", "summary")
    assert {Path(case["reference_file"]).name for case in summary["metric_per_case"]} == {
        f"{case}.nii.gz" for case in CASES
    }
    assert any("cross-validation over 5 folds, 6 cases: Dice" in line for line in said)
    name = folder.name.split("__")[0]
    assert any(
        line.endswith(f"nnUNetv2_find_best_configuration {DATASET} -p nnsslPlans -c 3d_fullres -tr {name}")
        for line in said
    )
    assert all(f"-f {fold} -device cpu" in result.predict_command for fold, result in results.items())


def test_all_trains_on_every_case(run):
    with folders_set(run.folder):
        (result,) = finetune(4, run.weights, replace(SETTINGS, folds=("all",)))
    assert set(result.train_cases) == set(result.test_cases) == set(CASES)
    assert (Path(result.model_folder) / "fold_all" / "checkpoint_final.pth").exists()
    assert result.predict_command.endswith("-f all -device cpu")


@pytest.mark.nightly
def test_stock_nnunet_finds_the_best_configuration_and_predicts_with_the_ensemble(run, tmp_path):
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with folders_set(run.folder):
        results = finetune(4, run.weights, replace(SETTINGS, folds=(0, 1, 2, 3, 4), save_probabilities=True, seed=6))
        folder = Path(results[0].model_folder)
        assert len(list(folder.glob("fold_*/validation/*.npz"))) == len(CASES)
        model = {"plans": "nnsslPlans", "configuration": "3d_fullres", "trainer": folder.name.split("__")[0]}
        found = find_best_configuration(4, (model,), num_processes=1, folds=(0, 1, 2, 3, 4))
        assert found["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == model["trainer"]
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0, 1, 2, 3, 4), "checkpoint_final.pth")
    image = run.folder / "raw" / DATASET / "imagesTr" / f"{CASES[0]}_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], [str(tmp_path / "case.nii.gz")], False, True)
    assert (tmp_path / "case.nii.gz").exists()


def test_probabilities_are_added_to_a_finished_fold(run, monkeypatch):
    """Asking for them later predicts again and does not train."""
    settings = replace(SETTINGS, folds=(2,), seed=8)
    with folders_set(run.folder):
        (result,) = finetune(4, run.weights, settings)
        validation = Path(result.model_folder) / "fold_2" / "validation"
        assert not list(validation.glob("*.npz"))
        monkeypatch.setattr(FinetuneTrainer, "run_training", lambda trainer: pytest.fail("trained again"))
        finetune(4, run.weights, replace(settings, save_probabilities=True))
    assert {path.stem for path in validation.glob("*.npz")} == set(result.test_cases)


def test_an_ignore_label_needs_one_process(run, monkeypatch):
    content = read_json(run.folder / "raw" / DATASET / "dataset.json", "dataset.json")
    labels = {**content["labels"], "ignore": 9}
    monkeypatch.setattr("trainers.finetuning.finetune.read_labelled_json", lambda path: {**content, "labels": labels})
    with folders_set(run.folder), pytest.raises(ArgumentError, match="num_gpus must be 1 for Dataset004_Phantoms"):
        finetune(4, run.weights, replace(SETTINGS, folds=(0,), num_gpus=2, batch_size=2))


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_prepared(run, monkeypatch):
    monkeypatch.setattr("trainers.finetuning.finetune.prepare_data", lambda *given: pytest.fail("prepared"))
    with folders_set(run.folder), pytest.raises(ArgumentError, match=r"multiple of num_gpus \(2\), got 3"):
        finetune(4, run.weights, replace(SETTINGS, num_gpus=2, batch_size=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folds": (5,)}, "folds must be different numbers from 0 to 4 or all, got 5"),
        ({"folds": (1, 1)}, "folds must be different numbers"),
        ({"folds": (1,), "labels": 3}, "folds must not be given with labels"),
        ({"num_gpus": 0}, "num_gpus must be at least 1"),
    ],
)
def test_folds_that_cannot_be(run, given, message):
    with pytest.raises(ArgumentError, match=message):
        finetune(4, run.weights, replace(SETTINGS, **given))
