"""The record of a choice: what is chosen, in which words, the table, the files, and arguments that contradict it."""

import csv
import json
from dataclasses import asdict, replace

import pytest

from nnssl.errors import UserError
from trainers.pretraining.auto_record import (
    AUTO_CSV,
    AUTO_JSON,
    SCHEMA_VERSION,
    Asked,
    AutoRecord,
    Candidate,
    check_asked,
    decide,
    describe_choice,
    read_record,
    table_lines,
    write_record,
)
from trainers.pretraining.candidate_scores import Score
from trainers.pretraining.candidates import StageLength

ASKED = Asked(10.0, ("mae", "pix2rep", "sam"), 0, ("batch_size=2",), None, None, "digest")


def scores(**values: tuple[float, float]) -> dict[str, Score]:
    return {name: Score(value, random, {"encoder_0": value}) for name, (value, random) in values.items()}


def make_record(scored, probe=None) -> AutoRecord:
    """A record whose candidates have these scores; one without scores has failed."""
    length = (StageLength("mae.recovery", 0.5, 4, 5),)
    candidates = tuple(
        Candidate(name, length, 1.25, own) if own else Candidate(name, length, failure="the loss of epoch 0 is nan")
        for name, own in scored.items()
    )
    asked = replace(ASKED, probe=probe, candidates=tuple(scored))
    return AutoRecord(
        SCHEMA_VERSION, "0", "Dataset501_A", "nnsslPlans", "3d_fullres", asked, {"reprec": "needs a hybrid"}, candidates,
        {"patches": 0.1, "points": 0.02, "regions": 0.3} | ({"dice": 0.12} if probe else {}),
        {"patches": 0.0156, "points": 0.001, "regions": 0.08},
    )  # fmt: skip


FEATURES = {
    "mae": scores(patches=(0.1, 0.1), points=(0.01, 0.02), regions=(0.40, 0.3)),
    "pix2rep": scores(patches=(0.3, 0.1), points=(0.10, 0.02), regions=(0.38, 0.3)),
    "sam": scores(patches=(0.2, 0.1), points=(0.12, 0.02), regions=(0.29, 0.3)),
}


def with_dice(values):
    return {name: {**FEATURES[name], **scores(dice=(value, random))} for name, (value, random) in values.items()}


def test_without_labels_the_mean_rank_of_the_gains_decides():
    record = decide(make_record(FEATURES))
    # ranks: mae 3, 3, 1; pix2rep 1, 2, 2; sam 2, 1, 3
    assert record.choice == "pix2rep"
    assert record.reason == (
        "pix2rep: mean rank 1.7 of 3, next sam 2.0; gains over random weights in points: patches +20.0, points +8.0, regions +8.0"
    )


def test_a_gain_counts_and_not_a_value():
    """An encoder alone has higher values, of random weights too."""
    encoder = scores(patches=(0.5, 0.5), points=(0.3, 0.3), regions=(0.6, 0.59))
    assert decide(make_record({**FEATURES, "sam": encoder})).choice == "pix2rep"


def test_with_labels_dice_decides_alone():
    record = decide(
        make_record(with_dice({"mae": (0.27, 0.12), "pix2rep": (0.25, 0.12), "sam": (0.31, 0.1)}), "Dataset004_A")
    )
    assert record.choice == "sam"
    assert record.reason == "sam: linear probe 31.0, next mae 27.0, random weights 10.0 (Dice in points)"


def test_a_candidate_that_is_not_above_random_weights_is_never_chosen():
    values = {"mae": (0.27, 0.28), "pix2rep": (0.25, 0.12)}
    assert decide(make_record(with_dice(values), "Dataset004_A")).choice == "pix2rep"
    values = {"mae": (0.27, 0.28), "pix2rep": (0.12, 0.12)}
    record = decide(make_record(with_dice(values), "Dataset004_A"))
    assert (record.choice, record.reason) == (None, "no candidate is above random weights in the linear probe")
    nothing = scores(patches=(0.1, 0.1), points=(0.01, 0.02), regions=(0.2, 0.3))
    record = decide(make_record({"mae": nothing, "pix2rep": nothing}))
    assert (record.choice, record.reason) == (
        None,
        "no candidate is above random weights in patches or points or regions",
    )


