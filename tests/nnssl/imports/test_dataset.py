import gzip
import json
import os
import sys

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.cli.import_data import KIND_NAMES, main, make_parser
from nnssl.data.case_error import CaseError
from nnssl.data.dicom_series import stock_reader
from nnssl.data.patients import patient_in_name
from nnssl.data.raw import UNKNOWN_CHANNEL, read_dataset, read_header, read_volume
from nnssl.data.whole_files import check_whole
from nnssl.errors import ArgumentError, UserError
from nnssl.imports.case_names import clean_name, common_stem, name_by_path, number_equal_names, subject_labels
from nnssl.imports.dataset import FINDERS, import_dataset
from nnssl.imports.dicom import MIN_SLICES
from nnssl.imports.record import ImportRecord, format_import
from nnssl.imports.sources import KINDS, KNOWN_CHOICES, Choices, detect_kind
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from nnssl.schema import read
from planners.fingerprint import extract_fingerprint
from tests.nnssl.data.dicom_files import make_values, oblique_directions, write_series

SPACING_XYZ = (0.5, 1.25, 4.0)


def silent(line: str) -> None:
    """Say nothing."""


def write_image(path, seed=0, shape=(5, 7, 11), spacing=SPACING_XYZ, directions=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 250, shape).astype(np.int16), isVector=False)
    image.SetSpacing(spacing[: image.GetDimension()] + (1.0,) * (image.GetDimension() - 3))
    if directions is not None:
        image.SetDirection(np.ravel(directions).tolist())
    sitk.WriteImage(image, str(path), True)
    return path


@pytest.fixture
def folders(nnunet_folders):
    return resolve_folders()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    return folder


def run(source, folders, **kwargs):
    choices = Choices(**{name: kwargs.pop(name) for name in list(kwargs) if name in Choices.__dataclass_fields__})
    with lines_to(kwargs.pop("say", silent)):
        return import_dataset(source, 501, "Scans", folders=folders, choices=choices, **kwargs)


def cases_of(record):
    return [case.case for case in record.taken]


def refusals_of(record, source):
    return {os.path.relpath(refusal.file, source): refusal.reason for refusal in record.refused}


# folders


def test_a_folder_of_several_formats_is_read_as_simpleitk_reads_it(folders, source):
    endings = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
    for number, ending in enumerate(endings):
        directions = None if ending == ".gipl" else oblique_directions()  # GIPL keeps none
        write_image(source / f"scan {number}ü{ending}", number, directions=directions)
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    said = []
    record = run(source, folders, say=said.append)
    assert said[0] == f"{source}: a folder of image files"
    assert cases_of(record) == [f"scan-{number}u" for number in range(5)]
    assert record.refused == ()
    dataset = read_dataset(501, folders)
    assert dataset.reader == "SimpleITKIO"
    assert dataset.channel_names == (UNKNOWN_CHANNEL,)
    for case, taken, ending in zip(dataset.cases, record.taken, endings, strict=True):
        oracle = sitk.ReadImage(str(source / f"scan {case.name[5]}ü{ending}"))
        volume, spacing_mm = read_volume(case, dataset.reader)
        np.testing.assert_array_equal(volume[0], sitk.GetArrayFromImage(oracle))
        np.testing.assert_allclose(spacing_mm, oracle.GetSpacing()[::-1], atol=1e-4)
        np.testing.assert_allclose(taken.spacing_mm, oracle.GetSpacing()[::-1], atol=1e-4)
        assert taken.shape == volume.shape[1:]
        expected = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(oracle.GetDirection())
        assert read_header(case, dataset.reader)[2] == expected
    assert len(extract_fingerprint(dataset, 0).cases) == 5
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before
    assert sorted(path.name for path in dataset.folder.rglob("*")) == ["dataset.json", "imagesTr", "import.json"]


def test_files_of_equal_names_get_more_of_their_path_and_say_the_patient(folders, source):
    for patient in ("anna", "bert"):
        write_image(source / patient / "ct" / "scan1.nii.gz")
    write_image(source / "carl" / "ct" / "scan7.nii.gz")
    record = run(source, folders, channels=("CT",))
    assert cases_of(record) == ["anna_ct_scan1", "bert_ct_scan1", "carl_ct_scan7"]
    assert record.channel_names == ("CT",)
    assert patient_in_name("anna_scan1") == "anna"


