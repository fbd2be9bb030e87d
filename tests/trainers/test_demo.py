"""The demo, made small."""

import re
from pathlib import Path

import pytest

from nnssl.cli.demo import main
from nnssl.study.table import Interval, Row, StudyTable
from trainers.demo import dice_by_structure

SMALL = [
    *("--unlabelled", "4", "--labels", "1", "--draws", "2", "--held-out", "2", "--pretrain-epochs", "1"),
    *("--pretrain-iterations", "2", "--epochs", "1", "--iterations-per-epoch", "2", "--device", "cpu"),
]


@pytest.mark.figures
@pytest.mark.parametrize("method", ["pix2rep_v2", "reprec"])
def test_the_demo_ends_with_a_report_of_both_arms_and_resumes(tmp_path, capsys, method):
    folder = tmp_path / "demo"
    assert main(["-m", method, "--folder", str(folder), *SMALL]) == 0
    shown = capsys.readouterr().out
    (header,) = [line for line in shown.splitlines() if line.startswith("Dice (points) on 2 held-out phantoms")]
    assert header.split()[-3:] == ["scratch", method, "gain"]
    for name in ("right_ventricle", "myocardium", "left_ventricle", "mean"):
        assert re.search(rf"^{name}( +[-+.\d]+){{3}}$", shown, re.MULTILINE), name
    assert f"open {folder / 'report.html'}" in shown
    page = (folder / "report.html").read_text()
    assert f"nnssl_demo -m {method}" in page
    assert "data:image/png" in page  # the segmentations side by side
    weights = Path(re.search(r"next: nnssl_info (\S+)", shown)[1])
    made = {path: path.stat().st_mtime_ns for path in (weights, *folder.glob("raw/*/*/*.nii.gz"))}
    assert len(made) == 1 + 4 + 2 * (2 * 1 + 2)

    assert main(["-m", method, "--folder", str(folder), *SMALL]) == 0
    assert "Epoch 0" not in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())

    assert main(["-m", method, "--folder", str(folder), *SMALL, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "contains 4 phantoms of an earlier demo" in error
    assert "seed 0" in error
    assert "seed 1" in error
    assert "choose another folder" in error


def test_an_unknown_method_is_said_before_anything_is_made(tmp_path, capsys):
    assert main(["-m", "reprek", "--folder", str(tmp_path / "demo"), "--device", "cpu"]) == 2
    assert "Unknown method 'reprek'" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "raw").exists()


def row(arm: str, steps: int, mean: float, classes: dict[str, float | None]) -> Row:
    return Row(
        arm, "finetune", 2, steps, (0, 1, 2), Interval(mean, 0, 1), (mean,) * 3, classes, None, None, None, "", ""
    )


def test_the_table_shows_the_longest_training_and_what_no_network_found():
    table = StudyTable(
        (
            row("scratch", 60, 0.1, {"a": 0.1, "b": 0.1}),
            row("mae", 60, 0.2, {"a": 0.2, "b": 0.2}),
            row("scratch", 90, 0.4, {"a": 0.4, "b": None}),
            row("mae", 90, 0.35, {"a": 0.35, "b": 0.3}),
        ),
        (),
        2.0,
        10,
    )
    lines = dice_by_structure(table)
    assert [line.split() for line in lines[1:4]] == [
        ["a", "40.0", "35.0", "-5.0"],
        ["b", "-", "30.0", "-"],
        ["mean", "40.0", "35.0", "-5.0"],
    ]
    assert "mean of 3 networks, each trained on 2 labelled phantoms for 90 steps" in lines[4]
