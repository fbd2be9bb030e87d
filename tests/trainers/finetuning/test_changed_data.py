"""Images and labels that are replaced under the same names after a fine-tuning: noticed, and everything is made again."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl.data.contents import RECORDS
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from planners.finetune_planner import adopt_plan
from tests.holding import held_elsewhere, waits_for
from tests.trainers.finetuning.runs import CASES, DATASET, TEST_CASES, folders_set, make_run
from tests.trainers.tiny_plan import tiny_plan
from trainers.finetuning.finetune import finetune
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.labelled_data import make_fingerprint, prepare_data
from trainers.finetuning.result import read_result
from trainers.finetuning.settings import FinetuneSettings

CONFIGURATION = "3d_fullres"


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A comparison whose data the tests of this file change, one after the other."""
    return make_run(tmp_path_factory.mktemp("changed"))


def start(run, **changes):
    with folders_set(run.folder):
        return finetune(4, run.weights, FinetuneSettings(**{**run.arguments, **changes}))


def repeat(run, **changes):
    said: list[str] = []
    with lines_to(said.append):
        return start(run, **changes), said


def turn(path: Path) -> None:
    """Replace an image by its mirror image."""
    image = sitk.ReadImage(str(path))
    turned = sitk.GetImageFromArray(np.ascontiguousarray(sitk.GetArrayFromImage(image)[:, :, ::-1]))
    turned.CopyInformation(image)
    sitk.WriteImage(turned, str(path))


def raw(run, case: str, label: bool) -> Path:
    folder = run.folder / "raw" / DATASET
    return folder / "labelsTr" / f"{case}.nii.gz" if label else folder / "imagesTr" / f"{case}_0000.nii.gz"


def preprocessed(run, case: str) -> tuple[np.ndarray, np.ndarray]:
    data = run.folder / "preprocessed" / DATASET / f"nnsslPlans_{CONFIGURATION}"
    volume, labels, *_ = nnUNetDatasetBlosc2(str(data), [case]).load_case(case)
    return np.asarray(volume), np.asarray(labels)


def test_touched_files_change_nothing(own_run, monkeypatch):
    monkeypatch.setattr(FinetuneTrainer, "run_training", lambda trainer: pytest.fail("trained again"))
    for case in CASES:
        for label in (False, True):
            os.utime(raw(own_run, case, label), ns=(1, 1))
    results, said = repeat(own_run)
    assert results == own_run.results
    assert sum("finished already" in line for line in said) == 2
    assert any("all 5 exist already" in line for line in said)


def test_a_replaced_label_of_a_held_out_case_is_scored_again_without_training(own_run, monkeypatch):
    monkeypatch.setattr(FinetuneTrainer, "run_training", lambda trainer: pytest.fail("trained again"))
    case = TEST_CASES[0]
    turn(raw(own_run, case, label=True))
    before = preprocessed(own_run, case)
    results, said = repeat(own_run)
    assert sum(line == "predicted 2 of 2 cases" for line in said) == 2
    assert any(f"1 cases have changed since they were preprocessed ({case} (label))" in line for line in said)
    assert sum(f"changed since they were scored ({case} (label))" in line for line in said) == 2
    assert [result.dice for result in results] != [result.dice for result in own_run.results]
    reference = own_run.folder / "preprocessed" / DATASET / "gt_segmentations" / f"{case}.nii.gz"
    assert reference.read_bytes() == raw(own_run, case, label=True).read_bytes()
    after = preprocessed(own_run, case)
    assert (np.array_equal(before[0], after[0]), np.array_equal(before[1], after[1])) == (True, False)
    assert repeat(own_run)[0] == results  # and only once


def test_a_replaced_image_of_a_training_case_is_trained_on_again_and_the_earlier_training_is_kept(own_run):
    case = own_run.results[0].train_cases[1]
    turn(raw(own_run, case, label=False))
    finals = [own_run.fold(arm) / "checkpoint_final.pth" for arm in (0, 1)]
    earlier = [path.read_bytes() for path in finals]
    _, said = repeat(own_run)
    assert sum(f"trained on have changed since ({case} (image)); it is trained again" in line for line in said) == 2
    assert [path.read_bytes() != old for path, old in zip(finals, earlier, strict=True)] == [True, True]
    kept = [path.parents[1] / "outdated_fold_0" / path.name for path in finals]
    assert [path.read_bytes() for path in kept] == earlier
    _, said = repeat(own_run)
    assert sum("finished already" in line for line in said) == 2


def test_a_case_without_a_record_counts_as_changed_if_its_files_are_newer(own_run):
    with folders_set(own_run.folder):
        folders = resolve_folders()
        plan = adopt_plan(tiny_plan(), DATASET, folders)
        records = [path for path in (folders.preprocessed / DATASET / RECORDS).iterdir() if path.is_dir()]
        data = folders.preprocessed / DATASET / f"nnsslPlans_{CONFIGURATION}"
        for case in CASES[:2]:
            for folder in records:
                (folder / f"{case}.json").unlink()
        made = (data / f"{CASES[0]}.pkl").stat().st_mtime_ns
        for label, later in ((False, 1), (True, 0)):
            os.utime(raw(own_run, CASES[0], label), ns=(made + later, made + later))
        said: list[str] = []
        with lines_to(said.append):
            prepare_data(DATASET, plan, CONFIGURATION, CASES[:3], folders, 1)
        assert any(f"({CASES[0]} (image or label))" in line for line in said)
        assert all((folder / f"{case}.json").exists() for folder in records for case in CASES[:2])


def test_the_fingerprint_of_replaced_images_is_extracted_again(own_run):
    with folders_set(own_run.folder):
        folders = resolve_folders()
        path = folders.preprocessed / DATASET / "dataset_fingerprint.json"
        path.unlink()
        make_fingerprint(DATASET, folders, 1)
        before = path.stat().st_mtime_ns
        make_fingerprint(DATASET, folders, 1)
        assert path.stat().st_mtime_ns == before
        turn(raw(own_run, CASES[3], label=True))
        said: list[str] = []
        with lines_to(said.append):
            make_fingerprint(DATASET, folders, 1)
        assert any(f"made before {CASES[3]} (label) changed" in line for line in said)
        assert path.stat().st_mtime_ns != before


def test_a_second_run_waits_for_the_first_one_and_takes_what_it_made(own_run):
    result = repeat(own_run)[0][0]
    for folder in (Path(result.model_folder), own_run.folder / "preprocessed" / DATASET):
        results, said = waits_for(folder, lambda: start(own_run, scratch=False))
        assert results == [result]
        assert any("finished already" in line for line in said)
    with held_elsewhere(Path(result.model_folder)), pytest.raises(UserError, match=r"process \d+ on .* works there"):
        repeat(own_run, scratch=False, restart=True)
    assert read_result(Path(result.model_folder, "finetune.json")) == result
