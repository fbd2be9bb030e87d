"""Every file that carries a ``schema_version`` is rejected if its version is not the one that this nnssl reads."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint, plan, schema
from nnssl.data import case_store, dicom_series, label_files
from nnssl.data.case_error import CaseError
from nnssl.errors import UserError
from nnssl.evaluation import classification
from nnssl.imports import record
from nnssl.imports.sources import Choices
from nnssl.matching import anatomical_sanity
from nnssl.propagation import record as drafts
from nnssl.weights import download
from planners import fingerprint
from tests.nnssl.matching.test_anatomical_sanity import GOOD
from tests.nnssl.test_checkpoint import make_provenance
from tests.nnssl.test_plan import NNUNET, make_pretext
from trainers.benchmark import cell_times
from trainers.finetuning import result
from trainers.finetuning.schedule import FinetuneSchedule
from trainers.pretraining import auto_record

ROOT = Path(__file__).parent.parent

CASE = case_store.CaseProperties(case_store.SCHEMA_VERSION, (2, 3, 4), 1, (3.0, 1.0, 1.5), (), "digest", 0.5, 1.0, None)
SERIES = dicom_series.DicomSeries(
    dicom_series.SCHEMA_VERSION,
    "1.2",
    "CT",
    "",
    "/scans",
    (dicom_series.Slice("a.dcm", 1), dicom_series.Slice("b.dcm", 1)),
)
RECORD = record.ImportRecord(
    record.SCHEMA_VERSION, "0", "Dataset501_A", "/scans", "folder", Choices(), ("CT",), (), (), {}
)
SANITY = anatomical_sanity.Sanity(**GOOD, usable=True, reasons=())
FINGERPRINT = fingerprint.Fingerprint(
    fingerprint.SCHEMA_VERSION, "Dataset501_A", "digest", ("CT",), ("CT",), (), (), (), {}
)
RESULT = result.ArmResult(
    schema_version=result.SCHEMA_VERSION,
    nnssl_version="0",
    mode="finetune",
    arm="scratch",
    dataset_name="Dataset501_A",
    plans_name="nnsslPlans",
    configuration="2d",
    weights=None,
    weights_digest=None,
    schedule=FinetuneSchedule(10, 5, "warmup", 5, 0, 0.01, 0.01, None, "sgd"),
    seed=0,
    fold=None,
    train_cases=("a",),
    test_cases=("b",),
    validation_cases=(),
    unlabelled_cases=(),
    mirroring=True,
    num_parameters=1,
    dice={"liver": 0.5},
    mean_dice=0.5,
    model_folder="/model",
    predict_command="nnUNetv2_predict",
)
ESTIMATE = classification.Estimate(0.75, 0.5, 1.0)
COMPARISON = classification.Comparison(ESTIMATE, ESTIMATE, ESTIMATE)
CLASSIFICATION = classification.Classification(
    schema_version=classification.SCHEMA_VERSION,
    nnssl_version="0",
    checkpoint="/a.pth",
    weights_digest="0",
    stage="pix2rep.dense",
    configuration="2d",
    dataset_name="Dataset501_A",
    labels="/labels.csv",
    cases=6,
    patients=6,
    cases_seen=0,
    classes=(classification.ClassResult("a", 3, 3, None), classification.ClassResult("b", 3, 3, COMPARISON)),
    auc=COMPARISON,
    patch_vox=(8, 8),
    patches=4,
    encoder_stages=(1, 2),
    features=12,
    folds=3,
    repeats=5,
    seed=0,
)
AUTO = auto_record.AutoRecord(
    auto_record.SCHEMA_VERSION,
    "0",
    "Dataset501_A",
    "nnsslPlans",
    "2d",
    auto_record.Asked(30.0, ("mae", "simclr"), 0, (), None, None, "digest"),
    {},
    (auto_record.Candidate("mae"), auto_record.Candidate("simclr")),
)
DRAFTS = drafts.PropagationRecord(
    drafts.SCHEMA_VERSION, "Dataset501_A", "/a.pth", "0", {"a": "0"}, (0, 1), "pyramid", 16, 0.1, 0.0, 0
)
DOWNLOAD = download.Download(download.SCHEMA_VERSION, "https://a/b.pth", None, None)
LABELS = label_files.CheckedLabels(
    label_files.SCHEMA_VERSION, "SimpleITKIO", {"a": label_files.CheckedLabel(((1, 2, 3),), 1, (0, 1), ())}
)
TIMES = cell_times.CellTimes(cell_times.SCHEMA_VERSION, 0.5, 30.0)


def write_plan(path: Path, version: int) -> None:
    path.write_text(json.dumps({**NNUNET, "pretext": asdict(make_pretext()) | {"schema_version": version}}))


def write_checkpoint(path: Path, version: int) -> None:
    section = {"schema_version": version, "provenance": asdict(make_provenance()), "state": {}}
    torch.save({"network_weights": {}, "nnssl": section}, path)


def writer(content):
    return lambda path, version: schema.write(path, replace(content, schema_version=version))


FILES = {
    "CaseProperties": (writer(CASE), lambda path: case_store.read_properties(path.parent, path.stem), 2),
    "DicomSeries": (writer(SERIES), dicom_series.read_series, 1),
    "ImportRecord": (writer(RECORD), lambda path: schema.read(record.ImportRecord, path, "record"), 1),
    "Sanity": (writer(SANITY), lambda path: schema.read(anatomical_sanity.Sanity, path, "examination"), 3),
    "Fingerprint": (writer(FINGERPRINT), lambda path: schema.read(fingerprint.Fingerprint, path, "fingerprint"), 1),
    "ArmResult": (writer(RESULT), result.read_result, 3),
    "Classification": (writer(CLASSIFICATION), classification.read_classification, 1),
    "PropagationRecord": (writer(DRAFTS), lambda path: schema.read(drafts.PropagationRecord, path, "record"), 1),
    "CheckedLabels": (writer(LABELS), lambda path: schema.read(label_files.CheckedLabels, path, "labels"), 1),
    "CellTimes": (writer(TIMES), lambda path: schema.read(cell_times.CellTimes, path, "duration"), 1),
    "Download": (writer(DOWNLOAD), download.read_record, 1),
    "AutoRecord": (writer(AUTO), auto_record.read_record, 1),
    "Pretext": (write_plan, plan.read_plan, 8),
    "checkpoint": (write_checkpoint, checkpoint.read_checkpoint, 2),
}
"""Name of the dataclass: a function that writes a file of a version, the reader, and the version that it accepts."""


@pytest.mark.parametrize("wrong", [99, 0])
@pytest.mark.parametrize("kind", FILES)
def test_only_the_current_version_is_read(kind, wrong, tmp_path):
    write, read, current = FILES[kind]
    path = tmp_path / "file.json"
    write(path, current)
    read(path)
    write(path, wrong)
    with pytest.raises((UserError, CaseError)) as error:
        read(path)
    assert str(path) in str(error.value)
    assert f"schema_version must be {current}, got {wrong}; " in str(error.value)
    assert "\n" not in str(error.value)


def test_every_dataclass_with_a_version_is_tested_here():
    found = set()
    for package in ("nnssl", "planners", "trainers"):
        for path in (ROOT / package).rglob("*.py"):
            for body in re.split(r"^class ", path.read_text(), flags=re.MULTILINE)[1:]:
                if re.search(r"^    schema_version: ", body, flags=re.MULTILINE):
                    found.add(re.split(r"\W", body)[0])
    assert found == set(FILES) - {"checkpoint"}
