"""Arms whose method is chosen on the pretraining data: before the study, without labels, and shown in their name."""

from dataclasses import replace

import pytest

from nnssl.checkpoint import read_checkpoint
from nnssl.errors import UserError
from nnssl.log import lines_to
from tests.trainers.benchmark.test_study import SETTINGS, prepare
from tests.trainers.phantom_study import LABELLED, SOURCE
from trainers.benchmark import benchmark as benchmark_module
from trainers.benchmark.arms import OWN_FOLDER, parse_arm
from trainers.benchmark.auto_arm import comparison_of
from trainers.benchmark.benchmark import benchmark, preview
from trainers.benchmark.report_inputs import _choice_notes
from trainers.finetuning.pretrained_weights import find_latest
from trainers.pretraining import auto, candidate_scores
from trainers.pretraining.auto_record import AUTO_JSON, read_record, write_record
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

ARM = "auto:candidates=mae,simclr:budget=2"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Seconds per step are given, and features are measured on few patches."""
    monkeypatch.setattr(candidate_scores, "PATCHES", 6)
    monkeypatch.setattr(auto, "time_steps", lambda comparison, method: {each.name: 1.0 for each in method.stages})


@pytest.fixture
def studies(monkeypatch):
    """The studies that would be run."""
    found = []
    monkeypatch.setattr(benchmark_module, "run_study", lambda study, *arguments: found.append(study))
    return found


def test_arms_as_users_name_them():
    arm = parse_arm("auto")
    assert (arm.method, arm.stages, arm.budget_minutes, arm.candidates) == ("auto", (), None, ())
    arm = parse_arm("auto:budget=10:candidates=mae,simclr:batch_size=3")
    assert (arm.budget_minutes, arm.candidates, arm.overrides) == (10.0, ("mae", "simclr"), ("batch_size=3",))
    for wrong in ("0", "soon", "-1", "inf", ""):
        with pytest.raises(UserError, match=f"arms: budget must be a number of minutes above 0, got '{wrong}' in auto"):
            parse_arm(f"auto:budget={wrong}")


def test_a_study_is_checked_and_shown_before_anything_is_chosen(folders, monkeypatch):
    monkeypatch.setattr(benchmark_module, "describe_estimate", lambda cells: [])
    said: list[str] = []
    study = prepare(folders, said=said, arms=("auto", "pix2rep"), configuration=None)
    assert study.configuration == "3d_fullres"
    assert [arm.name for arm in study.arms] == ["auto (not chosen yet)", "pix2rep"]
    assert [arm.name for arm in study.undecided] == ["auto"]
    with lines_to(said.append):
        preview(replace(SETTINGS, arms=(ARM,)), device="cpu", processes=1, folders=folders)
    assert any(
        line.startswith(f"{ARM}: the method will be chosen by short runs of mae, simclr on {SOURCE}, about 2 min")
        for line in said
    )
    assert not list(folders.results.iterdir())
    with pytest.raises(UserError, match="Unknown setting 'depth'"):
        prepare(folders, arms=("auto:depth=3",))
    with pytest.raises(UserError, match="candidates must be methods that the plan allows, got reprec"):
        prepare(folders, arms=("auto:candidates=mae,reprec",))


def test_the_choice_is_made_once_without_labels_and_named(folders, studies):
    settings = replace(SETTINGS, arms=(ARM, "pix2rep"))
    benchmark(settings, device="cpu", processes=1, folders=folders)
    (study,) = studies
    (path,) = folders.results.rglob(AUTO_JSON)
    assert path.is_relative_to(folders.results / OWN_FOLDER)
    record = read_record(path)
    assert record.asked.probe is None
    assert record.asked.budget_minutes == 2.0
    name = f"{ARM} ({record.choice})"
    assert [arm.name for arm in study.arms] == [name, "pix2rep"]
    assert study.undecided == ()
    assert study.pretrainings[name].method.name == record.choice
    assert study.pretrainings[name].final.is_relative_to(folders.results / SOURCE)  # the method's own folder
    assert _choice_notes(study) == [
        f"The method of {name} was chosen by short runs on {SOURCE}, without any label and without the held-out cases. "
        f"{record.reason}."
    ]
    seen = {case for final in path.parent.rglob("checkpoint_final.pth") for case in read_checkpoint(final)[1].cases}
    assert seen
    assert not seen & {*study.test}
    with pytest.raises(UserError, match="no finished pretraining for weights 'latest'"):
        find_latest(folders)  # weights of short runs are never taken

    times = {each: each.stat().st_mtime_ns for each in path.parent.rglob("*.pth")}
    benchmark(settings, device="cpu", processes=1, folders=folders)
    assert [arm.name for arm in studies[1].arms] == [name, "pix2rep"]
    assert {each: each.stat().st_mtime_ns for each in path.parent.rglob("*.pth")} == times


def test_the_choice_of_nnssl_pretrain_is_evaluated_unless_it_saw_labels(folders, studies):
    asked = PretrainSettings(candidates=("mae", "simclr"), budget_minutes=2.0, workers=0, device="cpu")
    final = pretrain("auto", SOURCE, asked, folders)
    benchmark(replace(SETTINGS, arms=(ARM,)), device="cpu", processes=1, folders=folders)
    (study,) = studies
    (arm,) = study.arms
    assert study.pretrainings[arm.name].final == final
    assert study.pretrainings[arm.name].finished
    assert len(list(folders.results.rglob(AUTO_JSON))) == 1
    # the same comparison with labels, or with another budget, is not taken over
    (path,) = folders.results.rglob(AUTO_JSON)
    record = read_record(path)
    write_record(path.parent, replace(record, asked=replace(record.asked, probe=LABELLED, probe_cases=2)))
    assert study.source is not None
    assert comparison_of(parse_arm(ARM), study.source).folder.is_relative_to(folders.results / OWN_FOLDER)
    other = comparison_of(parse_arm("auto:candidates=mae,simclr:budget=3"), study.source)
    assert other.folder != comparison_of(parse_arm(ARM), study.source).folder
