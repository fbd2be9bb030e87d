"""The design of a study is fixed and fair before training begins."""

import shutil
from dataclasses import replace

import pytest
import torch

from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.log import lines_to
from nnssl.methods import find_method
from nnssl.plan import read_plan
from nnssl.study.select import SelectSettings, select
from tests.nnssl.weights.tiny_networks import write_trained
from tests.trainers.phantom_study import LABELLED, SOURCE
from trainers.benchmark.arms import (
    OWN_FOLDER,
    Source,
    configuration_for,
    locate,
    make_weights,
    parse_arm,
    parse_arms,
)
from trainers.benchmark.leaks import seen_by_checkpoint, seen_in_pretraining
from trainers.benchmark.patients import check_disjoint
from trainers.benchmark.settings import StudySettings
from trainers.benchmark.study import prepare_study

CPU = torch.device("cpu")
SETTINGS = StudySettings(
    dataset=4,
    source=501,
    arms=("pix2rep",),
    labels=(1, 3),
    epochs=(1, 2),
    iterations_per_epoch=1,
    seeds=2,
    configuration="3d_fullres",
)


def prepare(folders, said=None, **changes):
    with lines_to((said if said is not None else []).append):
        return prepare_study(replace(SETTINGS, **changes), folders, CPU, 1)


def source_of(folders) -> Source:
    return Source(read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json"), "3d_fullres", (), folders, CPU)


def cases_of(first: int, last: int) -> list[str]:
    return [f"phantom_{number:04}" for number in range(first, last)]


def test_arms_as_users_name_them(tmp_path):
    assert parse_arm("reprec").stages == ("reprec.contrastive", "reprec.generative")
    arm = parse_arm("pix2rep:temperature=0.2:points_per_image=64")
    assert (arm.name, arm.method, arm.overrides) == (
        "pix2rep:temperature=0.2:points_per_image=64", "pix2rep", ("temperature=0.2", "points_per_image=64")
    )  # fmt: skip
    assert parse_arm("reprec.generative").stages == ("reprec.generative",)
    file = tmp_path / "x.pth"
    file.touch()
    assert (parse_arm(f"mine={file}").name, parse_arm(f"mine={file}").checkpoint) == ("mine", file)
    assert parse_arm(str(file)).checkpoint == file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moco", "Unknown arm 'moco': expected a method"),
        ("reprec.first", "Unknown arm 'reprec.first': expected a method"),
        ("scratch", "is always trained"),
        ("/no/file.pth", "checkpoint /no/file.pth not found"),
    ],
)
def test_wrong_arms(text, message):
    with pytest.raises(UserError, match=message):
        parse_arm(text)
    with pytest.raises(UserError, match="more than once"):
        parse_arms(["reprec", "reprec"])


def test_matrix_and_nested_subsets(folders):
    study = prepare(folders, modes=("finetune", "linear"))
    assert len(study.cells) == 2 * 2 * 2 * 2 * 2  # arms with scratch, modes, labels, seeds, lengths
    assert study.configuration == "3d_fullres"
    held_out = set(study.test)
    assert len(held_out) == 2  # a quarter of eight
    for seed in range(2):
        one, three = (set(study.split(labels, seed).train) for labels in (1, 3))
        assert one < three
        assert (len(one), len(three)) == (1, 3)
        assert not three & held_out
    assert study.split(3, 0).train != study.split(3, 1).train
    assert prepare(folders, modes=("linear",), seeds=1).test == study.test  # the same whatever is compared


def test_schedules_of_arms_and_modes(folders):
    """A given rate is that of both arms, a recipe that of the pretrained one; a linear probe keeps its own."""
    study = prepare(folders, modes=("finetune", "linear"), learning_rates=(0.003,), optimizer="adam", recipe="sawtooth")
    found = {(cell.arm == "scratch", cell.mode): study.schedule(cell) for cell in study.cells}
    assert {key: (own.recipe, own.learning_rate) for key, own in found.items()} == {
        (True, "finetune"): ("nnunet", 0.003),
        (False, "finetune"): ("sawtooth", 0.003),
        (True, "linear"): ("nnunet", 0.01),
        (False, "linear"): ("nnunet", 0.01),
    }


