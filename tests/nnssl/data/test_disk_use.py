"""The files of a data set are listed; cases that can be made again are deleted, but nothing else."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nnssl.cli.info import main
from nnssl.data.case_store import complete_cases
from nnssl.data.contents import RECORDS
from nnssl.data.dicom_series import SERIES_ENDING
from nnssl.data.disk_use import PLAN_AGAIN, delete_remakable, find_disk_use
from nnssl.errors import UserError
from nnssl.locks import lock_of, only_process
from nnssl.plan import SCHEMA_VERSION
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
    pretext = asdict(replace(plan.pretext, schema_version=SCHEMA_VERSION))
    (folder / "nnsslPlans.json").write_text(json.dumps({**plan.nnunet, "pretext": pretext}, default=int))


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
    removed = delete_remakable(NAME, scene.folders)
    assert [(use.path, use.again) for use in removed] == [(cases, PLAN_AGAIN)]
    assert not cases.exists()
    assert listing(cases.parent) == stay
    assert listing(scene.folders.results) == others
    assert delete_remakable(NAME, scene.folders) == []
    scene.run()
    assert listing(cases) == before


@pytest.fixture
def labelled(scene) -> Path:
    """A folder as fine-tuning makes it: cases that nnU-Net preprocessed, labels, and records of their state."""
    folder = scene.folders.preprocessed / NAME
    made = folder / "nnsslPlans_3d_fullres"
    shutil.rmtree(made)
    for path in (made, folder / RECORDS / made.name, scene.folders.raw / NAME / "labelsTr"):
        path.mkdir(parents=True)
    for case in complete_cases(folder / "cases_3d"):
        for ending in (".pkl", ".b2nd", "_seg.b2nd"):
            (made / f"{case}{ending}").write_bytes(bytes(5))
        (folder / RECORDS / made.name / f"{case}.json").touch()
        (scene.folders.raw / NAME / "labelsTr" / f"{case}.nii.gz").touch()
    return made


def test_cases_that_fine_tuning_made_are_deleted_with_their_records(scene, labelled):
    assert labelled in [use.path for use in delete_remakable(NAME, scene.folders)]
    assert not labelled.exists()
    assert not (labelled.parent / RECORDS / labelled.name).exists()


def test_labelled_cases_whose_labels_are_gone_are_kept(scene, labelled):
    label = next((scene.folders.raw / NAME / "labelsTr").iterdir())
    label.unlink()
    kept = {use.path: use.kept for use in find_disk_use(NAME, scene.folders)}
    assert kept[labelled] == f"raw files of {label.name.removesuffix('.nii.gz')} are gone or cannot be read"
    assert labelled not in [use.path for use in delete_remakable(NAME, scene.folders)]


def test_cases_of_a_plan_of_nnunet_are_kept(scene, labelled):
    folder = labelled.parent
    (folder / "nnsslPlans.json").rename(folder / "nnUNetPlans.json")
    assert labelled not in [use.path for use in delete_remakable(NAME, scene.folders)]
    assert labelled.exists()


@pytest.mark.parametrize("name", ["notes.txt", "figures"])
def test_folders_that_hold_other_files_are_kept(scene, name):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    if name == "figures":
        (cases / name).mkdir()
    else:
        (cases / name).touch()
    assert delete_remakable(NAME, scene.folders) == []
    assert [use.kept for use in find_disk_use(NAME, scene.folders) if use.path == cases] == [f"it also holds {name}"]


def test_links_are_kept(scene, tmp_path):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    shutil.move(cases, tmp_path / "elsewhere")
    cases.symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path / "elsewhere")
    assert delete_remakable(NAME, scene.folders) == []
    assert listing(tmp_path / "elsewhere") == before
    assert [use.kept for use in find_disk_use(NAME, scene.folders) if use.path == cases] == ["it is a link"]


def test_series_whose_slices_are_gone_are_kept(scene, tmp_path):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    for image in scene.images.glob("*.nii.gz"):
        image.unlink()
        (scene.images / image.name.replace(".nii.gz", SERIES_ENDING)).write_text(str(tmp_path / "gone"))
    assert delete_remakable(NAME, scene.folders) == []
    assert complete_cases(cases)


def test_cases_whose_images_are_gone_are_kept(scene):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    before = listing(cases)
    gone = sorted(scene.images.glob("*.nii.gz"))[0]
    gone.unlink()
    assert delete_remakable(NAME, scene.folders) == []
    assert listing(cases) == before
    kept = [use.kept for use in find_disk_use(NAME, scene.folders) if use.kept]
    assert kept == [f"raw files of {gone.name.removesuffix('_0000.nii.gz')} are gone or cannot be read"]
    shutil.rmtree(scene.folders.raw / NAME)
    assert delete_remakable(NAME, scene.folders) == []
    assert listing(cases) == before


def test_cases_with_exclusion_masks_are_kept(scene, tmp_path):
    case = complete_cases(scene.folders.preprocessed / NAME / "cases_3d")[0]
    write_mask(scene, tmp_path / "masks", case)
    run(scene, tmp_path / "masks")
    assert delete_remakable(NAME, scene.folders) == []
    kept = [use.kept for use in find_disk_use(NAME, scene.folders) if use.kept]
    assert kept == [f"{case} was made with an exclusion mask"]


def test_cases_without_a_plan_are_kept(scene):
    folder = scene.folders.preprocessed / NAME
    (folder / "cases_3d").rename(folder / "old_cases_3d")
    assert delete_remakable(NAME, scene.folders) == []
    assert [use.kept for use in find_disk_use(NAME, scene.folders) if use.kept] == ["no plan that can be read names it"]


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
            delete_remakable(NAME, scene.folders)
    assert listing(cases) == before
    lock_of(run_folder).touch()  # of a process that is about to write its name
    with pytest.raises(UserError, match="a process that its lock does not name works there"):
        delete_remakable(NAME, scene.folders)
    lock_of(run_folder).write_text(json.dumps({**owner, "started": "0"}))  # of a process that was killed
    assert [use.path for use in delete_remakable(NAME, scene.folders)] == [cases]


def test_runs_behind_links_are_noticed(scene, tmp_path):
    (tmp_path / "disk" / "fold_all").mkdir(parents=True)
    (scene.folders.results / "Dataset777_Other").symlink_to(tmp_path / "disk")
    with only_process(tmp_path / "disk" / "fold_all", "pretraining"), pytest.raises(UserError, match="may read"):
        delete_remakable(NAME, scene.folders)


def test_a_killed_deletion_goes_on(scene, monkeypatch):
    cases = scene.folders.preprocessed / NAME / "cases_3d"

    def killed(path, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            delete_remakable(NAME, scene.folders)
    assert not cases.exists()
    assert "half deleted cases" in [use.what for use in find_disk_use(NAME, scene.folders)]
    delete_remakable(NAME, scene.folders)
    assert "half deleted cases" not in [use.what for use in find_disk_use(NAME, scene.folders)]
    assert not list(cases.parent.glob(".*"))


def test_the_command_deletes_only_if_it_is_told_to(scene, capsys):
    cases = scene.folders.preprocessed / NAME / "cases_3d"
    assert main(["-d", "501"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{scene.folders.raw / NAME}: ")
    assert any(
        line.startswith("  cases of nnsslPlans") and f"cases_3d; {PLAN_AGAIN} makes it again" in line for line in lines
    )
    assert lines[-1].startswith("next: nnssl_info -d 501 --clean (deletes ")
    assert cases.exists()
    assert main(["-d", "501", "--clean"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"deleted {cases} (")
    assert not cases.exists()
    assert main(["-d", "501", "--clean"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was deleted: nothing here can be made again"
    for wrong in (["--clean"], ["-d", "501", "checkpoint.pth"], ["-d", "501", "--ext-trainer"]):
        assert main(wrong) == 2