def test_channels_are_chosen_by_suffix(folders, source):
    for name in ("anna_t1", "anna_t2", "anna_t1ce", "bert_t1", "bert_t1ce", "carl_x"):
        write_image(source / f"{name}.nii.gz", len(name))
    for name in ("t1", "t2", "t1ce"):
        write_image(source / "dora" / f"_{name}.nii.gz")
    record = run(source, folders, channels=("T1=_t1", "T1CE=_t1ce", "T2=_t2"))
    assert cases_of(record) == ["anna", "dora"]
    assert [os.path.basename(image) for image in record.taken[0].images] == [
        "anna_t1.nii.gz",
        "anna_t1ce.nii.gz",
        "anna_t2.nii.gz",
    ]
    assert refusals_of(record, source) == {
        "bert_t1.nii.gz": "belongs to a case without T2 (_t2)",
        "carl_x.nii.gz": "has a name that ends in none of _t1 _t1ce _t2",
    }
    for name in ("emil_post_t1", "emil_t1"):
        write_image(source / f"{name}.nii.gz")
    assert "emil" in cases_of(run(source, folders, channels=("T1=_t1", "POST=_post_t1"), restart=True))
    run(source, folders, channels=("T1=_t1", "T1CE=_t1ce", "T2=_t2"), restart=True)
    dataset = read_dataset(501, folders)
    assert dataset.channel_names == ("T1", "T1CE", "T2")
    assert read_volume(dataset.cases[0], dataset.reader)[0].shape == (3, 5, 7, 11)


