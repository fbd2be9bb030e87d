import gzip
import json
import pickle

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnssl.data.case_error import CaseError
from nnssl.data.raw import (
    UNKNOWN_CHANNEL,
    RawCase,
    find_dataset,
    leave_out,
    read_dataset,
    read_header,
    read_volume,
)
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.paths import resolve_folders

SHAPE = (5, 7, 11)
SPACING_XYZ = (0.5, 1.25, 4.0)
PERMUTED = (0, 0, 1, 1, 0, 0, 0, -1, 0)  # x of the array runs along y of the patient, y along -z, z along x


def make_array(seed=0, shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def write_image(path, array, spacing=SPACING_XYZ, direction=None, compress=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[: image.GetDimension()])
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path), compress)


@pytest.fixture
def folders(nnunet_folders):
    return resolve_folders()


def make_dataset(folders, name="Dataset501_Tiny", cases=("b", "a"), channels=1, ending=".nii.gz", dataset_json=None):
    folder = folders.raw / name
    for case in cases:
        for channel in range(channels):
            write_image(folder / "imagesTr" / f"{case}_{channel:04d}{ending}", make_array(channel))
    if dataset_json is not None:
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def test_a_data_set_is_found_by_number_text_and_name(folders):
    for name in ("Dataset501_Tiny", "Dataset5010_Other", "Dataset050_Third"):
        (folders.raw / name).mkdir()
    assert [find_dataset(key, folders) for key in (501, "501", "Dataset501_Tiny", 50)] == [
        "Dataset501_Tiny",
        "Dataset501_Tiny",
        "Dataset501_Tiny",
        "Dataset050_Third",
    ]
    with pytest.raises(UserError, match=r"77.*Dataset050_Third, Dataset5010_Other, Dataset501_Tiny"):
        find_dataset(77, folders)
    (folders.raw / "Dataset501_Twin").mkdir()
    with pytest.raises(UserError, match="Dataset501_Tiny, Dataset501_Twin"):
        find_dataset(501, folders)
    assert find_dataset("Dataset501_Twin", folders) == "Dataset501_Twin"


def test_a_preprocessed_data_set_is_found_without_its_raw_folder(folders):
    (folders.preprocessed / "Dataset009_Gone").mkdir()
    assert find_dataset(9, folders) == "Dataset009_Gone"
    with pytest.raises(UserError, match="no raw images"):
        read_dataset(9, folders)


def test_dataset_json_is_taken_at_its_word_and_nothing_is_said(folders):
    content = {
        "channel_names": {"1": "T2", "0": "CT"},
        "labels": {"background": 0, "heart": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "licence": "kept",
    }
    folder = make_dataset(folders, channels=2, dataset_json=content)
    said = []
    with lines_to(said.append):
        dataset = read_dataset(501, folders)
    assert said == []
    assert dataset.channel_names == ("CT", "T2")
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[1].images == (
        folder / "imagesTr" / "b_0000.nii.gz",
        folder / "imagesTr" / "b_0001.nii.gz",
    )
    assert dataset.reader == "SimpleITKIO"
    assert dataset.dataset_json == content
    assert dataset.set_aside == ()


def test_without_dataset_json_everything_is_inferred_and_said(folders):
    make_dataset(folders, channels=2, ending=".nrrd")
    said = []
    with lines_to(said.append):
        dataset = read_dataset("501", folders)
    assert len(said) == 3
    assert "no dataset.json" in said[0]
    assert ".nrrd" in said[1]
    assert "2 unnamed channel(s)" in said[2]
    assert dataset.channel_names == (UNKNOWN_CHANNEL, UNKNOWN_CHANNEL)
    assert dataset.dataset_json == {
        "channel_names": {"0": UNKNOWN_CHANNEL, "1": UNKNOWN_CHANNEL},
        "labels": {"background": 0, "foreground": 1},
        "numTraining": 2,
        "file_ending": ".nrrd",
    }


def test_legacy_dataset_json_becomes_a_valid_one(folders):
    legacy = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "numTraining": 7}
    make_dataset(folders, dataset_json=legacy)
    said = []
    with lines_to(said.append):
        dataset = read_dataset(501, folders)
    assert dataset.channel_names == ("CT",)
    assert dataset.dataset_json["channel_names"] == {"0": "CT"}
    assert dataset.dataset_json["labels"] == {"background": 0, "liver": 1}
    assert dataset.dataset_json["numTraining"] == 2
    assert any("is 7, but 2 cases" in line for line in said)


