"""The demo, made small."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from nnssl.cli.demo import main, make_parser
from nnssl.study.table import Interval, Row, StudyTable
from trainers.demo import DemoSettings, dice_by_structure

SMALL = [
    *("--unlabelled", "4", "--labels", "1", "--draws", "2", "--held-out", "2", "--pretrain-epochs", "1"),
    *("--pretrain-iterations", "2", "--epochs", "1", "2", "--iterations-per-epoch", "2", "--device", "cpu"),
]


@pytest.mark.figures
@pytest.mark.parametrize("method", ["pix2rep_v2", "reprec"])
def test_the_demo_ends_with_a_report_of_both_arms_and_resumes(tmp_path, capsys, method):
    folder = tmp_path / "demo"
    assert main(["-m", method, "--folder", str(folder), *SMALL]) == 0
    shown = capsys.readouterr().out
    headers = [line for line in shown.splitlines() if line.startswith("Dice (points) after ")]
    assert [header.split() for header in headers] == [
        ["Dice", "(points)", "after", str(steps), "steps", "scratch", method, "gain"] for steps in (2, 4)
    ]
    for name in ("right_ventricle", "myocardium", "left_ventricle", "mean"):
        assert len(re.findall(rf"^{name}(?: +[-+.\d]+){{3}}$", shown, re.MULTILINE)) == 2, name
    assert "the mean of 2 networks, trained on 1 labelled phantom each, on 2 held-out phantoms." in shown
    assert f"open {folder / 'report.html'}" in shown
    page = (folder / "report.html").read_text()
    assert f"nnssl_demo -m {method}" in page
    assert "data:image/png" in page  # the segmentations side by side
    assert "The phantoms are generated, and the fine-tuning is short on purpose" in page
    weights = Path(re.search(r"next: nnssl_info (\S+)", shown)[1])
    cells = list(folder.glob("results/Dataset902*/**/fold_0/checkpoint_final.pth"))
    assert len(cells) == 2 * 2 * 2
    made = {path: path.stat().st_mtime_ns for path in (weights, *cells, *folder.glob("raw/*/*/*.nii.gz"))}
    assert len(made) == 1 + len(cells) + 4 + 2 * (2 * 1 + 2)

    assert main(["-m", method, "--folder", str(folder), *SMALL]) == 0
    assert "Epoch 0" not in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())

    assert main(["-m", method, "--folder", str(folder), *SMALL, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "contains 4 phantoms of an earlier demo" in error
    assert "seed 0" in error
    assert "seed 1" in error
    assert "choose another folder" in error

    assert main(["-m", method, "--folder", str(folder), *SMALL, "--pretrain-iterations", "1"]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: contains another demo" in error
    assert "iterations_per_epoch" in error
    assert error.rstrip().endswith("choose another folder")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["-m", "reprek"], "Unknown method 'reprek'"),
        (["--epochs", "3", "3"], "--epochs must be one or more different values, got 3 3"),
    ],
)
def test_wrong_settings_are_reported_before_anything_is_made(tmp_path, capsys, wrong, said):
    assert main([*wrong, "--folder", str(tmp_path / "demo"), "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_command_and_the_library_have_the_same_defaults():
    given = vars(make_parser().parse_args([]))
    assert {name: given[name] for name in asdict(DemoSettings())} == asdict(DemoSettings())


def row(arm: str, steps: int, mean: float, classes: dict[str, float | None]) -> Row:
    return Row(
        arm, "finetune", 2, steps, (0, 1, 2), Interval(mean, 0, 1), (mean,) * 3, classes, None, None, None, "", ""
    )


def test_the_table_shows_every_length_and_what_no_network_found():
    rows = (
        row("scratch", 60, 0.1, {"a": 0.1, "b": 0.1}),
        row("mae", 60, 0.2, {"a": 0.2, "b": 0.2}),
        row("scratch", 90, 0.4, {"a": 0.4, "b": None}),
        row("mae", 90, 0.35, {"a": 0.35, "b": 0.3}),
    )
    lines = [line.split() for line in dice_by_structure(StudyTable(rows, (), 2.0, 10))]
    assert lines[1:4] == [
        ["a", "10.0", "20.0", "+10.0"],
        ["b", "10.0", "20.0", "+10.0"],
        ["mean", "10.0", "20.0", "+10.0"],
    ]
    assert lines[6:9] == [["a", "40.0", "35.0", "-5.0"], ["b", "-", "30.0", "-"], ["mean", "40.0", "35.0", "-5.0"]]


@pytest.mark.parametrize(("pretrained", "warned"), [(0.5, True), (0.3, False)])
def test_a_lead_comes_with_a_warning(pretrained, warned):
    rows = (row("scratch", 90, 0.4, {"a": 0.4}), row("mae", 90, pretrained, {"a": pretrained}))
    last = dice_by_structure(StudyTable(rows, (), 2.0, 10))[-1]
    assert last.startswith("Each number is the mean of 3 networks, trained on 2 labelled phantoms each, on 10 held-out")
    assert ("may vanish" in last) == warned
