"""Which cases are of one patient, by their names and by a table."""

import pytest

from nnssl.data.patients import FEWEST_PATIENTS, MOST_ASIDE, find_patients, patient_in_name, read_patients, set_aside
from nnssl.errors import UserError
from nnssl.log import lines_to


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("patient001_frame01", "patient001"),
        ("patient001_frame12", "patient001"),
        ("sub-07_ses-2_T1w", "sub-07"),
        ("sub-07", "sub-07"),
        ("P12_ED", "P12"),
        ("P12-es", "P12"),
        ("anna_visit2_left", "anna"),
        ("knee_0034_week-52", "knee_0034"),
        ("hippocampus_017", "hippocampus_017"),
        ("img0003", "img0003"),
        ("BRATS_001", "BRATS_001"),
        ("liver_99", "liver_99"),
        ("frame_3", "frame_3"),
        ("modes", "modes"),
    ],
)
def test_patient_in_a_name(case, patient):
    assert patient_in_name(case) == patient


def test_names_are_read_aloud():
    said = []
    cases = ["p1_frame1", "p1_frame2", "p2_frame1"]
    with lines_to(said.append):
        assert find_patients(cases, None) == {"p1_frame1": "p1", "p1_frame2": "p1", "p2_frame1": "p2"}
    assert said == [
        "3 cases belong to 2 patients according to their names (p1_frame1 to p1); "
        "if this is wrong, list the patient of every case in a table and pass it as patients"
    ]
    said.clear()
    with lines_to(said.append):
        assert find_patients(["a_1", "a_2"], None) == {"a_1": "a_1", "a_2": "a_2"}
    assert said == []


def test_a_table_overrules_names(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("case,age,patient\np1_frame1,40,anna\np1_frame2,40,berta\nother,1,carla\n")
    assert find_patients(["p1_frame1", "p1_frame2"], table) == {"p1_frame1": "anna", "p1_frame2": "berta"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,patient\n", "lists no cases"),
        ("case,subject\na,b\n", "line 2: the columns 'case' and 'patient' must not be empty"),
        ("case,patient\na,b\na,c\n", "line 3: case a already has another patient"),
    ],
)
def test_wrong_tables(tmp_path, text, message):
    table = tmp_path / "patients.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_patients(table)
    assert str(table) in str(error.value)


def test_a_table_must_name_every_case(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\na,b\n")
    with pytest.raises(UserError, match=r"does not list c \(2 cases are missing\)"):
        find_patients(["a", "c", "d"], table)
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_patients(tmp_path / "no.csv")


def test_patients_that_are_set_aside_stay_together_and_do_not_depend_on_the_order():
    cases = [f"patient{number:03}_frame{frame:02}" for number in range(60) for frame in (1, 12)]
    aside = set_aside(cases)
    assert set_aside(cases[::-1]) == aside
    patients = {patient_in_name(case) for case in aside}
    assert len(patients) == 3  # a twentieth of 60
    assert set(aside) == {case for case in cases if patient_in_name(case) in patients}
    assert set_aside(cases[: 2 * (FEWEST_PATIENTS - 1)]) == ()
    many = [f"scan_of_{number}x" for number in range(2000)]
    assert len({patient_in_name(case) for case in set_aside(many)}) == MOST_ASIDE
