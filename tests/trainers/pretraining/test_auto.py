"""A method that the data choose, from the short runs to the chosen one: files, resuming, restarting, contradicting arguments.

No test depends on how fast the machine is: ``time_steps`` is replaced, so budgets are numbers of steps.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from nnssl.checkpoint import load_tensors, read_checkpoint
from nnssl.cli.info import explain_checkpoint
from nnssl.data.case_store import complete_cases, remove_case
from nnssl.errors import DivergedError, UserError
from nnssl.log import lines_to
from nnssl.methods import METHODS
from nnssl.paths import use_folders
from nnssl.weights.opened_checkpoint import open_checkpoint
from tests.holding import held_elsewhere, waits_for
from tests.trainers.phantom_study import LABELLED, SOURCE
from tests.trainers.pretraining.stopping import stopped_at
from trainers.finetuning.pretrained_weights import find_latest
from trainers.pretraining import auto, candidate_scores
from trainers.pretraining.auto_record import AUTO_CSV, AUTO_JSON, read_record
from trainers.pretraining.candidate_scores import Score
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.pretrain_trainer import PretrainTrainer
from trainers.pretraining.settings import PretrainSettings

STEPS = 6
"""Steps of each candidate; a step takes a second here, and the plan's length is twice as many."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Seconds per step are given, and features are measured on few patches."""
    monkeypatch.setattr(candidate_scores, "PATCHES", 6)
    monkeypatch.setattr(auto, "time_steps", lambda comparison, method: {each.name: 1.0 for each in method.stages})


def settings(candidates=("mae", "simclr"), **more) -> PretrainSettings:
    given = {
        "budget_minutes": STEPS * len(candidates) / 60,
        "epochs": 4,
        "iterations_per_epoch": 3,
        "workers": 0,
    } | more
    return PretrainSettings(candidates=candidates, device="cpu", **given)


def run(folders, *, said=None, **more):
    with lines_to((said if said is not None else []).append):
        return pretrain("auto", SOURCE, settings(**more), folders)


def folder_of(folders):
    return folders.results / SOURCE / "nnssl_auto" / "nnsslPlans__3d_fullres"


def without_minutes(record):
    return replace(record, candidates=tuple(replace(each, minutes=None) for each in record.candidates))


def results_named(folders, name):
    other = replace(folders, results=folders.results.parent / name)
    other.results.mkdir()
    return other