def test_validation_patients_are_neither_labelled_nor_held_out(folders, tmp_path):
    study = prepare(
        folders, learning_rates=(0.01, 0.001), validation_patients=2, modes=("mean_teacher",), labels=(1, 3)
    )
    assert len(study.validation) == 2
    assert len(study.cells) == 2 * 2 * 2 * 2 * 2  # arms, labels, seeds, lengths, rates
    for cell in study.cells:
        task = study.task(cell)
        assert task.split.validation == study.validation
        assert not {*task.split.train, *task.unlabelled, *study.test} & {*study.validation}
        assert task.schedule.learning_rate == cell.rate
    with pytest.raises(UserError, match="labels must be at most 4"):
        prepare(folders, learning_rates=(0.01, 0.001), validation_patients=2, labels=(5,))
    (tmp_path / "list.txt").write_text(study.test[0])
    with pytest.raises(UserError, match="validation_cases must be of other patients than the held-out cases"):
        prepare(folders, learning_rates=(0.01, 0.001), validation_cases=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(study.validation[0])
    named = prepare(folders, learning_rates=(0.01, 0.001), validation_cases=tmp_path / "list.txt")
    assert named.validation == study.validation[:1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rates": (0.01, 0.001)}, "learning_rates needs patients to choose between 2 values"),
        ({"learning_rates": (0.01, 0.01), "validation_patients": 1}, "must be different values above 0"),
        ({"validation_patients": 1}, "are for choosing between several learning_rates"),
        ({"learning_rates": (0.01, 0.001), "validation_patients": 1, "modes": ("linear",)}, "linear probes have none"),
        ({"warmup": 0.2, "recipe": "nnunet"}, "warmup must not be given with recipe nnunet"),
        ({"learning_rates": (0.01, 0.001), "validation_patients": 20}, "validation_patients must be at most 6"),
    ],
)
def test_rates_that_cannot_be_chosen(folders, given, message):
    with pytest.raises(UserError, match=message):
        prepare(folders, **given)


def test_other_scans_of_a_held_out_patient_are_not_used(folders, tmp_path):
    """If one of a patient's two scans is held out, the other is neither trained on nor shown to the mean teacher."""
    table = tmp_path / "patients.csv"
    pairs = {case: f"p{number // 2}" for number, case in enumerate(cases_of(4, 12))}
    table.write_text("case,patient\n" + "".join(f"{case},{patient}\n" for case, patient in pairs.items()))
    test = tmp_path / "test.txt"
    test.write_text("phantom_0004\n")
    study = prepare(folders, patients=table, test_cases=test, labels=(1, 2), modes=("mean_teacher",))
    assert len(study.orders[0]) == 3
    assert len(study.split(1, 0).train) == 2  # a patient has two scans
    used = {case for cell in study.cells for case in (*study.task(cell).split.train, *study.task(cell).unlabelled)}
    assert used == set(cases_of(6, 12))


def test_subsets_in_a_given_order(folders, tmp_path):
    subsets = tmp_path / "subsets"
    subsets.mkdir()
    test = tmp_path / "test.txt"
    test.write_text("phantom_0004\n")
    (subsets / "seed0.txt").write_text("phantom_0009\nphantom_0006\nphantom_0011\n")
    study = prepare(folders, test_cases=test, subsets=subsets, seeds=1)
    assert study.split(1, 0).train == ("phantom_0009",)
    assert study.split(3, 0).train == ("phantom_0006", "phantom_0009", "phantom_0011")
    with pytest.raises(UserError, match="lists 3 patients, but labels needs 4"):
        prepare(folders, test_cases=test, subsets=subsets, seeds=1, labels=(4,))
    with pytest.raises(UserError, match=r"seed1\.txt: cannot be read"):
        prepare(folders, test_cases=test, subsets=subsets)
    (subsets / "seed0.txt").write_text("phantom_0009\nphantom_0004\nphantom_0011\n")
    with pytest.raises(UserError, match="patient phantom_0004 is on both sides of the split"):
        prepare(folders, test_cases=test, subsets=subsets, seeds=1)


