import json
import locale
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data.case_error import CaseError
from nnssl.data.case_store import CaseStore
from nnssl.data.dicom_reader import DicomSeriesIO
from nnssl.data.dicom_series import DICOM_READER, SERIES_ENDING
from nnssl.data.patients import patient_in_name
from nnssl.data.preprocess import preprocess_dataset
from nnssl.data.raw import RawCase, read_dataset, read_header, read_volume
from nnssl.errors import UserError
from nnssl.imports.dataset import import_dataset
from nnssl.imports.dicom import MIN_SLICES, _drop_copies, find_series
from nnssl.imports.sources import Choices, Found
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from planners.fingerprint import digest_sources, extract_fingerprint
from planners.pretrain_planner import plan_pretraining
from tests.nnssl.data.dicom_files import ORIGIN, SPACING_XYZ, kept_locale, make_values, oblique_directions, write_series
from tests.nnssl.data.test_preprocess import make_phantom

CASE = "sub-Anna1_thorax-1.0-B30f_series-4"


def silent(line: str) -> None:
    """Say nothing."""


@pytest.fixture
def folders(nnunet_folders):
    return resolve_folders()


@pytest.fixture
def source(tmp_path):
    return tmp_path / "export"


def run(source, folders, **kwargs):
    choices = Choices(**{name: kwargs.pop(name) for name in list(kwargs) if name in Choices.__dataclass_fields__})
    return import_dataset(source, 501, "Scans", folders=folders, choices=choices, **kwargs)


def reasons_of(source, **choices):
    found = find_series(source, Choices(**choices))
    return [refusal.reason for refusal in found.refused], [candidate.name for candidate in found.candidates]


def test_an_oblique_series_in_shuffled_order_keeps_geometry_and_voxels(folders, source):
    values = make_values()
    files = write_series(source / "a", values)
    assert [file.name for file in files] != sorted(file.name for file in files)
    record = run(source, folders)
    dataset = read_dataset(501, folders)
    (case,) = dataset.cases
    assert (case.name, dataset.reader, dataset.channel_names) == (CASE, DICOM_READER, ("CT",))

    volume, spacing_mm = read_volume(case, dataset.reader)
    np.testing.assert_array_equal(volume[0], values)
    np.testing.assert_allclose(spacing_mm, SPACING_XYZ[::-1], atol=1e-4)
    header = read_header(case, dataset.reader)
    assert header[0] == values.shape == record.taken[0].shape
    np.testing.assert_allclose(header[1], SPACING_XYZ[::-1], atol=1e-4)
    np.testing.assert_allclose(record.taken[0].spacing_mm, SPACING_XYZ[::-1], atol=1e-4)
    assert header[2] == "LPS"

    geometry = DicomSeriesIO().read_images([str(case.images[0])])[1]["sitk_stuff"]
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source / "a"))
    assert list(names) == [str(file) for file in files]
    oracle = sitk.ReadImage(names)
    np.testing.assert_allclose(geometry["spacing"], oracle.GetSpacing(), atol=1e-4)
    np.testing.assert_allclose(geometry["origin"], oracle.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(geometry["origin"], ORIGIN, atol=1e-4)
    np.testing.assert_allclose(geometry["direction"], oracle.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(np.reshape(geometry["direction"], (3, 3)), oblique_directions(), atol=1e-6)


def test_reading_leaves_the_locale_alone(folders, source):
    write_series(source, make_values())
    before = locale.setlocale(locale.LC_ALL)
    run(source, folders)
    dataset = read_dataset(501, folders)
    read_volume(dataset.cases[0], dataset.reader)
    assert locale.setlocale(locale.LC_ALL) == before


def test_a_sagittal_series_is_oriented_as_simpleitk_says(folders, source):
    directions = np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]])  # x along P, y along I, z along R
    write_series(source, make_values((6, 9, 11)), directions=directions)
    run(source, folders)
    dataset = read_dataset(501, folders)
    oracle = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source)))
    expected = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(oracle.GetDirection())
    assert read_header(dataset.cases[0], dataset.reader)[2] == expected == "PIR"