def test_a_run_that_diverged_is_not_chosen():
    record = decide(make_record({"mae": None, "pix2rep": FEATURES["mae"]}))
    assert record.choice == "pix2rep"
    assert record.reason.startswith("pix2rep: mean rank 1.0 of 1; gains")
    assert decide(make_record({"mae": None, "pix2rep": None})).reason == "no candidate finished its short run"


def test_a_measure_that_the_data_do_not_allow_is_left_out():
    fewer = {name: {key: value for key, value in own.items() if key != "regions"} for name, own in FEATURES.items()}
    record = decide(make_record(fewer))
    assert record.deciding == ("patches", "points")
    assert record.choice == "sam"  # as good as pix2rep by mean rank, and better in the last measure


def test_table_shows_the_best_first_and_random_weights_and_chance():
    lines = table_lines(decide(make_record({**FEATURES, "regions": None})))
    assert [line.split()[0] for line in lines] == ["method", "pix2rep", "sam", "mae", "regions", "random", "chance"]
    assert lines[1].split() == ["pix2rep", "20", "1.2", "30.0", "(+20.0)", "10.0", "(+8.0)", "38.0", "(+8.0)", "1.7"]
    assert lines[4].split() == ["regions", "20", "-", "-", "-", "-", "-"]
    assert lines[5].split() == ["random", "weights", "-", "-", "10.0", "2.0", "30.0", "-"]


def test_files_keep_everything(tmp_path):
    record = decide(make_record(FEATURES))
    write_record(tmp_path, record)
    assert read_record(tmp_path / AUTO_JSON) == record
    rows = list(csv.DictReader((tmp_path / AUTO_CSV).open()))
    assert [row["method"] for row in rows] == ["mae", "pix2rep", "sam"]
    assert (rows[1]["steps"], rows[1]["minutes"], rows[1]["patches"], rows[1]["patches_random"]) == (
        "20",
        "1.25",
        "0.3",
        "0.1",
    )
    assert rows[1]["dice"] == ""
    assert float(rows[1]["rank"]) == pytest.approx(5 / 3)
    content = json.loads((tmp_path / AUTO_JSON).read_text())
    for changed in ({**content, "more": 1}, {**content, "schema_version": 2}):
        (tmp_path / AUTO_JSON).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"auto\.json: .*use --restart to choose again"):
            read_record(tmp_path / AUTO_JSON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_minutes": 20.0}, "made with budget_minutes 10, but this run has 20; use restart to choose again"),
        ({"candidates": ("mae",)}, "made with candidates mae pix2rep sam, but this run has mae"),
        ({"seed": 3}, "made with seed 0, but this run has 3"),
        ({"overrides": ()}, "made with overrides batch_size=2, but this run has none"),
        ({"probe": "Dataset004_A"}, "made with probe none, but this run has Dataset004_A"),
        ({"probe_cases": 4}, "made with probe_cases none, but this run has 4"),
        ({"plan": "other"}, "made with an earlier plan or other preprocessed cases; use restart to choose again"),
    ],
)
def test_contradicting_arguments_are_named(tmp_path, change, message):
    check_asked(tmp_path / AUTO_JSON, ASKED, ASKED)
    assert set(asdict(ASKED)) >= set(change)
    with pytest.raises(UserError, match=message):
        check_asked(tmp_path / AUTO_JSON, ASKED, replace(ASKED, **change))


def test_the_chosen_run_records_the_reason_and_the_scores(tmp_path):
    record = decide(make_record(FEATURES))
    chosen = describe_choice(record, tmp_path / AUTO_JSON)
    assert chosen["reason"] == record.reason
    assert chosen["scores"]["points"] == {"value": 0.10, "random": 0.02, "stages": {"encoder_0": 0.10}}
    assert json.loads(json.dumps(chosen)) == chosen