def test_patients_selected_by_features_of_the_first_arm(folders, phantoms, tmp_path):
    """Only patients of the pool whose images were preprocessed for pretraining can be selected, in the order of nnssl_select."""
    raw = tmp_path / "raw"
    shutil.copytree(phantoms / "raw" / LABELLED, raw / LABELLED)
    for name in cases_of(0, 4):  # annotated images of the pretraining data
        source = phantoms / "raw" / SOURCE / "imagesTr" / f"{name}_0000.nii.gz"
        shutil.copyfile(source, raw / LABELLED / "imagesTr" / source.name)
        shutil.copyfile(
            raw / LABELLED / "labelsTr" / "phantom_0004.nii.gz", raw / LABELLED / "labelsTr" / f"{name}.nii.gz"
        )
    given = {"labels": (1, 2), "choose": "select", "test_patients": 2}
    annotated = replace(folders, raw=raw)
    with pytest.raises(
        UserError, match="features of the first arm, pix2rep, whose weights must exist before the study"
    ):
        prepare(annotated, **given)
    made = locate(parse_arm("pix2rep"), source_of(folders))
    make_weights(made, source_of(folders))
    lines: list[str] = []
    study = prepare(annotated, lines, **given)
    with lines_to(lines.append):
        wanted = [
            [
                each.patient
                for each in select(SOURCE, 2, made.final, SelectSettings(seed=seed, output=tmp_path), folders)
            ]
            for seed in range(2)
        ]
    assert [list(order) for order in study.orders] == wanted
    assert set(study.split(1, 0).train) < set(study.split(2, 0).train)
    assert any("among 4 of 10 patients" in line for line in lines)
    with pytest.raises(UserError, match="needs the images of 5 patients of the pool .*, but finds 4"):
        prepare(annotated, **given | {"labels": (5,)})
    with pytest.raises(UserError, match="subsets lists the patients to label"):
        prepare(annotated, **given, subsets=tmp_path)
    with pytest.raises(UserError, match="choose must be random or select, got best"):
        prepare(annotated, choose="best")


def test_a_test_image_among_the_pretraining_images_is_refused(folders, phantoms, tmp_path):
    """A test image that has another file name in the pretraining data is recognised by its voxels."""
    raw = tmp_path / "raw"
    shutil.copytree(phantoms / "raw" / LABELLED, raw / LABELLED)
    source = phantoms / "raw" / SOURCE / "imagesTr" / "phantom_0002_0000.nii.gz"
    shutil.copyfile(source, raw / LABELLED / "imagesTr" / "phantom_0007_0000.nii.gz")
    test = tmp_path / "test.txt"
    test.write_text("phantom_0007\n")
    leaking = replace(folders, raw=raw)
    with pytest.raises(
        UserError, match=r"phantom_0007 was seen in pretraining \(phantom_0007 has the voxels of phantom_0002"
    ):
        prepare(leaking, test_cases=test)
    assert "phantom_0007" not in prepare(leaking, test_patients=5).test  # drawn cases avoid it
    with pytest.raises(UserError, match="8 patients must be held out, but only 7 of 8 were not seen"):
        prepare(leaking, test_patients=8, labels=(1,))


def test_another_scan_of_a_test_patient_in_pretraining_is_refused(folders, tmp_path):
    table = tmp_path / "patients.csv"
    names = {case: case for case in cases_of(0, 12)} | {"phantom_0007": "phantom_0001"}
    table.write_text("case,patient\n" + "".join(f"{case},{patient}\n" for case, patient in names.items()))
    test = tmp_path / "test.txt"
    test.write_text("phantom_0007\n")
    with pytest.raises(UserError, match="is of the same patient as phantom_0001 of Dataset501_Unlabelled"):
        prepare(folders, test_cases=test, patients=table)


def test_cases_that_a_checkpoint_saw_count_even_if_the_data_set_has_lost_them(folders):
    seen = seen_in_pretraining(SOURCE, folders, None, ("scan_9_frame2",))
    assert seen.patients["scan_9"] == "scan_9_frame2"
    with pytest.raises(UserError, match="fingerprint of the pretraining data not found"):
        seen_in_pretraining("Dataset777_Gone", folders, None)


