"""``nnssl_evaluate`` on small written images: what it prints and writes, and its one-line errors."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.cli.evaluate import main

LABELS = {"background": 0, "liver": 1, "spleen": 2}


def write(path, shift=0, spacing=(0.8, 1.25, 3.0)):
    array = np.zeros((6, 12, 14), np.uint8)
    array[1:5, 2 + shift : 8 + shift, 3:9] = 1
    array[2:4, 8 + shift : 10 + shift, 9:13] = 2
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return array


@pytest.fixture
def folders(tmp_path):
    for name, shift in (("a", 1), ("b", 0)):
        write(tmp_path / "predictions" / f"{name}.nii.gz", shift)
        write(tmp_path / "references" / f"{name}.nii.gz")
    return tmp_path


def run(folder, *more):
    return main([str(folder / "predictions"), str(folder / "references"), "--processes", "1", *more])


def test_table_and_files(folders, capsys):
    (folder := folders / "predictions").joinpath("dataset.json").write_text(json.dumps({"labels": LABELS}))
    assert run(folders) == 0
    said = capsys.readouterr().out
    assert f"Labels: {folder / 'dataset.json'}" in said
    assert "evaluated 2 of 2 cases" in said  # no terminal, so lines instead of a bar
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["case"], row["class"]) for row in rows] == [
        ("a", "liver"),
        ("a", "spleen"),
        ("b", "liver"),
        ("b", "spleen"),
    ]
    assert float(rows[0]["dice"]) == pytest.approx(5 / 6)
    assert float(rows[1]["dice"]) == pytest.approx(1 / 2)
    assert [float(row["dice"]) for row in rows[2:]] == [1.0, 1.0]
    assert float(rows[0]["hd95_mm"]) == pytest.approx(1.25)
    assert float(rows[0]["volume_ml"]) == pytest.approx(4 * 6 * 6 * 3e-3)
    summary = json.loads((folder / "summary_nnssl.json").read_text())
    assert summary["classes"]["liver"]["dice"] == pytest.approx((5 / 6 + 1) / 2)
    assert summary["mean"]["dice"] == pytest.approx(((5 / 6 + 1) / 2 + 3 / 4) / 2)
    assert re.search(r"class +cases +Dice \(points\) +NSD \(points\) at 2 mm +HD95 mm", said)
    assert re.search(r"liver +2 +91\.7 +100\.0 ", said)
    assert re.search(r"mean +2 +83\.3 ", said)


def test_without_names_the_values_are_the_classes(folders, capsys):
    assert run(folders, "-o", str(folders / "out")) == 0
    assert "the classes are the values 1, 2" in capsys.readouterr().out
    assert {row["class"] for row in csv.DictReader((folders / "out" / "metrics.csv").open())} == {"1", "2"}
    assert not (folders / "predictions" / "metrics.csv").exists()


def test_a_label_file_overrules_and_a_stricter_tolerance_lowers_the_distance(folders, tmp_path):
    labels = tmp_path / "own.json"
    labels.write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2], "spleen": [2]}}))
    values = []
    for tolerance in ("0.5", "2"):
        assert run(folders, "--labels", str(labels), "--tolerance-mm", tolerance, "-o", str(tmp_path / "out")) == 0
        summary = json.loads((tmp_path / "out" / "summary_nnssl.json").read_text())
        values.append(summary["classes"]["whole"]["nsd"])
    assert values[0] < values[1] == pytest.approx(1.0)


def test_label_files_that_agree_are_one(folders, capsys):
    (folders / "predictions" / "dataset.json").write_text(json.dumps({"labels": LABELS, "name": "predicted"}))
    (folders / "dataset.json").write_text(json.dumps({"labels": dict(reversed(LABELS.items()))}))
    assert run(folders) == 0
    assert f"Labels: {folders / 'predictions' / 'dataset.json'}" in capsys.readouterr().out


def test_nnunets_own_summary_is_left_alone(folders):
    (folders / "predictions" / "summary.json").write_text("{}")
    assert run(folders) == 0
    assert run(folders) == 0  # what it wrote is no segmentation to the next run
    assert (folders / "predictions" / "summary.json").read_text() == "{}"


def write_image(folders):
    noise = np.random.default_rng(0).integers(0, 4000, (6, 12, 14)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(folders / "predictions" / "b.nii.gz"))


def write_background(folders):
    for path in folders.rglob("*.nii.gz"):
        sitk.WriteImage(sitk.Image(14, 12, 6, sitk.sitkUInt8), str(path))


def break_labels(folders):
    (folders / "predictions" / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    (folders / "dataset.json").write_text(json.dumps({"labels": {**LABELS, "kidney": 3}}))


@pytest.mark.parametrize(
    ("break_it", "more", "message"),
    [
        (lambda f: (f / "references" / "b.nii.gz").unlink(), (), "references: has no reference of b"),
        (lambda f: (f / "predictions" / "b.nii.gz").unlink(), (), "predictions: has no prediction of b"),
        (
            lambda f: write(f / "predictions" / "b.nii.gz", 0, (0.8, 1.25, 2.0)),
            (),
            "differs in spacing from its reference",
        ),
        (break_labels, (), "have different labels"),
        (lambda f: (f / "dataset.json").write_text("{}"), (), "dataset.json: has no 'labels'"),
        (
            lambda f: (f / "dataset.json").write_text('{"labels": {"liver": 1}}'),
            (),
            "contains the value 2, which is not a label",
        ),
        (
            lambda f: (f / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1.5}}'),
            (),
            'dataset.json: the label "liver" must have a whole number of at least 0 as its value, got 1.5',
        ),
        (lambda f: (f / "dataset.json").write_text('{"labels": {"background": 0}}'), (), "name no class but the"),
        (lambda f: None, ("--labels", "nowhere.json"), "nowhere.json: there is no such dataset.json"),
        (lambda f: None, ("--tolerance-mm", "0"), "--tolerance-mm must be above 0 and finite, got 0"),
        (lambda f: None, ("--tolerance-mm", "nan"), "--tolerance-mm must be above 0 and finite, got nan"),
        (lambda f: None, ("--output", "/dev/null/here"), "/dev/null/here: the folder is not writable"),
        (lambda f: shutil.rmtree(f / "references"), (), "references: this folder does not exist"),
        (write_image, (), "so these seem to be images"),
        (write_background, (), "contain background only; name the classes with --labels"),
        (lambda f: (f / "predictions" / "b.nii.gz").write_bytes(b"x"), (), "b.nii.gz has an unreadable header"),
    ],
)
def test_mistakes_end_in_one_line(folders, capsys, break_it, more, message):
    break_it(folders)
    assert run(folders, *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (folders / "predictions" / "metrics.csv").exists()