def test_names_given_by_the_user_win(folders):
    make_dataset(folders, dataset_json={"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"})
    assert read_dataset(501, folders, channel_names=("CT",)).dataset_json["channel_names"] == {"0": "CT"}
    with pytest.raises(UserError, match="2 channel name"):
        read_dataset(501, folders, channel_names=("CT", "PET"))


def test_cases_of_a_list_are_left_out(folders, tmp_path):
    make_dataset(folders, cases=("a", "b", "c"))
    dataset, said = read_dataset(501, folders), []
    listed = tmp_path / "test.txt"
    listed.write_text("# held out\nb\n\n")
    with lines_to(said.append):
        assert [case.name for case in leave_out(dataset, listed).cases] == ["a", "c"]
    assert said == [f"Dataset501_Tiny: excluding 1 of 3 cases listed in {listed}"]
    for text, message in (("b\nz\n", "has no case z"), ("a\nb\nc\n", "lists all cases"), ("b\nb\n", "more than once")):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            leave_out(dataset, listed)
    with pytest.raises(UserError, match="cannot be read as a list"):
        leave_out(dataset, tmp_path / "no.txt")


def test_files_that_make_no_case_are_set_aside_with_a_reason(folders):
    content = {"channel_names": {"0": "x", "1": "y"}, "file_ending": ".nii.gz"}
    folder = make_dataset(folders, cases=("a", "b", "c"), channels=2, dataset_json=content)
    images = folder / "imagesTr"
    (images / "b_0001.nii.gz").rename(images / "b_0002.nii.gz")
    (images / "c_0001.nii.gz").unlink()
    write_image(images / "d_0000.nrrd", make_array())
    write_image(images / "nosuffix.nii.gz", make_array())
    (images / "e_0000.nii.gz").symlink_to(images / "nowhere.nii.gz")
    (images / "._a_0000.nii.gz").write_text("")
    (images / "notes.txt").write_text("")
    dataset = read_dataset(501, folders)
    assert [case.name for case in dataset.cases] == ["a"]
    assert [(entry.case, entry.reason) for entry in dataset.set_aside] == [
        ("b", "belongs to a case with the channel files _0000, _0002, but the data set has 2 per case"),
        ("c", "belongs to a case with the channel files _0000, but the data set has 2 per case"),
        ("d", "ends in .nrrd, but the data set uses .nii.gz"),
        ("e", "is a link to a file that does not exist"),
        ("nosuffix", "has no channel number such as _0000 in its name"),
    ]
    assert dataset.set_aside[1].file == str(images / "c_0000.nii.gz")


def test_without_dataset_json_the_usual_number_of_channels_counts(folders):
    folder = make_dataset(folders, cases=("a", "b", "c"), channels=2)
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    dataset = read_dataset(501, folders)
    assert [case.name for case in dataset.cases] == ["a", "c"]
    assert [entry.case for entry in dataset.set_aside] == ["b"]


def test_links_are_followed_and_labels_never_opened(folders, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_image(elsewhere / "scan.nii.gz", make_array())
    folder = folders.raw / "Dataset501_Links"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "imagesTr" / "a_0000.nii.gz").symlink_to(elsewhere / "scan.nii.gz")
    (folder / "labelsTr").mkdir(mode=0o000)
    dataset = read_dataset(501, folders)
    volume, _ = read_volume(dataset.cases[0], dataset.reader)
    np.testing.assert_array_equal(volume[0], make_array())


