"""What of a data set lies where; and what can be made again is deleted, but nothing else."""

import json
import os
import shutil
from dataclasses import asdict

import pytest

from nnssl.cli.info import explain_dataset
from nnssl.data.case_store import complete_cases
from nnssl.data.contents import RECORDS
from nnssl.data.disk_use import find_disk_use, remove_remakable
from nnssl.errors import UserError
from nnssl.locks import lock_of, only_process
from tests.nnssl.data.test_exclusion import run, write_mask
from tests.nnssl.data.test_preprocess import NAME, Scene


@pytest.fixture
def scene(nnunet_folders) -> Scene:
    """Three preprocessed cases with their plan, and results of every kind."""
    scene = Scene(3)
    scene.run()
    folder = scene.folders.preprocessed / NAME
    write_plan(folder, scene.plan)
    (folder / "nnsslPlans_3d_fullres").mkdir()
    (folder / "nnsslPlans_3d_fullres" / "case.b2nd").write_bytes(bytes(7))
    results = scene.folders.results / NAME
    for name, files in {
        "PretrainTrainer__nnsslPlans__3d_fullres/fold_all": ("run.json", "checkpoint_final.pth"),
        "OtherTrainer__nnsslPlans__3d_fullres/fold_all": ("run.json", "checkpoint_latest.pth"),
        "nnssl_benchmark_first": ("results.csv",),
        "nnssl_scratch_5cases__nnsslPlans__3d_fullres/fold_0": ("checkpoint_final.pth",),
        "nnssl_reprec_5cases__nnsslPlans__3d_fullres/fold_0": ("checkpoint_final.pth", "debug.json"),
        "nnssl_auto": ("choice.json",),
        "nnUNetTrainer__nnUNetPlans__2d/fold_0": ("checkpoint_final.pth",),
    }.items():
        (results / name).mkdir(parents=True)
        for file in files:
            (results / name / file).write_bytes(bytes(10))
    return scene


def write_plan(folder, plan) -> None:
    (folder / "nnsslPlans.json").write_text(json.dumps({**plan.nnunet, "pretext": asdict(plan.pretext)}, default=int))