def test_names_of_nnunet_are_channels_and_labels_are_left_out(folders, source):
    for case in ("b_2019", "a_2020"):
        for channel in range(2):
            write_image(source / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        write_image(source / "labelsTr" / f"{case}.nii.gz")
    write_image(source / "imagesTr" / "c_0000.nii.gz")
    record = run(source, folders)
    assert cases_of(record) == ["a_2020", "b_2019"]
    assert [len(case.images) for case in record.taken] == [2, 2]
    reasons = refusals_of(record, source)
    assert reasons.pop("imagesTr/c_0000.nii.gz") == f"belongs to a case without {UNKNOWN_CHANNEL} (_0001)"
    assert set(reasons) == {"labelsTr/a_2020.nii.gz", "labelsTr/b_2019.nii.gz"}
    assert all("segmentation according to its name" in reason for reason in reasons.values())


def test_a_year_is_no_channel_and_a_pattern_chooses(folders, source):
    for name in ("scan_2019", "scan_2020", "scan_2019_mask"):
        write_image(source / f"{name}.nrrd")
    record = run(source, folders)
    assert cases_of(record) == ["scan_2019", "scan_2020"]
    record = run(source, folders, pattern="*_2019*", restart=True)
    assert cases_of(record) == ["scan_2019", "scan_2019_mask"]
    assert refusals_of(record, source) == {"scan_2020.nrrd": "does not match the pattern *_2019*"}


def test_unusable_files_are_refused_with_the_reason(folders, source):
    write_image(source / "good.nii.gz")
    cut = write_image(source / "cut.nii.gz", 1, shape=(20, 30, 40))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    unpacked = gzip.decompress((source / "good.nii.gz").read_bytes())
    (source / "short.nii").write_bytes(unpacked[:-10])
    (source / "letter.nii.gz").write_text("dear doctor, this is no image\n" * 50)
    (source / "empty.nii.gz").write_bytes(b"")
    write_image(source / "series.nii.gz", shape=(3, 5, 7, 11))
    write_image(source / "pair.mhd")
    (source / "gone.nii.gz").symlink_to(source / ".git" / "annex")
    (source / "table.csv").write_text("a,b")
    (source / ".hidden.nii.gz").write_text("a Mac's shadow")
    record = run(source, folders)
    assert cases_of(record) == ["good"]
    reasons = refusals_of(record, source)
    expected = {
        "cut.nii.gz": "truncated",
        "short.nii": "truncated (has 1112 of 1122 bytes)",
        "letter.nii.gz": "unreadable header",
        "empty.nii.gz": "unreadable header",
        "series.nii.gz": "has 3 volume(s), but 1 per file are expected",
        "pair.mhd": "ends in .mhd, which nnU-Net's readers do not support",
        "gone.nii.gz": "git-annex",
    }
    assert set(reasons) == set(expected)
    for file, text in expected.items():
        assert text in reasons[file], file
    assert record.passed_over == {".csv": 1, ".zraw": 1}
    stored = read(ImportRecord, folders.raw / "Dataset501_Scans" / "import.json", "record")
    assert stored == record
    table = "\n".join(format_import(record))
    assert all(refusal.reason in table and refusal.file in table for refusal in record.refused)
    assert "imported: 1 cases of 1 channel(s)" in table
    assert "5 x 7 x 11 voxels of 4 x 1.25 x 0.5 mm" in table
    assert "  and for 5 more reasons, all listed in import.json" in format_import(record, shown=2)


def test_the_table_counts_refusals_by_reason(folders, source):
    write_image(source / "a.mha")
    (source / "z.mha").write_text("no image")
    for number in range(5):
        write_image(source / f"a{number}_seg.mha")
    lines = format_import(run(source, folders))
    start = lines.index("rejected: 6")
    assert lines[start + 1].startswith("  5 x is a segmentation according to its name")
    assert lines[start + 2] == f"      {source}/a0_seg.mha"
    assert lines[start + 5] == "      and 2 more"
    assert lines[start + 6].startswith("  1 x has an unreadable header")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_refused(folders, source):
    write_image(source / "a.nii.gz")
    write_image(source / "b.nii.gz").rename(os.fsdecode(os.fsencode(source / "sch") + b"\xe4del.nii.gz"))
    record = run(source, folders)
    assert cases_of(record) == ["a"]
    assert record.refused[0].file.endswith(r"sch\xe4del.nii.gz")
    assert "not UTF-8" in record.refused[0].reason
    json.dumps(record.refused[0].file, ensure_ascii=False).encode("utf-8")


def test_four_axes_are_channels_when_they_are_named(folders, source):
    write_image(source / "a.nii.gz", shape=(3, 5, 7, 11))
    write_image(source / "b.nii.gz")
    record = run(source, folders, channels=("T1", "T2", "FLAIR"))
    assert cases_of(record) == ["a"]
    assert "has 1 volume(s), but 3 per file are expected" in record.refused[0].reason
    dataset = read_dataset(501, folders)
    assert read_volume(dataset.cases[0], dataset.reader)[0].shape == (3, 5, 7, 11)


def test_channels_of_other_grids_are_refused(folders, source):
    for name, shape, spacing in (
        ("a", (5, 7, 11), SPACING_XYZ),
        ("b", (5, 7, 12), SPACING_XYZ),
        ("c", (5, 7, 11), (1, 1, 4)),
    ):
        write_image(source / f"{name}_x.mha")
        write_image(source / f"{name}_y.mha", shape=shape, spacing=tuple(map(float, spacing)))
    record = run(source, folders, channels=("X=_x", "Y=_y"))
    assert cases_of(record) == ["a"]
    assert [os.path.basename(refusal.file) for refusal in record.refused] == ["b_y.mha", "c_y.mha"]


def test_a_trusted_length_finds_what_is_cut_without_decompressing(tmp_path, monkeypatch):
    whole = write_image(tmp_path / "a.nii.gz")
    content = whole.read_bytes()
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(content[:-20])
    two_members = tmp_path / "two.nii.gz"
    unpacked = gzip.decompress(content)
    two_members.write_bytes(gzip.compress(unpacked[:500]) + gzip.compress(unpacked[500:]))
    with pytest.raises(CaseError, match="truncated"):
        check_whole(cut, trust_length=True)
    check_whole(two_members, trust_length=True)  # says another length at its end, so it is decompressed
    monkeypatch.setattr("nnssl.data.whole_files.unpacked_bytes", lambda file: pytest.fail("decompressed"))
    check_whole(whole, trust_length=True)


# BIDS


def make_bids(source):
    (source / "dataset_description.json").write_text("{}")
    for subject, sessions in (("01", ("ses-a", "ses-b")), ("02", ("",))):
        for session in sessions:
            folder = source / f"sub-{subject}" / session / "anat"
            for seed, suffix in enumerate(("T1w", "T2w")):
                if (subject, suffix) != ("02", "T2w"):
                    name = "_".join(part for part in (f"sub-{subject}", session, suffix) if part)
                    write_image(folder / f"{name}.nii.gz", seed, directions=oblique_directions())
                    (folder / f"{name}.json").write_text("{}")
    write_image(source / "derivatives" / "sub-01" / "anat" / "sub-01_desc-preproc_T1w.nii.gz")
    write_image(source / "sub-02" / "func" / "sub-02_task-rest_bold.nii.gz", shape=(4, 5, 7, 11))


def test_a_bids_tree_with_two_sessions_keeps_its_geometry(folders, source):
    make_bids(source)
    said = []
    record = run(source, folders, say=said.append, modalities=("T1w",))
    assert said[0] == f"{source}: a BIDS tree"
    assert cases_of(record) == ["sub-01_ses-a_T1w", "sub-01_ses-b_T1w", "sub-02_T1w"]
    assert {patient_in_name(case) for case in cases_of(record)} == {"sub-01", "sub-02"}
    assert record.channel_names == ("T1w",)
    assert record.passed_over == {"folder derivatives": 1, ".json": 6}
    assert not any("derivatives" in refusal.file for refusal in record.refused)
    dataset = read_dataset(501, folders)
    for case, taken in zip(dataset.cases, record.taken, strict=True):
        oracle = sitk.ReadImage(str(case.images[0]))
        np.testing.assert_allclose(oracle.GetDirection(), oblique_directions().ravel(), atol=1e-5)
        volume, spacing_mm = read_volume(case, dataset.reader)
        shape, header_mm, orientation = read_header(case, dataset.reader)
        np.testing.assert_array_equal(volume[0], sitk.GetArrayFromImage(oracle))
        for found in (spacing_mm, header_mm, taken.spacing_mm):
            np.testing.assert_allclose(found, oracle.GetSpacing()[::-1], atol=1e-4)
            np.testing.assert_allclose(found, SPACING_XYZ[::-1], atol=1e-4)
        assert shape == taken.shape == (5, 7, 11)
        assert orientation == "LPS"


def test_bids_suffixes_are_chosen(folders, source):
    make_bids(source)
    with pytest.raises(UserError, match=r"T1w \(3\), T2w \(2\), bold \(1\); choose with modalities"):
        run(source, folders)
    with pytest.raises(UserError, match=r"modalities must be among .* got FLAIR"):
        run(source, folders, modalities=("FLAIR",))
    record = run(source, folders, modalities=("T2w", "T1w"))
    assert record.channel_names == ("T2w", "T1w")
    assert cases_of(record) == ["sub-01_ses-a", "sub-01_ses-b"]
    assert [os.path.basename(image) for image in record.taken[0].images] == [
        "sub-01_ses-a_T2w.nii.gz",
        "sub-01_ses-a_T1w.nii.gz",
    ]
    reasons = refusals_of(record, source)
    assert reasons["sub-02/anat/sub-02_T1w.nii.gz"] == "belongs to a case without T2w (_T2w)"
    assert reasons["sub-02/func/sub-02_task-rest_bold.nii.gz"] == "has the suffix bold, which was not chosen"
    record = run(source, folders, mixed=True, restart=True)
    assert (record.channel_names, len(record.taken)) == (("mixed",), 5)
    assert "has 4 volume(s), but 1 per file" in refusals_of(record, source)["sub-02/func/sub-02_task-rest_bold.nii.gz"]
    dataset = read_dataset(501, folders)
    fingerprint = extract_fingerprint(dataset, 0)
    assert (len(fingerprint.cases), len(fingerprint.duplicates)) == (
        2,
        3,
    )  # T1w and T2w were written with one seed each


# lists


def test_a_list_takes_absolute_and_relative_paths_and_columns(folders, source, monkeypatch):
    for name in ("anna_t1", "anna_t2", "bert,x_t1", "bert,x_t2", "carl_t1"):
        write_image(source / "images" / f"{name}.nii.gz")
    monkeypatch.setenv("SCANS", str(source / "images"))
    rows = [
        "# T1, T2",
        "",
        f"{source}/images/anna_t1.nii.gz, images/anna_t2.nii.gz",
        "$SCANS/bert,x_t1.nii.gz\timages/bert,x_t2.nii.gz",
        "images/carl_t1.nii.gz",
        "images/dora_t1.nii.gz,images/dora_t2.nii.gz",
        "images/notes.txt,images/notes.doc",
    ]
    path = source / "list.txt"
    path.write_text("\n".join(rows))
    record = run(path, folders, channels=("T1", "T2"))
    assert cases_of(record) == ["anna"]
    reasons = refusals_of(record, source)
    assert reasons["images/carl_t1.nii.gz"] == "is in a line with 1 path(s), but the data set has 2 channel(s)"
    assert reasons["images/dora_t1.nii.gz"] == "does not exist"
    assert reasons["images/notes.txt"] == "does not end in an image format that nnU-Net can read"
    assert len(reasons) == 4  # and bert, whose commas are read as separators
    path.write_text("$SCANS/bert,x_t1.nii.gz\nimages/anna_t1.nii.gz")
    record = run(path, folders, restart=True)
    assert cases_of(record) == ["anna_t1", "bert-x_t1"]


def test_a_list_of_nothing(folders, source):
    path = source / "list.txt"
    path.write_text("# only words\n")
    with pytest.raises(UserError, match="lists no files; write one path per line"):
        run(path, folders)
    path.write_text("a.nii.gz\nb.nii.gz\n")
    with pytest.raises(
        UserError, match=r"no image can be imported, 2 rejected \(a.nii.gz does not exist; b.nii.gz does not"
    ):
        run(path, folders)


# collections


def make_collection(source):
    def session(*entries):
        return {"session_id": "x", "session_info": None, "images": list(entries)}

    def entry(name, modality, path=None):
        file = write_image(source / "openmind" / f"{name}.nii.gz", len(name)) if path is None else path
        masks = {"anonymization_mask": None, "anatomy_mask": None}
        return {"name": f"{name}.nii.gz", "image_path": str(file), "modality": modality, "associated_masks": masks}

    first = {
        "sub-01": {
            "sessions": {
                "ses-1": session(entry("sub-01_ses-1_T1w", "T1w"), entry("sub-01_ses-1_acq-x_T2w", "T2w")),
                "ses-DEFAULT": session(entry("sub-01_T1w", "T1w"), entry("sub-01_run-2_T1w", "T1w")),
            }
        }
    }
    second = {
        "sub-01": {"sessions": {"ses-DEFAULT": session(entry("other", "T1w"), {"modality": "T1w"})}},
        "sub-02": {"subject_info": {}},
        "sub-03": {"sessions": {"ses-1": session(entry("n", "T1w", "$nowhere_set/n.nii.gz"))}},
    }
    content = {
        "collection_index": 745,
        "collection_name": "Dataset745_OpenMind",
        "datasets": {
            "ds1": {"dataset_index": "ds1", "name": None, "subjects": first},
            "ds2": {"dataset_index": "ds2", "subjects": second},
        },
    }
    path = source / "pretrain_data.json"
    path.write_text(json.dumps(content))
    return path


def test_a_collection_is_taken_by_modality(folders, source):
    path = make_collection(source)
    with pytest.raises(UserError, match=r"T1w \(4\), T2w \(1\); choose with modalities"):
        run(path, folders)
    record = run(source, folders, modalities=("T1w",))  # its folder does as well
    assert record.kind == "collection"
    assert cases_of(record) == [
        "sub-ds1x01_T1w",
        "sub-ds1x01_run-2_T1w",
        "sub-ds1x01_ses-1_T1w",
        "sub-ds2x01_other",
    ]
    assert len({patient_in_name(case) for case in cases_of(record)}) == 2
    reasons = [f"{refusal.file} {refusal.reason}" for refusal in record.refused]
    for text in (
        "subject sub-01, session ses-DEFAULT has an image without image_path",
        "subject sub-02 has no sessions",
        "$nowhere_set/n.nii.gz starts with $nowhere_set, which is not set in the environment",
        "sub-01_ses-1_acq-x_T2w.nii.gz has the modality T2w, which was not chosen",
    ):
        assert any(text in reason for reason in reasons), text
    assert len(reasons) == 4


def test_modalities_of_a_collection_are_channels_or_mixed(folders, source):
    path = make_collection(source)
    record = run(path, folders, modalities=("T1w", "T2w"))
    assert cases_of(record) == ["sub-ds1x01_ses-1"]
    assert [os.path.basename(image) for image in record.taken[0].images] == [
        "sub-01_ses-1_T1w.nii.gz",
        "sub-01_ses-1_acq-x_T2w.nii.gz",
    ]
    assert any("is in a session with 2 T1w, 0 T2w" in refusal.reason for refusal in record.refused)
    record = run(path, folders, mixed=True, restart=True)
    assert (record.channel_names, len(record.taken)) == (("mixed",), 5)


def test_what_is_no_collection(folders, source):
    path = source / "x.json"
    for content, reason in (("[]", "has no key 'datasets'"), ("{", "cannot be read as a collection")):
        path.write_text(content)
        with pytest.raises(UserError, match=reason):
            run(path, folders)


# the command


def test_kinds_and_defaults_are_those_of_the_library():
    assert KIND_NAMES == tuple(KINDS) == tuple(FINDERS) == tuple(KNOWN_CHOICES)
    assert f"(default: {MIN_SLICES})" in make_parser().format_help()


def test_a_source_of_nothing_or_of_both(folders, source):
    (source / "readme.txt").write_text("nothing here")
    with pytest.raises(UserError, match="contains no image"):
        run(source, folders)
    with pytest.raises(UserError, match="missing does not exist"):
        run(source / "missing", folders)
    write_image(source / "a.nii.gz")
    write_series(source / "dicom", make_values())
    with pytest.raises(UserError, match="1 image files and 7 DICOM files; set kind to folder or dicom"):
        detect_kind(source)
    with pytest.raises(UserError, match="neither a list"):
        detect_kind(source / "a.nii.gz")
    assert len(run(source, folders, kind="folder").taken) == 1
    assert run(source, folders, kind="dicom", restart=True).kind == "dicom"


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"modalities": ("T1w",)}, "modalities cannot be used with a folder of image files"),
        ({"min_slices": 3}, "min_slices cannot be used with"),
        ({"channels": ("T1=_t1", "T2")}, "channels must be .*, got T1=_t1 T2"),
        ({"channels": ("T1=_t1", "T2=_t1")}, "channels must be .*, got T1=_t1 T2=_t1"),
        ({"channels": ("T1=",)}, "channels must be .*, got T1="),
    ],
)
def test_choices_that_do_not_fit(folders, source, choices, reason):
    write_image(source / "a.nii.gz")
    with pytest.raises(UserError, match=reason):
        run(source, folders, **choices)