def test_each_slice_keeps_its_own_rescale_values(folders, source):
    """The first slope is a whole number, the second is not: voxels must not be cut to the type of the first."""
    stored = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    files = write_series(source, stored, modality="PT")
    for k, file in enumerate(files):
        image = sitk.ReadImage(str(file))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(file))
        for key, text in (
            ("0028|1053", str(1 + 0.25 * k)),
            ("0028|1052", "0"),
            ("0008|0016", image.GetMetaData("0008|0016")),
        ):
            image.SetMetaData(key, text)
        # GDCM divides by the slope when it writes, so the voxels that are handed over are the rescaled ones
        rescaled = sitk.Cast(image, sitk.sitkFloat64) * (1 + 0.25 * k)
        for key in image.GetMetaDataKeys():
            rescaled.SetMetaData(key, image.GetMetaData(key))
        with kept_locale():
            writer.Execute(rescaled)
    run(source, folders)
    dataset = read_dataset(501, folders)
    volume, _ = read_volume(dataset.cases[0], dataset.reader)
    oracle = [sitk.GetArrayFromImage(sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkFloat64))[0] for file in files]
    assert np.unique(np.stack(oracle) % 1).size > 1
    np.testing.assert_allclose(volume[0], np.stack(oracle), rtol=1e-6)


def test_dicom_goes_through_fingerprint_plan_and_preprocessing(folders, source):
    for number in range(3):
        values = make_phantom((9 + number, 25, 31), number)[0].astype(np.int16)
        write_series(source / str(number), values, uid=f"1.2.{number}", patient=f"P{number}", modality="MR")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    run(source, folders)
    dataset = read_dataset(501, folders)
    assert sum(path.stat().st_size for path in dataset.folder.rglob("*") if path.is_file()) < 30_000  # no voxels
    fingerprint = extract_fingerprint(dataset, 0)
    assert [case.shape for case in fingerprint.cases] == [(9, 25, 31), (10, 25, 31), (11, 25, 31)]
    assert fingerprint.set_aside == ()
    assert fingerprint.modalities == ("MRI",)
    plan = plan_pretraining(dataset, fingerprint, folders, "cpu")
    assert plan.nnunet["image_reader_writer"] == "SimpleITKIO"  # what stock nnU-Net knows
    report = preprocess_dataset(dataset, plan, fingerprint.usable, folders, ["3d_fullres"], 1, None)
    assert (report.done, report.set_aside) == (3, ())
    assert set(CaseStore(report.folders[0]).names) == {f"sub-P{number}_thorax-1.0-B30f_series-4" for number in range(3)}
    again = preprocess_dataset(dataset, plan, fingerprint.usable, folders, ["3d_fullres"], 1, None)
    assert (again.done, again.skipped) == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def make_missing(folder):
    write_series(folder, make_values())[3].unlink()


def make_short(folder):
    write_series(folder, make_values((MIN_SLICES - 1, 20, 15)))