def test_a_patient_on_both_sides():
    patients = {"a_1": "a", "a_2": "a", "b_1": "b"}
    check_disjoint(["a_1", "a_2"], ["b_1"], patients)
    with pytest.raises(
        UserError, match="patient a is on both sides of the split: a_1 is trained on and a_2 is held out"
    ):
        check_disjoint(["b_1", "a_1"], ["a_2"], patients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (7,)}, "labels must be at most 6, .*, got 7"),
        ({"labels": (1, 1)}, "labels must be one or more different values, got 1 1"),
        ({"configuration": "4d"}, "has no configuration '4d'"),
        ({"arms": ("reprec",), "configuration": "2d", "source": 501}, None),
        ({"source": 999}, "not found"),
        ({"tolerance_mm": 0.0}, "tolerance_mm must be above 0, got 0.0"),
    ],
)
def test_wrong_settings(folders, changes, message):
    if message is None:
        assert prepare(folders, **changes).pretrainings["reprec"].configuration == "2d_hybrid"
        return
    with pytest.raises(UserError, match=message):
        prepare(folders, **changes)


def test_where_weights_of_an_arm_are(folders):
    """A method uses its own folder as it is; an arm with settings uses it only if it contains exactly that run."""
    path = folders.preprocessed / SOURCE / "nnsslPlans.json"
    source = Source(read_plan(path), "3d_fullres", (), folders, CPU)
    own = folders.results / SOURCE / "Pix2RepTrainer__nnsslPlans__3d_fullres" / "fold_all" / "checkpoint_final.pth"
    plain, changed = parse_arm("pix2rep"), parse_arm("pix2rep:temperature=0.2")
    assert (locate(plain, source).final, locate(plain, source).finished) == (own, False)
    assert OWN_FOLDER in str(locate(changed, source).final)
    make_weights(locate(plain, source), source)
    assert locate(plain, source).finished
    assert not locate(changed, source).finished
    make_weights(locate(changed, source), source)
    assert locate(changed, source).finished
    assert locate(changed, source).final.exists()
    assert locate(parse_arm("pix2rep:epochs=1"), source).final == own  # as the plan has it, so the same run
    assert locate(parse_arm("pix2rep:epochs=2"), source).final != own


@pytest.mark.parametrize(
    ("method", "wanted", "expected"),
    [
        ("reprec", "3d_fullres", "3d_fullres_hybrid"),
        ("reprec", "3d_fullres_hybrid", "3d_fullres_hybrid"),
        ("pix2rep", "2d", "2d"),
        ("alice", "3d_fullres", "3d_fullres"),
        ("alice", "3d_fullres_primus", "3d_fullres_primus"),
        ("pix2rep", "3d_fullres_primus", None),
        ("pix2rep", "3d_fullres_hybrid", None),
        ("alice", "2d", None),
    ],
)
def test_weights_fit_the_network_that_is_fine_tuned(folders, method, wanted, expected):
    plan = read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json")
    if expected is None:
        with pytest.raises(UserError, match=f"{method} needs .*do not fit {wanted}"):
            configuration_for(find_method(method), plan, wanted)
        return
    assert configuration_for(find_method(method), plan, wanted) == expected


