"""The table of labels: what is read from it, and one line for each mistake."""

import pytest

from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.case_labels import read_case_labels
from nnssl.log import lines_to


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_columns_in_any_order_and_patients_of_their_own(tmp_path):
    table = read_case_labels(write(tmp_path, "label, age,patient,case\nill,3,p1,a\n well ,4,p1,b \nill,5,p2,c\n"))
    assert table.cases == ("a", "b", "c")
    assert table.labels == ("ill", "well", "ill")
    assert table.patients == ("p1", "p1", "p2")
    assert table.classes == ("ill", "well")
    assert table.counts("ill") == (2, 2)
    assert table.counts("well") == (1, 1)


def test_patients_are_those_of_the_names_which_is_printed(tmp_path):
    said = []
    with lines_to(said.append):
        table = read_case_labels(write(tmp_path, "case,label\np1_frame01,0\np1_frame12,0\np2_frame01,1\n", "utf-8-sig"))
    assert table.patients == ("p1", "p1", "p2")
    assert "3 cases belong to 2 patients according to their names (p1_frame01 to p1)" in said[0]
    with lines_to(said.append):
        assert read_case_labels(write(tmp_path, "case,label\na,0\nb,1\n")).patients == ("a", "b")
    assert len(said) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns 'case' and 'label', separated by a comma, got none"),
        ("case;label\na;1\n", "must have the columns 'case' and 'label', separated by a comma, got case;label"),
        ("name,label\na,1\n", "got name, label"),
        ("case,label\n", "lists no cases"),
        ("case,label\na,1\nb,\n", "labels.csv, line 3: the column 'label' is empty"),
        ("case,label\na\n", "labels.csv, line 2: the column 'label' is empty"),
        ("case,label,patient\na,1,\n", "labels.csv, line 2: the column 'patient' is empty"),
        ("case,label\na,1\nb,1\na,1\n", "labels.csv, line 4: the case a is already listed"),
    ],
)
def test_mistakes_in_the_table(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read_case_labels(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a table of labels"):
        read_case_labels(tmp_path / "none.csv")
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(UserError, match="cannot be read as a table of labels"):
        read_case_labels(tmp_path / "labels.csv")


def test_classes_need_a_patient_for_every_fold(tmp_path):
    rows = ["case,label,patient", *(f"a{n},well,p{n}" for n in range(9)), *(f"b{n},ill,q{n // 2}" for n in range(8))]
    table = read_case_labels(write(tmp_path, "\n".join(rows)))
    table.check_folds(4)  # eight cases of four patients
    with pytest.raises(ArgumentError, match="folds must be at most 4, the number of patients with the label 'ill'"):
        table.check_folds(5)
    with pytest.raises(UserError, match="all cases have the label '1'"):
        read_case_labels(write(tmp_path, "case,label\na,1\nb,1\n")).check_folds(3)


def test_cases_must_be_preprocessed(tmp_path):
    table = read_case_labels(write(tmp_path, "case,label\na,1\nb,0\nz,0\n"))
    table.check_cases(["a", "b", "z", "more"], tmp_path)
    with pytest.raises(UserError, match="has no preprocessed case b, z; it has a, c"):
        table.check_cases(["a", "c"], tmp_path)