def make_localizer(folder):
    write_series(folder, make_values(), tags={"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})


def make_planes(folder):
    write_series(folder, make_values((3, 20, 15)))
    coronal = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    names = [f"c{k}" for k in range(3)]
    write_series(folder, make_values((3, 20, 15)), directions=coronal, names=names, tags_of_slice=own_uid)


def own_uid(k):
    return {"0008|0018": f"9.9.{k}"}


def make_time_points(folder):
    write_series(folder, make_values())
    write_series(folder, make_values(seed=1), names=[f"t{k}" for k in range(7)], tags_of_slice=own_uid)


def make_tilt(folder):
    step = np.array([0.0, 0.4, 3.3])
    write_series(folder, make_values(), directions=np.eye(3), positions=[k * step for k in range(7)])


def make_uneven(folder):
    places = [0, 3.3, 6.6, 9.9, 13.2, 16.5, 20.3]
    write_series(folder, make_values(), directions=np.eye(3), positions=[np.array([0, 0, z]) for z in places])


def make_aside(folder):
    positions = [np.array([0.5 * (k == 3), 0, 3.3 * k]) for k in range(7)]
    write_series(folder, make_values(), directions=np.eye(3), positions=positions)


def make_secondary_capture(folder):
    write_series(folder, make_values(), tags={"0008|0016": "1.2.840.10008.5.1.4.1.1.7"})


def make_sizes(folder):
    write_series(folder, make_values((4, 20, 15)))
    positions = [np.array([0, 0, 100.0 + k]) for k in range(4)]
    names = [f"s{k}" for k in range(4)]
    write_series(folder, make_values((4, 22, 15)), positions=positions, names=names, tags_of_slice=own_uid)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_missing, r"1 slice\(s\) missing: 6\.60 mm between .* usually 3\.30 mm"),
        (make_short, "has 4 slice.s., fewer than the minimum of 5"),
        (make_localizer, "is a localizer"),
        (make_planes, "slices with different orientations"),
        (make_time_points, "several slices at one position"),
        (make_tilt, r"gantry tilt of 6\.9 degrees"),
        (make_uneven, r"unequal distances: 3\.80 mm"),
        (make_aside, r"a slice 0\.50 mm off the grid of the others"),
        (make_secondary_capture, "is a secondary capture"),
        (make_sizes, "slices of different sizes"),
    ],
)
def test_what_makes_no_volume_is_refused_with_the_reason(folders, source, make, reason):
    make(source / "bad")
    refused, taken = reasons_of(source)
    assert taken == []
    assert len({text for text in refused}) == 1
    with pytest.raises(UserError, match="no image can be imported") as error:
        run(source, folders)
    assert "\n" not in str(error.value)
    assert re.search(reason, refused[0])
    assert not (folders.raw / "Dataset501_Scans").exists()
    write_series(source / "good", make_values(), uid="7.7", patient="Bert")
    record = run(source, folders)
    assert [case.case for case in record.taken] == ["sub-Bert_thorax-1.0-B30f_series-4"]
    assert {refusal.reason for refusal in record.refused} == set(refused)


def test_a_truncated_slice_and_a_text_file_are_refused(source):
    files = write_series(source, make_values())
    (source / "notes.dcm").write_text("no DICOM at all, but called so" * 20)
    (source / "readme.md").write_text("passed over")
    content = files[6].read_bytes()
    files[6].write_bytes(content[:-300])
    found = find_series(source, Choices())
    assert sorted(refusal.file for refusal in found.refused) == sorted([str(files[6]), str(source / "notes.dcm")])
    assert all("cannot be read as a DICOM image" in refusal.reason for refusal in found.refused)
    assert found.passed_over == {".md": 1}
    assert [len(candidate.series.slices) for candidate in found.candidates] == [
        6
    ]  # the last slice; a middle one is a gap


def test_series_of_equal_names_are_two_cases_of_one_patient(folders, source):
    for number in range(2):
        write_series(source / str(number), make_values(seed=number), uid=f"5.{number}")
    record = run(source, folders)
    names = [case.case for case in record.taken]
    assert names == [CASE, f"{CASE}_scan-2"]
    assert {patient_in_name(name) for name in names} == {"sub-Anna1"}
    dataset = read_dataset(501, folders)
    volumes = [read_volume(case, dataset.reader)[0][0] for case in dataset.cases]
    np.testing.assert_array_equal(volumes[0], make_values(seed=0))
    np.testing.assert_array_equal(volumes[1], make_values(seed=1))


def test_patients_are_told_apart(source):
    write_series(source / "x", make_values(), uid="1.1", patient="A-1")
    write_series(source / "y", make_values(), uid="1.2", patient="A 1")
    write_series(source / "z", make_values(), uid="1.3", patient="")
    write_series(source / "z", make_values(), uid="1.4", patient="", study="1.9", names=list("abcdefg"))
    _, names = reasons_of(source)
    patients = [patient_in_name(name) for name in names]
    assert len(set(patients[:2])) == 2
    assert patients[2] == patients[3] == "sub-z"
    assert "_ses-20240131_" in names[2]


def test_a_series_copied_into_a_second_folder_and_one_split_over_two(source):
    files = write_series(source / "a", make_values())
    shutil.copytree(source / "a", source / "copy")
    (source / "b").mkdir()
    for file in files[::2]:
        file.rename(source / "b" / file.name)
    found = find_series(source, Choices())
    assert len(found.candidates) == 1
    assert len(found.candidates[0].series.slices) == 7
    assert sum("same slice" in refusal.reason for refusal in found.refused) == 7