def test_arms_prepared_alike_share_the_preparation(folders):
    """SAM is trained once for the two arms that need it; the third arm does not need it."""
    path = folders.preprocessed / SOURCE / "nnsslPlans.json"
    source = Source(read_plan(path), "3d_fullres_primus", (), folders, CPU)
    sam = "alice:partners=sam:dimensions=8:fine_queries=10:coarse_queries=4:coarse_pool=10"
    small = "projection_hidden=8:projection_bottleneck=8:projection_dimensions=8:alignment_heads=2"
    lines: list[str] = []
    finals = []
    for own in (f"{sam}:{small}", f"{sam}:{small}:intra_weight=0", f"alice:{small}:inter_weight=0"):
        made = locate(parse_arm(own), source)
        with lines_to(lines.append):
            make_weights(made, source)
        finals.append(made.final)
    assert all(final.exists() for final in finals)
    prepared = list((folders.results / OWN_FOLDER).glob("sam.embedding-*"))
    assert len(prepared) == 1
    trained = [
        line for line in lines if line.startswith("sam.embedding: ") and "finished" not in line and "copied" not in line
    ]
    assert len([line for line in trained if str(prepared[0]) in line]) == 1
    assert sum("sam.embedding: already finished" in line and str(prepared[0]) not in line for line in lines) == 2
    assert any("sam.embedding: skipped" in line for line in lines)
    kept = [(final.parents[2] / "SAMTrainer__nnsslPlans__3d_fullres").exists() for final in finals]
    assert kept == [True, True, False]


def test_arms_must_share_the_plan(folders, tmp_path):
    """A checkpoint of another plan would differ from the other arms in more than its weights."""
    path = folders.preprocessed / SOURCE / "nnsslPlans.json"
    source = source_of(folders)
    made = locate(parse_arm("pix2rep"), source)
    make_weights(made, source)
    checkpoint = f"mine={made.final}"
    assert prepare(folders, arms=(checkpoint,), source=None).plan.dataset_name == SOURCE
    assert prepare(folders, arms=("pix2rep_v2", checkpoint)).weights_path("mine") == made.final
    content = read_json(path, "plan")
    preprocessed = tmp_path / "preprocessed"
    shutil.copytree(folders.preprocessed, preprocessed)
    content["configurations"]["3d_fullres"]["batch_size"] += 1
    write_json(preprocessed / SOURCE / "nnsslPlans.json", content)
    with pytest.raises(UserError, match=": pretrained with another plan than nnsslPlans"):
        prepare(replace(folders, preprocessed=preprocessed), arms=("pix2rep_v2", checkpoint))


def supervised(folders, path, dataset_name):
    """Write a checkpoint of nnU-Net's training with the plan of the study's configuration."""
    plan = read_json(folders.preprocessed / SOURCE / "nnsslPlans.json", "plan")
    plan = {key: value for key, value in plan.items() if key != "pretext"} | {"dataset_name": dataset_name}
    described = read_json(folders.raw / LABELLED / "dataset.json", "dataset.json")
    names, labels = list(described["channel_names"].values()), len(described["labels"])
    network = plan["configurations"]["3d_fullres"]["architecture"]
    arguments = {"plans": plan, "configuration": "3d_fullres", "fold": 0, "dataset_json": described}
    write_trained(path, network, 3, names, labels, init_args=arguments)
    return path


def test_weights_of_nnunet_alone_and_beside_others(folders, tmp_path):
    path, said = supervised(folders, tmp_path / "a.pth", "Dataset291_Other"), []
    study = prepare(folders, said, arms=(f"sup={path}",), source=None, configuration=None)
    assert study.configuration == "3d_fullres"
    assert study.plan.pretraining is None
    assert study.plan.decisions == ()
    assert any("so it cannot be checked whether it has seen held-out cases" in line for line in said)
    both = prepare(folders, arms=("pix2rep", f"sup={path}"))  # the same plan
    assert both.weights_path("sup") == path
    with pytest.raises(UserError, match="has no configuration '3d_wide'"):
        prepare(folders, arms=(f"sup={path}",), source=None, configuration="3d_wide")


def test_cases_that_nnunet_was_trained_on_are_not_held_out(folders, tmp_path):
    path = supervised(folders, tmp_path / "a.pth", LABELLED)
    with pytest.raises(UserError, match="seen in pretraining"):
        prepare(folders, arms=(f"sup={path}",), source=None)
    cases = cases_of(4, 12)
    splits = folders.preprocessed / LABELLED / "splits_final.json"
    splits.parent.mkdir(exist_ok=True)
    write_json(splits, [{"train": cases[:4], "val": cases[4:]}])
    try:
        (seen,) = seen_by_checkpoint(path, folders, None)
        assert sorted(seen.patients.values()) == cases[:4]
    finally:
        splits.unlink()