def test_the_best_of_two_methods_is_pretrained_and_the_choice_is_kept(folders):
    said: list[str] = []
    final = run(folders, said=said)
    record = read_record(folder_of(folders) / AUTO_JSON)
    assert [each.method for each in record.candidates] == ["mae", "simclr"]
    for each in record.candidates:
        assert [(stage.epochs, stage.iterations_per_epoch) for stage in each.stages] == [(3, 2)]
        (checkpoint,) = (folder_of(folders) / "candidates" / each.method).rglob("checkpoint_final.pth")
        weights, provenance = read_checkpoint(checkpoint)[0]["network_weights"], read_checkpoint(checkpoint)[1]
        assert (provenance.step, provenance.method) == (6, each.method)
        assert set(each.scores) == {"patches", "points", "regions"}
        for score in each.scores.values():
            assert score.value == pytest.approx(sum(score.stages.values()) / len(score.stages))
            assert all(0 <= value <= 1 for value in (score.value, score.random))
        kinds = {name.partition("_")[0] for name in each.scores["points"].stages}
        assert kinds == ({"encoder", "decoder"} if each.method == "mae" else {"encoder"})
        assert weights
    assert record.random_weights["points"] == record.candidates[0].scores["points"].random  # both are of all stages
    assert record.candidates[1].scores["points"].random != record.random_weights["points"]
    assert not (folder_of(folders) / "timing").exists()
    # the winner is run in full, in its own folder, and says why
    assert read_checkpoint(final)[1].method == record.choice
    assert read_checkpoint(final)[1].total_steps == 12
    assert final.parents[2] == folders.results / SOURCE
    described = json.loads((final.parent / "run.json").read_text())["chosen"]
    assert described["reason"] == record.reason
    assert described["scores"]["regions"]["value"] == dict(record.scored[record.choice])["regions"].value
    assert load_tensors(final)["nnssl"]["state"]["chosen"]["reason"] == record.reason
    assert f"  method chosen by short runs: {record.reason}" in explain_checkpoint(final)
    assert f"Chosen: {record.reason}" in said
    table = said[[line.split()[0] for line in said].index("method") :]
    assert [line.split()[0] for line in table[3:5]] == ["random", "chance"]
    assert (folder_of(folders) / AUTO_CSV).read_text().count("\n") == 3
    # the newest weights are never those of a short run
    assert find_latest(folders) == final

    times = {path: path.stat().st_mtime_ns for path in folders.results.rglob("*") if path.is_file()}
    said.clear()
    assert run(folders, said=said) == final
    after = {path: path.stat().st_mtime_ns for path in folders.results.rglob("*") if path.is_file()}
    assert after == times
    assert any(line.startswith("Keeping the choice in ") for line in said)
    assert not any(line.startswith("Candidate ") for line in said)

    for change, message in (
        ({"budget_minutes": 1.0}, "made with budget_minutes 0.2, but this run has 1; use restart"),
        ({"candidates": ("mae", "simclr", "sam"), "budget_minutes": 0.2}, "made with candidates mae simclr, but this"),
        ({"seed": 1}, "made with seed 0, but this run has 1"),
        ({"probe": 4}, f"made with probe none, but this run has {LABELLED}"),
    ):
        with pytest.raises(UserError, match=message):
            run(folders, **change)


def choose(folders, said=None):
    """Choose only, without the full run."""
    with lines_to((said if said is not None else []).append), use_folders(folders):
        return auto.choose_method(auto.open_comparison(SOURCE, settings(), folders))


def test_stopped_within_a_candidate_it_ends_in_the_same_choice(folders, monkeypatch):
    whole = choose(folders)
    other = results_named(folders, "stopped")
    with stopped_at(monkeypatch, 2):
        choose(other)
    begun = read_record(folder_of(other) / AUTO_JSON)
    assert begun.choice is None
    assert [each.is_finished for each in begun.candidates] == [False, False]
    # lengths are those that were written before the run, however fast the machine is now
    monkeypatch.setattr(auto, "time_steps", lambda comparison, method: pytest.fail("timed again"))
    said: list[str] = []
    assert without_minutes(choose(other, said)) == without_minutes(whole)
    assert any(line.startswith("Resuming at step 3 of 6") for line in said)
    assert read_record(folder_of(other) / AUTO_JSON).choice == whole.choice is not None


class Killed(BaseException):
    """Stands for a signal."""


class Features:
    """Measures that know the scores of every method; 0.1 for random weights."""

    values: dict[str, float]

    def __init__(self, *arguments):
        self.chance = {"patches": 0.01, "points": 0.01, "regions": 0.01}

    def random_scores(self):
        return dict.fromkeys(self.chance, 0.1)

    def scores(self, weights):
        return {name: Score(self.values[weights], 0.1, {"encoder_0": self.values[weights]}) for name in self.chance}


@pytest.fixture
def pretend(monkeypatch):
    """Replace runs and measures; returns the methods that were run short and in full, in order."""
    done: list[str] = []
    tables = {"epoch_seconds": [30.0, 30.0]}
    monkeypatch.setattr(
        auto.Comparison, "run_short", lambda self, method, *rest: done.append(method.name) or method.name
    )
    monkeypatch.setattr(auto, "read_metrics", lambda path: tables)
    monkeypatch.setattr(auto, "open_checkpoint", lambda path: path)
    monkeypatch.setattr(auto, "CandidateMeasures", Features)
    monkeypatch.setattr(Features, "values", dict.fromkeys(METHODS, 0.2) | {"sam": 0.4}, raising=False)
    monkeypatch.setattr(
        auto, "pretrain_method", lambda name, dataset, settings, folders, chosen: done.append(f"all of {name}") or name
    )
    return done