def test_the_same_import_again_does_nothing_and_another_is_refused(folders, source):
    write_image(source / "a.nii.gz")
    run(source, folders)
    folder = folders.raw / "Dataset501_Scans"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = []
    run(source, folders, say=said.append)
    assert "nothing to do" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    write_image(source / "b.nii.gz")
    with pytest.raises(UserError, match="use restart to replace it"):
        run(source, folders)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert cases_of(run(source, folders, restart=True)) == ["a", "b"]
    assert len(read_dataset(501, folders).cases) == 2
    assert [path.name for path in folders.raw.iterdir()] == ["Dataset501_Scans"]


def test_what_no_import_made_is_never_touched(folders, source):
    write_image(source / "a.nii.gz")
    own = write_image(folders.raw / "Dataset501_Scans" / "imagesTr" / "mine_0000.nii.gz")
    for restart in (False, True):
        with pytest.raises(UserError, match=r"contains files that no import has written \(mine_0000.nii.gz\)"):
            run(source, folders, restart=restart)
    assert own.exists()
    (folders.preprocessed / "Dataset502_Other").mkdir()
    with pytest.raises(UserError, match="number 502 is taken by Dataset502_Other"):
        import_dataset(source, 502, "Scans", folders=folders)
    for number, name in ((0, "Scans"), (1000, "Scans"), (3, "My Scans"), (3, "Dataset003_Scans")):
        with pytest.raises(ArgumentError, match="must"):
            import_dataset(source, number, name, folders=folders)
    with pytest.raises(ArgumentError, match="kind must be one of folder, .*, got pile"):
        import_dataset(source, 3, "Scans", kind="pile", folders=folders)


