"""Which cases to annotate first, end to end on phantoms of two kinds, and mistakes of the user."""

import csv

import numpy as np
import pytest

from nnssl.cli import select_cases
from nnssl.errors import UserError
from nnssl.study.select import SelectSettings, select
from tests.nnssl.evaluation.test_classify import CASES, files, workspace  # noqa: F401  fixtures


def test_list_table_and_picture_are_written(files, tmp_path, capsys):  # noqa: F811
    arguments = [
        "-n",
        "3",
        "-w",
        str(files / "3d_fullres.pth"),
        "--patches",
        "2",
        "-o",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert select_cases.main(arguments) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "selection.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert (tmp_path / "selection.txt").read_text().split() == [row["cases"] for row in rows]
    assert sum(int(row["group"]) for row in rows) <= CASES
    assert int(rows[0]["group"]) >= int(rows[2]["group"])
    assert all(row["reason"] in printed for row in rows)
    assert (tmp_path / "selection.png").read_bytes()[:4] == b"\x89PNG"
    assert "--cases" in printed


@pytest.mark.parametrize("name", ["2d", "2d_hybrid", "3d_fullres_primus"])
def test_every_configuration_can_choose_and_repeats_its_choice(files, tmp_path, name):  # noqa: F811
    settings = SelectSettings(patches=2, output=tmp_path, device="cpu")
    first = select(None, 4, files / f"{name}.pth", settings)
    assert len({each.patient for each in first}) == 4
    assert select(None, 4, files / f"{name}.pth", settings) == first


def test_cases_of_a_patient_stay_together(files, tmp_path):  # noqa: F811
    table = tmp_path / "patients.csv"
    lines = [f"toy_{number:02},p{number // 3}" for number in range(CASES)]
    table.write_text("\n".join(["case,patient", *lines]))
    settings = SelectSettings(patches=2, patients=table, output=tmp_path, device="cpu")
    chosen = select(None, 2, files / "2d.pth", settings)
    assert all(len(each.cases) == 3 for each in chosen)
    listed = (tmp_path / "selection.txt").read_text().split()
    assert listed == [case for each in chosen for case in each.cases]
    table.write_text("\n".join(["case,patient", *lines[1:]]))
    with pytest.raises(UserError, match="has no patient of toy_00; add a line for every case"):
        select(None, 2, files / "2d.pth", settings)


def test_more_patients_than_there_are_is_one_line(files, tmp_path, capsys):  # noqa: F811
    arguments = ["-n", "99", "-w", str(files / "2d.pth"), "-o", str(tmp_path)]
    assert select_cases.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"nnssl_select: error: --number must be at most {CASES}, as Dataset501_Toy has so many patients, got 99"
    )
    with pytest.raises(UserError, match="patches must be at least 1, got 0"):
        select(None, 1, files / "2d.pth", SelectSettings(patches=0))
    assert not np.any([path.name.startswith("selection") for path in tmp_path.iterdir()])