THREE = ("mae", "sam", "simclr")
EVERYTHING = ["sam", "mae", "simclr", "all of sam"]


def test_killed_at_any_moment_it_does_the_same(folders, pretend, monkeypatch):
    assert run(folders, candidates=THREE) == "sam"
    assert pretend == EVERYTHING
    whole = read_record(folder_of(folders) / AUTO_JSON)
    assert (whole.choice, [each.minutes for each in whole.candidates]) == ("sam", [1.0, 1.0, 1.0])
    write = auto.write_record
    for moment in range(1, 9):
        for before in (False, True):
            pretend.clear()
            other = results_named(folders, f"killed_{moment}_{before}")
            count = 0

            def write_and_die(folder, record, moment=moment, before=before):
                nonlocal count
                count += 1
                if before and count == moment:
                    raise Killed
                write(folder, record)
                if count == moment:
                    raise Killed

            monkeypatch.setattr(auto, "write_record", write_and_die)
            with pytest.raises(Killed):
                run(other, candidates=THREE)
            monkeypatch.setattr(auto, "write_record", write)
            assert run(other, candidates=THREE) == "sam"
            assert list(dict.fromkeys(pretend)) == EVERYTHING
            assert len(pretend) <= len(EVERYTHING) + before  # only the run whose end was not written is asked for again
            assert read_record(folder_of(other) / AUTO_JSON) == whole
    assert count == moment == 8  # the last of all moments


def test_restart_chooses_again(folders, pretend):
    run(folders, candidates=THREE)
    Features.values["mae"] = 0.9
    pretend.clear()
    assert run(folders, candidates=THREE) == "sam"
    assert pretend == ["all of sam"]
    pretend.clear()
    leftover = folder_of(folders) / "candidates" / "sam" / "leftover"
    leftover.mkdir(parents=True)
    assert run(folders, candidates=THREE, restart=True) == "mae"
    assert pretend == ["sam", "mae", "simclr", "all of mae"]
    assert not leftover.exists()


def test_restart_deletes_no_comparison_that_another_process_works_on(folders, pretend):
    run(folders, candidates=THREE)
    with held_elsewhere(folder_of(folders)), pytest.raises(UserError, match=r"process \d+ on .* works there"):
        run(folders, candidates=THREE, restart=True)
    assert (folder_of(folders) / AUTO_JSON).exists()
    waits_for(folder_of(folders), lambda: run(folders, candidates=THREE))


def test_other_cases_make_another_comparison(folders, pretend, tmp_path):
    run(folders, candidates=THREE)
    preprocessed = tmp_path / "preprocessed"
    shutil.copytree(folders.preprocessed, preprocessed)
    cases = next((preprocessed / SOURCE).glob("*_cases_*"))
    remove_case(cases, complete_cases(cases)[0])
    with pytest.raises(UserError, match="made with an earlier plan or other preprocessed cases; use restart"):
        run(replace(folders, preprocessed=preprocessed), candidates=THREE)


def test_nothing_above_random_weights_ends_in_one_line(folders, pretend):
    Features.values.update(dict.fromkeys(METHODS, 0.1))
    for _ in range(2):
        with pytest.raises(UserError, match=r"chose nothing after 0\.3 minutes: no candidate is above random"):
            run(folders, candidates=THREE)
    assert pretend == ["sam", "mae", "simclr"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DivergedError("the loss of epoch 0 is nan"), "the loss of epoch 0 is nan"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory.\nTry less."), "CUDA out of memory."),
    ],
)
def test_a_candidate_that_fails_is_reported_and_not_chosen(folders, pretend, monkeypatch, error, reason):
    short = auto.Comparison.run_short

    def fail(self, method, *rest):
        if method.name == "sam":
            raise error
        return short(self, method, *rest)

    monkeypatch.setattr(auto.Comparison, "run_short", fail)
    said: list[str] = []
    run(folders, candidates=THREE, said=said)
    record = read_record(folder_of(folders) / AUTO_JSON)
    assert record.candidates[0].failure == reason
    assert record.choice in ("mae", "simclr")
    assert f"sam: {reason}; it is not chosen" in said