def test_images_listed_in_dataset_json(folders, tmp_path, monkeypatch):
    write_image(tmp_path / "far" / "one.nii.gz", make_array())
    monkeypatch.setenv("FAR", str(tmp_path / "far"))
    folder = make_dataset(folders, cases=("x",), dataset_json={
        "channel_names": {"0": "CT"}, "file_ending": ".nii.gz",
        "dataset": {"far": {"images": ["$FAR/one.nii.gz"], "label": "labelsTr/none.nii.gz"},
                    "near": {"images": ["imagesTr/x_0000.nii.gz"], "label": ""},
                    "lost": {"images": ["imagesTr/y_0000.nii.gz"], "label": ""}}})  # fmt: skip
    dataset = read_dataset(501, folders)
    assert [case.name for case in dataset.cases] == ["far", "near"]
    assert dataset.cases[0].images == (tmp_path / "far" / "one.nii.gz",)
    assert dataset.cases[1].images == (folder / "imagesTr" / "x_0000.nii.gz",)
    assert [entry.case for entry in dataset.set_aside] == ["lost"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: [path.unlink() for path in (folder / "imagesTr").iterdir()], "contains no image"),
        (lambda folder: (folder / "imagesTr").rename(folder / "images"), "has no folder imagesTr"),
        (lambda folder: write_image(folder / "imagesTr" / "c_0000.mha", make_array()), "1 .mha and 2 .nii.gz"),
        (lambda folder: (folder / "dataset.json").write_text('{"file_ending": ".nrrd"}'), r"2 .nii.gz files, but .* is .nrrd"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "cannot be read as a dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "must contain a JSON object .* got list"),
        (lambda folder: [p.rename(p.with_name(p.name.replace("_0000", ""))) for p in (folder / "imagesTr").iterdir()],
         "rename the images to CASE_0000.nii.gz"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(folders, break_it, message):
    break_it(make_dataset(folders))
    with pytest.raises(UserError, match=message) as error:
        read_dataset(501, folders)
    assert "\n" not in str(error.value)


def test_an_unknown_reader_is_said_and_a_known_one_taken(folders):
    folder = make_dataset(
        folders, dataset_json={"channel_names": {"0": "CT"}, "overwrite_image_reader_writer": "NibabelIO"}
    )
    assert read_dataset(501, folders).reader == "NibabelIO"
    (folder / "dataset.json").write_text('{"overwrite_image_reader_writer": "MyReader"}')
    said = []
    with lines_to(said.append):
        assert read_dataset(501, folders).reader == "SimpleITKIO"
    assert any("MyReader" in line for line in said)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("direction", [None, PERMUTED])
def test_header_and_volume_agree_with_nnunets_reader(tmp_path, reader, direction):
    path = tmp_path / "case_0000.nii.gz"
    write_image(path, make_array(), direction=direction)
    oracle, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(path)])
    case = RawCase("case", (path,))
    volume, spacing_mm = read_volume(case, reader)
    np.testing.assert_array_equal(volume, oracle)
    assert volume.dtype == np.float32
    assert volume.flags.c_contiguous
    assert spacing_mm == tuple(properties["spacing"])
    shape, header_spacing_mm, orientation = read_header(case, reader)
    assert shape == oracle.shape[1:]
    assert header_spacing_mm == pytest.approx(spacing_mm)
    if reader.endswith("WithReorient"):
        assert orientation == "RAS"
    else:
        assert orientation == ("LPS" if direction is None else "PIL")


def test_axes_are_zyx(tmp_path):
    array = make_array()
    write_image(tmp_path / "case_0000.nii.gz", array)
    volume, spacing_mm = read_volume(RawCase("case", (tmp_path / "case_0000.nii.gz",)), "SimpleITKIO")
    assert volume.shape == (1, *SHAPE)
    assert volume[0, 3, 2, 9] == array[3, 2, 9]
    assert spacing_mm == (4.0, 1.25, 0.5)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
def test_every_3d_format_is_read_from_header_and_voxels(folders, ending):
    make_dataset(folders, ending=ending)
    dataset = read_dataset(501, folders)
    assert dataset.file_ending == ending
    volume, spacing_mm = read_volume(dataset.cases[0], dataset.reader)
    np.testing.assert_array_equal(volume[0], make_array())
    assert read_header(dataset.cases[0], dataset.reader)[:2] == (SHAPE, pytest.approx(spacing_mm))


def test_natural_images_with_colours_are_one_file_of_three_channels(folders):
    from skimage import io

    images = folders.raw / "Dataset501_Photos" / "imagesTr"
    images.mkdir(parents=True)
    for case in "ab":
        io.imsave(images / f"{case}_0000.png", make_array(shape=(6, 9, 3), dtype=np.uint8), check_contrast=False)
    dataset = read_dataset(501, folders)
    assert dataset.reader == "NaturalImage2DIO"
    assert dataset.channel_names == (UNKNOWN_CHANNEL,) * 3
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert read_header(dataset.cases[0], dataset.reader) == ((1, 6, 9), (999, 1, 1), "")


