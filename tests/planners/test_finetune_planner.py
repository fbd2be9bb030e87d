import pytest

from nnssl.data.phantoms import write_phantom_dataset
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from planners.finetune_planner import adopt_plan, check_channels
from tests.trainers.tiny_plan import tiny_plan

TARGET = "Dataset004_Phantoms"


@pytest.fixture
def target(nnunet_folders):
    write_phantom_dataset(nnunet_folders / "raw", TARGET, 1, seed=0, shape=(8, 10, 9))
    return nnunet_folders / "preprocessed" / TARGET


def test_the_plan_is_what_nnunets_own_command_writes(target, nnunet_folders):
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )

    plan = tiny_plan()
    said: list[str] = []
    with lines_to(said.append):
        adopted = adopt_plan(plan, TARGET, resolve_folders())
    assert (adopted.name, adopted.path) == ("nnsslPlans", target / "nnsslPlans.json")
    assert read_json(adopted.path, "plan") == adopted.content
    assert adopted.content["dataset_name"] == TARGET
    assert adopted.content["image_reader_writer"] == "SimpleITKIO"
    assert adopted.content["configurations"] == plan["configurations"]
    assert "pretext" not in adopted.content
    assert plan == tiny_plan(), "the plan that was given stays as it is"
    assert str(adopted.path) in said[0]

    source = nnunet_folders / "preprocessed" / "Dataset501_Source"
    source.mkdir()
    write_json(source / "nnsslPlans.json", plan)
    adopted.path.rename(target / "ours.json")
    move_plans_between_datasets("Dataset501_Source", TARGET, "nnsslPlans")
    stock = read_json(target / "nnsslPlans.json", "plan")
    del stock["pretext"]
    assert read_json(target / "ours.json", "plan") == stock


def test_the_same_plan_is_found_again_and_another_one_is_never_overwritten(target):
    folders = resolve_folders()
    first = adopt_plan(tiny_plan(), TARGET, folders)
    written = first.path.stat().st_mtime_ns
    assert adopt_plan(tiny_plan(), TARGET, folders) == first
    assert first.path.stat().st_mtime_ns == written

    changed = tiny_plan()
    changed["configurations"]["3d_fullres"]["patch_size"] = [16, 16, 16]
    second = adopt_plan(changed, TARGET, folders)
    assert second.name == "nnsslPlansFrom501"
    assert second.content["plans_name"] == "nnsslPlansFrom501"
    # another name, other preprocessed data
    assert second.content["configurations"]["3d_fullres"]["data_identifier"] == "nnsslPlansFrom501_3d_fullres"
    assert adopt_plan(changed, TARGET, folders) == second
    assert adopt_plan(tiny_plan(), TARGET, folders) == first

    changed["configurations"]["3d_fullres"]["patch_size"] = [24, 16, 16]
    with pytest.raises(UserError, match=r"nnsslPlansFrom501.json.*plans_name"):
        adopt_plan(changed, TARGET, folders)
    third = adopt_plan(changed, TARGET, folders, plans_name="mine")
    assert third.path.name == "mine.json"
    assert read_json(first.path, "plan")["configurations"]["3d_fullres"]["patch_size"] == [8, 16, 12]
    with pytest.raises(UserError, match="mine.json"):
        adopt_plan(tiny_plan(), TARGET, folders, plans_name="mine")


def test_weights_pretrained_on_the_labelled_data_set_itself_use_its_plan(target):
    plan = {**tiny_plan(TARGET), "image_reader_writer": "SimpleITKIO"}
    target.mkdir()
    write_json(target / "nnsslPlans.json", plan)
    adopted = adopt_plan(plan, TARGET, resolve_folders())
    assert adopted.name == "nnsslPlans"
    assert read_json(adopted.path, "plan") == plan, "its pretext section stays"


def test_other_channels_are_refused(target):
    with pytest.raises(UserError, match=r"has 1 channel\(s\) \(MRI\), but the weights were pretrained on 2"):
        adopt_plan(tiny_plan(channels=2), TARGET, resolve_folders())
    assert not target.exists()
    two = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    with pytest.raises(UserError, match=r"has 2 channel\(s\) \(T1, T2\), but the weights were pretrained on 1"):
        check_channels(tiny_plan(), TARGET, two)


def test_a_data_set_that_nobody_labelled_is_refused(target, nnunet_folders):
    path = nnunet_folders / "raw" / TARGET / "dataset.json"
    path.write_text('{"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}')
    with pytest.raises(UserError, match="'labels'"):
        adopt_plan(tiny_plan(), TARGET, resolve_folders())
    path.unlink()
    with pytest.raises(UserError, match="dataset.json"):
        adopt_plan(tiny_plan(), TARGET, resolve_folders())


def test_no_image_to_read_is_one_line(target, nnunet_folders):
    next((nnunet_folders / "raw" / TARGET / "imagesTr").iterdir()).unlink()
    with pytest.raises(UserError, match="cannot read its images") as caught:
        adopt_plan(tiny_plan(), TARGET, resolve_folders())
    assert "\n" not in str(caught.value)