def test_the_command_prints_the_table_and_ends_errors_in_one_line(folders, source, capsys):
    write_image(source / "a.nii.gz")
    (source / "b.nii.gz").write_text("no image")
    assert main([str(source), "-d", "7", "-n", "Scans", "--channels", "CT"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "imported: 1 cases of 1 channel(s) (CT), from 1 .nii.gz" in out
    assert "rejected: 1" in out
    assert out[-1] == "next: nnssl_plan_and_preprocess -d 7"
    assert read_dataset(7, folders).channel_names == ("CT",)
    assert main([str(source), "-d", "7", "-n", "Scans"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnssl_import: error: ")
    assert error.count("\n") == 1
    assert "use --restart to replace it, or another --dataset" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-d", "1000"), "--dataset must be between 1 and 999, got 1000"),
        (("-n", "My Scans"), "--name must consist of"),
        (
            ("--modality", "CT"),
            "--modality cannot be used with a folder of image files, which accepts only --channels, --",
        ),
        (("--min-slices", "3"), "--min-slices cannot be used with"),
        (("--channels", "T1=_t1", "T2"), "--channels must be either all"),
        (("--kind", "dicom", "--modality", "CT", "MR"), "choose one or set --mixed"),
    ],
)
def test_errors_of_the_command_name_flags(folders, source, capsys, arguments, reason):
    write_image(source / "a.nii.gz")
    assert main([str(source), "-d", "7", "-n", "Scans", *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_a_folder_of_an_argument_s_name_stays_in_errors(folders, source, capsys):
    folder = source / "kind" / "number"
    write_image(folder / "a.nii.gz")
    write_series(folder / "dicom", make_values())
    assert main([str(folder), "-d", "7", "-n", "Scans"]) == 2
    error = capsys.readouterr().err
    assert f"error: {folder} contains" in error
    assert "set --kind to" in error


# names


def test_names_are_safe_and_unique():
    assert clean_name("Müller, Anna (CT) 1.2") == "Muller-Anna-CT-1.2"
    assert name_by_path([("a", "x"), ("b", "x"), ("b", "y")]) == ["a_x", "b_x", "b_y"]
    assert name_by_path([("a", "x"), ("b", "y")]) == ["x", "y"]
    assert name_by_path([("a", ""), ("b", "")]) == ["a", "b"]
    assert name_by_path([]) == []
    assert number_equal_names(["a", "A", "a_scan-2", "a"]) == ["a", "A_scan-2", "a_scan-2_scan-2", "a_scan-3"]
    labels = subject_labels(["A 1", "A-1", "b"])
    assert labels["b"] == "b"
    assert labels["A 1"] != labels["A-1"]
    assert all(label.isalnum() for label in labels.values())
    assert common_stem(["anna_t1", "anna_t2"]) == "anna"
    assert common_stem(["anna_v1_t1", "anna_v1_t2"]) == "anna_v1"
    assert common_stem(["anna", "bert"]) == "anna"
    assert common_stem(["anna"]) == "anna"


def test_plans_name_a_reader_of_nnunet():
    assert stock_reader("DicomSeriesIO") == "SimpleITKIO"
    assert stock_reader("NibabelIO") == "NibabelIO"