def test_tif_spacing_follows_nnunets_side_file(folders):
    import tifffile

    images = folders.raw / "Dataset501_Tif" / "imagesTr"
    images.mkdir(parents=True)
    tifffile.imwrite(images / "a_0000.tif", make_array())
    (images / "a.json").write_text('{"spacing": [5.0, 2.0, 1.0]}')
    dataset = read_dataset(501, folders)
    assert dataset.reader == "Tiff3DIO"
    assert read_header(dataset.cases[0], dataset.reader) == (SHAPE, (5.0, 2.0, 1.0), "")


def test_2d_images_get_a_thin_axis(tmp_path):
    path = tmp_path / "a_0000.nii.gz"
    write_image(path, make_array(shape=(7, 11)))
    case = RawCase("a", (path,))
    volume, spacing_mm = read_volume(case, "SimpleITKIO")
    assert volume.shape == (1, 1, 7, 11)
    assert read_header(case, "SimpleITKIO")[:2] == ((1, 7, 11), pytest.approx(spacing_mm))


@pytest.mark.parametrize("share", [0.5, 0.97])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
def test_truncated_files_are_never_read(tmp_path, ending, share):
    path = tmp_path / f"a_0000{ending}"
    write_image(path, make_array(shape=(20, 30, 41)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for reader in ("SimpleITKIO", "NibabelIO") if ending.startswith(".nii") else ("SimpleITKIO",):
        with pytest.raises(CaseError) as error:
            read_volume(RawCase("a", (path,)), reader)
        assert error.value.file == str(path)


def test_a_damaged_byte_in_the_middle_is_found(tmp_path):
    path = tmp_path / "a_0000.nii.gz"
    write_image(path, make_array(shape=(20, 30, 41)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CaseError, match="damaged"):
        read_volume(RawCase("a", (path,)), "SimpleITKIO")


def test_a_volume_cut_short_before_it_was_compressed_is_found(tmp_path):
    write_image(tmp_path / "whole.nii", make_array())
    (tmp_path / "a_0000.nii.gz").write_bytes(gzip.compress((tmp_path / "whole.nii").read_bytes()[:-20]))
    with pytest.raises(CaseError, match="truncated"):
        read_volume(RawCase("a", (tmp_path / "a_0000.nii.gz",)), "SimpleITKIO")


def test_unreadable_cases_name_the_file_at_fault(tmp_path, capsys):
    good, garbage, other = (tmp_path / f"a_000{channel}.nii.gz" for channel in range(3))
    write_image(good, make_array())
    garbage.write_text("no image")
    write_image(other, make_array(shape=(5, 7, 12)))
    for reader in ("SimpleITKIO", "NibabelIO"):
        with pytest.raises(CaseError) as error:
            read_volume(RawCase("a", (good, garbage)), reader)
        assert error.value.file == str(garbage)
    with pytest.raises(CaseError, match="same shape"):
        read_volume(RawCase("a", (good, other)), "SimpleITKIO")
    with pytest.raises(CaseError, match="does not exist"):
        read_header(RawCase("a", (tmp_path / "b_0000.nii.gz",)), "SimpleITKIO")
    assert capsys.readouterr().out == ""


def test_a_case_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(CaseError("a.nii.gz", "is truncated")))
    assert (error.file, error.reason) == ("a.nii.gz", "is truncated")


@pytest.mark.real_data
def test_real_data_set_agrees_with_nnunet(real_data, folders, monkeypatch):
    folder = folders.raw / "Dataset504_Hippocampus"
    folder.mkdir()
    (folder / "imagesTr").symlink_to(real_data / "Dataset004_Hippocampus" / "imagesTr")
    dataset = read_dataset(504, folders)
    assert len(dataset.cases) == 200
    for case in dataset.cases[:3]:
        oracle, properties = recursive_find_reader_writer_by_name("SimpleITKIO")().read_images([str(case.images[0])])
        shape, spacing_mm, _ = read_header(case, dataset.reader)
        assert shape == oracle.shape[1:]
        assert spacing_mm == pytest.approx(properties["spacing"])
        np.testing.assert_array_equal(read_volume(case, dataset.reader)[0], oracle)