def test_a_candidate_that_diverges_while_it_is_timed_is_not_chosen_either(folders, pretend, monkeypatch):
    given = auto.time_steps

    def diverge(comparison, method):
        if method.name == "mae":
            raise DivergedError("the loss of epoch 2 is nan")
        return given(comparison, method)

    monkeypatch.setattr(auto, "time_steps", diverge)
    said: list[str] = []
    run(folders, candidates=THREE, said=said)
    record = read_record(folder_of(folders) / AUTO_JSON)
    failed = {each.method: (each.stages, each.failure) for each in record.candidates}["mae"]
    assert failed == (None, "the loss of epoch 2 is nan")
    assert record.choice in ("sam", "simclr")
    assert "mae: the loss of epoch 2 is nan; it is not chosen" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "weights.pth"}, "init must not be given for the method auto"),
        ({"stages": ("mae.recovery",)}, "stages must not be given for the method auto"),
        ({"budget_minutes": 0}, "budget_minutes must be above 0, got 0"),
        ({"epochs": (3, 4)}, "epochs must be one number for the method auto"),
        ({"overrides": ("temperature=0.2",)}, "Unknown setting 'temperature'. Available settings: mae.recovery"),
        ({"configuration": "4d"}, "has no configuration '4d'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_written(folders, change, message):
    with pytest.raises(UserError, match=message):
        run(folders, **change)
    assert not list(folders.results.iterdir())


def test_torchrun_is_refused(folders, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cannot be started by torchrun; use --num-gpus"):
        run(folders)


def test_steps_are_timed_by_a_run_that_is_deleted(folders, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("NNSSL_PRECISION", "float32")
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(getattr(folders, name)))
    steps: list[str] = []
    step = PretrainTrainer.train_step
    monkeypatch.setattr(
        PretrainTrainer, "train_step", lambda self, batch: steps.append(self.stage) or step(self, batch)
    )
    monkeypatch.setattr(auto, "read_metrics", lambda path: path.exists() and {"epoch_seconds": [9.0, 2.0, 3.0, 4.0]})
    comparison = auto.open_comparison(SOURCE, settings(), folders)
    found = auto.time_steps(comparison, METHODS["mae"])
    assert found == {"mae.recovery": 2.0 / auto.TRIAL_ITERATIONS}
    assert steps == ["mae.recovery"] * auto.TRIAL_EPOCHS * auto.TRIAL_ITERATIONS
    assert not list(folders.results.rglob("*.pth"))


def test_with_labels_the_probe_chooses_and_its_cases_count_as_seen(folders):
    said: list[str] = []
    final = run(folders, said=said, probe=4, probe_cases=2, epochs=1, iterations_per_epoch=2)
    record = read_record(folder_of(folders) / AUTO_JSON)
    dice = {method: scores["dice"].value for method, scores in record.scored.items()}
    assert record.asked.probe == LABELLED
    assert record.choice == max(dice, key=lambda method: dice[method])
    assert record.reason.startswith(f"{record.choice}: linear probe ")
    assert "patches" in record.scored["mae"]  # also measured, but without a say
    assert record.scored["mae"]["dice"].random == record.random_weights["dice"]
    probe = open_checkpoint(final).choosing_probe
    assert probe is not None
    assert len({*probe["train"], *probe["test"]}) == 4


def test_a_named_method_is_not_chosen_by_anything(folders):
    final = pretrain("mae", SOURCE, settings(candidates=(), epochs=1, iterations_per_epoch=1), folders)
    assert json.loads((final.parent / "run.json").read_text())["chosen"] is None
    assert load_tensors(final)["nnssl"]["state"]["chosen"] is None
    assert not any("chosen" in line for line in explain_checkpoint(final))