def test_a_description_in_another_character_set(folders, source):
    for file in write_series(source, make_values(), description="Schaedel"):
        file.write_bytes(file.read_bytes().replace(b"Schaedel", b"Sch\xe4del "))
    record = run(source, folders)
    assert [case.case for case in record.taken] == ["sub-Anna1_Schadel_series-4"]
    assert read_dataset(501, folders).cases[0].name == "sub-Anna1_Schadel_series-4"
    assert import_again(source, folders)


def import_again(source, folders) -> bool:
    said = []
    with lines_to(said.append):
        import_dataset(source, 501, "Scans", folders=folders)
    return "nothing to do" in said[-1]


def test_the_same_import_again_sees_the_slices(folders, source):
    files = write_series(source, make_values())
    run(source, folders)
    assert import_again(source, folders)
    files[2].rename(source / "renamed")
    with pytest.raises(UserError, match="use restart to replace it"):
        run(source, folders)
    run(source, folders, restart=True)
    assert import_again(source, folders)
    dataset = read_dataset(501, folders)
    np.testing.assert_array_equal(read_volume(dataset.cases[0], dataset.reader)[0][0], make_values())


def test_slices_without_an_identifier_are_no_copies():
    headers = [SimpleNamespace(instance_uid="", file=Path(str(k))) for k in range(3)]
    found = Found()
    assert _drop_copies(headers, found) == headers
    assert found.refused == []


def test_modalities_are_chosen(folders, source):
    write_series(source / "ct", make_values(), uid="1.1")
    write_series(source / "mr", make_values(seed=1), uid="1.2", modality="MR", description="t2 tse")
    with pytest.raises(UserError, match=r"CT \(1\), MR \(1\); choose with modalities"):
        run(source, folders)
    with pytest.raises(UserError, match=r"modalities must be .* \(CT \(1\), MR \(1\)\), got PT"):
        run(source, folders, modalities=("PT",))
    with pytest.raises(UserError, match="cannot be channels"):
        run(source, folders, modalities=("CT", "MR"))
    record = run(source, folders, modalities=("MR",))
    assert (record.channel_names, [case.case for case in record.taken]) == (("MRI",), ["sub-Anna1_t2-tse_series-4"])
    assert "whose modality CT was not chosen" in record.refused[0].reason
    record = run(source, folders, mixed=True, restart=True)
    assert (record.channel_names, len(record.taken)) == (("mixed",), 2)
    record = run(source, folders, mixed=True, pattern="t2*", restart=True)
    assert (record.channel_names, len(record.taken)) == (("MRI",), 1)


def test_a_change_of_the_slices_is_noticed(folders, source):
    files = write_series(source, make_values())
    run(source, folders)
    dataset = read_dataset(501, folders)
    digest = digest_sources(dataset)
    assert digest_sources(dataset) == digest
    os.utime(files[2], ns=(1, files[2].stat().st_mtime_ns + 10**9))
    assert digest_sources(dataset) != digest  # so the data set is measured again
    with open(files[2], "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(CaseError, match=r"has \d+ bytes, but had \d+ when it was imported"):
        read_volume(dataset.cases[0], dataset.reader)
    files[2].unlink()
    with pytest.raises(CaseError, match="is a slice of the series and cannot be found"):
        read_header(dataset.cases[0], dataset.reader)
    with pytest.raises(UserError, match="is a slice of the series and cannot be found"):
        extract_fingerprint(dataset, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 99}, "schema_version must be 1, got 99"),
        ({"slices": []}, "fewer than two slices"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_damaged_series_file_is_named(folders, source, change, reason):
    write_series(source, make_values())
    run(source, folders)
    path = folders.raw / "Dataset501_Scans" / "imagesTr" / f"{CASE}_0000{SERIES_ENDING}"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CaseError, match=reason) as error:
        read_volume(RawCase("a", (path,)), DICOM_READER)
    assert error.value.file == str(path)