def bytes_below(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def listing(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_listed_once_with_its_size(scene):
    uses = {use.what: use for use in find_disk_use(NAME, scene.folders)}
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    assert uses["cases of nnsslPlans"].path == cases
    assert uses["cases of nnsslPlans"].files == sum(path.is_file() for path in cases.rglob("*"))
    results = {
        what: (use.files, use.size_bytes)
        for what, use in uses.items()
        if use.path.is_relative_to(scene.folders.results)
    }
    assert results == {
        "pretraining": (2, 20),
        "pretraining, unfinished": (2, 20),
        "studies": (1, 10),
        "fine-tuning (2 folders)": (3, 30),
        "choice of a method": (1, 10),
        "other results": (1, 10),
    }
    for root in (scene.folders.raw, scene.folders.preprocessed, scene.folders.results):
        listed = sum(use.size_bytes for use in uses.values() if use.path.is_relative_to(root))
        assert listed == bytes_below(root / NAME)


def test_links_count_with_the_size_of_the_image(scene, tmp_path):
    image = next(scene.images.glob("*.nii.gz"))
    size = image.stat().st_size
    outside = tmp_path / "scan.nii.gz"
    shutil.move(image, outside)
    before = sum(use.size_bytes for use in find_disk_use(NAME, scene.folders) if use.what == "raw files")
    image.symlink_to(outside)
    (scene.images / "again").symlink_to(scene.images)  # a circle
    (scene.images / "broken.nii.gz").symlink_to(tmp_path / "nothing")
    after = sum(use.size_bytes for use in find_disk_use(NAME, scene.folders) if use.what == "raw files")
    assert after - before == size


def test_what_is_deleted_can_be_made_again(scene):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    before, others = listing(cases), listing(scene.folders.results)
    stay = {name: content for name, content in listing(cases.parent).items() if not name.startswith("cases_3d")}
    removed = remove_remakable(NAME, scene.folders)
    assert [(use.path, use.again) for use in removed] == [(cases, f"nnssl_plan_and_preprocess -d {NAME}")]
    assert not cases.exists()
    assert listing(cases.parent) == stay
    assert listing(scene.folders.results) == others
    assert remove_remakable(NAME, scene.folders) == []
    scene.run()
    assert listing(cases) == before


def test_cases_that_fine_tuning_made_are_deleted_with_their_records(scene):
    folder = scene.folders.preprocessed / NAME
    made, records = folder / "nnsslPlans_3d_fullres", folder / RECORDS / "nnsslPlans_3d_fullres"
    records.mkdir(parents=True)
    (records / "case01.json").touch()
    (made / "not_raw.pkl").touch()
    assert made not in [use.path for use in remove_remakable(NAME, scene.folders)]
    assert any(use.kept == "the raw images of not_raw are gone" for use in find_disk_use(NAME, scene.folders))
    (made / "not_raw.pkl").unlink()
    assert [use.path for use in remove_remakable(NAME, scene.folders)] == [made]
    assert not made.exists()
    assert not records.exists()


def test_cases_whose_images_are_gone_are_kept(scene):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    before = listing(cases)
    gone = sorted(scene.images.glob("*.nii.gz"))[0]
    gone.unlink()
    assert remove_remakable(NAME, scene.folders) == []
    assert listing(cases) == before
    kept = [use.kept for use in find_disk_use(NAME, scene.folders) if use.kept]
    assert kept == [f"the raw images of {gone.name.removesuffix('_0000.nii.gz')} are gone"]
    shutil.rmtree(scene.folders.raw / NAME)
    assert remove_remakable(NAME, scene.folders) == []
    assert listing(cases) == before


def test_cases_whose_mask_is_gone_are_kept(scene, tmp_path):
    masks = tmp_path / "masks"
    case = complete_cases(scene.folders.preprocessed / NAME / "cases_3d")[0]
    write_mask(scene, masks, case)
    run(scene, masks)
    assert [use.kept for use in find_disk_use(NAME, scene.folders) if use.path.name == "cases_3d"] == [""]
    shutil.rmtree(masks)
    assert remove_remakable(NAME, scene.folders) == []
    kept = [use.kept for use in find_disk_use(NAME, scene.folders) if use.kept]
    assert kept == [f"{case} was made with an exclusion mask that is gone ({masks / case}.nii.gz)"]


def test_cases_without_a_plan_are_kept(scene):
    folder = scene.folders.preprocessed / NAME
    (folder / "cases_3d").rename(folder / "old_cases_3d")
    assert remove_remakable(NAME, scene.folders) == []
    assert [use.kept for use in find_disk_use(NAME, scene.folders) if use.kept] == ["the plan that made them is gone"]


def test_nothing_is_deleted_while_a_run_may_read_it(scene):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    before = listing(cases)
    run_folder = scene.folders.results / "Dataset777_Other" / "Trainer__plans__2d" / "fold_all"
    run_folder.mkdir(parents=True)
    with only_process(run_folder, "pretraining"):
        owner = json.loads(lock_of(run_folder).read_text())
        with pytest.raises(
            UserError, match=r"Trainer__plans__2d: process \d+ .*pretraining.* works there and may read"
        ):
            remove_remakable(NAME, scene.folders)
    assert listing(cases) == before
    lock_of(run_folder).write_text(json.dumps({**owner, "started": "0"}))  # of a process that was killed
    assert [use.path for use in remove_remakable(NAME, scene.folders)] == [cases]


def test_a_killed_deletion_goes_on(scene, monkeypatch):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    names = complete_cases(cases)
    real = os.unlink
    calls = []

    def killed(path, *arguments, **options):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_remakable(NAME, scene.folders)
    assert complete_cases(cases) == names[1:]
    assert [use.path for use in remove_remakable(NAME, scene.folders)] == [cases]
    assert not cases.exists()


def test_the_command_says_what_it_deleted(scene):
    lines = explain_dataset("501")
    assert lines[0].startswith(f"{scene.folders.raw / NAME}: ")
    assert any(line.startswith("  cases of nnsslPlans") and "cases_3d; nnssl_plan_and" in line for line in lines)
    assert lines[-1].startswith("next: nnssl_info -d 501 --clean (deletes ")
    cleaned = explain_dataset("501", clean=True)
    assert cleaned[-1].startswith(f"deleted {scene.folders.preprocessed / NAME / 'cases_3d'} (")
    assert explain_dataset("501", clean=True)[-1] == "nothing was deleted: nothing here can be made again"
