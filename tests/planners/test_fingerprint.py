import json
import os
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnssl.data import body
from nnssl.data.body import body_mask
from nnssl.data.case_error import SetAside
from nnssl.data.phantoms import make_phantom, write_phantom_dataset
from nnssl.data.raw import UNKNOWN_CHANNEL, read_dataset
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from planners import fingerprint as module
from planners.fingerprint import (
    Duplicate,
    check_set_aside,
    digest_sources,
    extract_fingerprint,
    nnunet_fingerprint,
    read_or_extract,
)

SHAPE = (9, 14, 11)
SPACING_XYZ = (0.5, 1.25, 4.0)


def hush(line):
    pass


@pytest.fixture
def folders(nnunet_folders):
    return resolve_folders()


def tissue(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(500, 40, shape).astype(np.float32)


def write_case(folder, name, *channels, spacing=SPACING_XYZ):
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(channels):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        sitk.WriteImage(image, str(folder / "imagesTr" / f"{name}_{number:04d}.nii.gz"), True)


def write_names(folder, *names):
    content = {"channel_names": dict(enumerate(names)), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_foreground_of_a_phantom_is_its_body(modality):
    """The CT phantom with the same seed has the same anatomy; its body is everything above -500 HU."""
    for seed in range(3):
        volume, _ = make_phantom(seed, (32, 48, 40), (3.0, 1.5, 2.0), modality)
        body = make_phantom(seed, (32, 48, 40), (3.0, 1.5, 2.0), "CT")[0] > -500
        mask = body_mask(volume[None])
        assert 2 * (mask & body).sum() / (mask.sum() + body.sum()) > 0.93


def test_foreground_of_a_crop_without_air_is_what_is_not_zero():
    volume = np.stack([tissue(0), tissue(1)])
    assert body_mask(volume).all()
    volume[:, :2] = 0
    volume[1, 1, 3, 4] = 7
    np.testing.assert_array_equal(body_mask(volume[:, 2:]), np.ones((7, 14, 11), bool))
    np.testing.assert_array_equal(
        body_mask(np.stack([np.full(SHAPE, 3.0, np.float32), volume[1]])), np.ones(SHAPE, bool)
    )
    np.testing.assert_array_equal(body_mask(np.stack([np.zeros(SHAPE, np.float32), volume[1]])), volume[1] != 0)
    assert body_mask(np.zeros((1, *SHAPE), np.float32)).all()


def test_record_of_a_case(folders, monkeypatch):
    folder = folders.raw / "Dataset601_Two"
    first, second = tissue(0), tissue(1) - 480
    for array in (first, second):
        array[:2], array[:, :3], array[:, :, -1] = 0, 0, 0
    second[1, 5, 5] = -150  # widens the crop along z
    write_case(folder, "a", first, second)
    write_names(folder, "MRI", "T2")
    found = extract_fingerprint(read_dataset(601, folders), 1)
    (record,) = found.cases
    volume = np.stack([first, second])
    cropped = crop_to_nonzero(volume)[0]
    assert record.shape == SHAPE
    assert record.spacing_mm == (4.0, 1.25, 0.5)
    assert record.orientation == "LPS"
    assert record.channels == 2
    assert record.shape_after_crop == cropped.shape[1:] == (8, 11, 10)
    assert record.relative_size_after_crop == pytest.approx(8 * 11 * 10 / np.prod(SHAPE))
    mask = body_mask(volume)
    assert record.foreground_share == pytest.approx(mask.mean())
    for channel, statistics in zip(volume, record.intensities, strict=True):
        values = channel[mask].astype(float)
        oracle = [values.mean(), np.median(values), values.std(), values.min(), values.max(),
                  np.percentile(values, 0.5), np.percentile(values, 99.5)]  # fmt: skip
        assert [getattr(statistics, name) for name in ("mean", "median", "std", "min", "max", "percentile_00_5",
                "percentile_99_5")] == pytest.approx(oracle, rel=1e-5)  # fmt: skip
    assert record.below_ct_air == pytest.approx((0, (second < -100).mean()))
    assert found.channel_names == found.modalities == ("MRI", "T2")


def test_cases_weigh_the_same_whatever_their_size(folders):
    folder = folders.raw / "Dataset602_Sizes"
    for name, shape, level in (("a", (8, 9, 10), 100), ("b", (24, 28, 30), 900)):
        write_case(folder, name, np.random.default_rng(1).normal(level, 1, shape).astype(np.float32))
    write_names(folder, "MRI")
    found = nnunet_fingerprint(extract_fingerprint(read_dataset(602, folders), 1))
    properties = found["foreground_intensity_properties_per_channel"]["0"]
    assert properties["mean"] == pytest.approx(500, abs=1)
    assert properties["std"] == pytest.approx(400, abs=1)
    assert set(properties) == {"mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"}
    assert found["spacings"] == [[4.0, 1.25, 0.5]] * 2
    assert found["shapes_after_crop"] == [[8, 9, 10], [24, 28, 30]]
    assert found["median_relative_size_after_cropping"] == 1.0
    assert json.loads(json.dumps(found)) == found


def test_unusable_cases_are_set_aside_and_duplicates_listed(folders):
    folder = folders.raw / "Dataset603_Broken"
    for number in range(4):
        write_case(folder, f"good{number}", tissue(number))
    write_case(folder, "copy", tissue(2))
    holes, endless = tissue(5), tissue(6)
    holes[3, 4, 5], endless[1, 2, 3] = np.nan, np.inf
    write_case(folder, "nan", holes)
    write_case(folder, "inf", endless)
    write_case(folder, "flat", np.full(SHAPE, 7, np.float32))
    write_case(folder, "slice", tissue(8, (14, 11)), spacing=(1.0, 1.0))
    write_case(folder, "two", tissue(9), tissue(10))
    write_case(folder, "cut", tissue(11))
    cut = folder / "imagesTr" / "cut_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-200])
    write_names(folder, "MRI")
    dataset = read_dataset(603, folders)
    said = []
    with lines_to(said.append):
        found = extract_fingerprint(dataset, 1)
    # "copy" comes first by name
    assert [record.name for record in found.cases] == ["copy", "good0", "good1", "good3"]
    assert found.duplicates == (Duplicate("good2", "copy"),)
    reasons = {entry.case: entry.reason for entry in found.set_aside}
    assert sorted(reasons) == ["cut", "flat", "inf", "nan", "slice", "two"]
    assert "truncated" in reasons["cut"]
    assert "constant" in reasons["flat"]
    assert "NaN" in reasons["nan"]
    assert "infinite" in reasons["inf"]
    assert "single slice" in reasons["slice"]
    assert "_0001" in reasons["two"]
    assert found.set_aside[0].file == str(cut)
    assert said[0] == "measured 10 of 10 cases"
    assert len(said) == 8
    with pytest.raises(UserError, match=r"6 of 11 cases.*cut_0000.nii.gz is truncated") as error:
        check_set_aside(found)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("slices", "volumes", "kept", "reason"),
    [(2, 1, "slice", "is a volume among 2D images"), (1, 2, "volume", "is a single slice among volumes"),
     (2, 2, "volume", "is a single slice among volumes")],
)  # fmt: skip
def test_the_fewer_of_slices_and_volumes_are_set_aside(folders, slices, volumes, kept, reason):
    """With equal numbers of both, the volumes are kept."""
    folder = folders.raw / "Dataset612_Mixed"
    for number in range(slices):
        write_case(folder, f"slice{number}", tissue(number, (14, 11)), spacing=(1.0, 1.0))
    for number in range(volumes):
        write_case(folder, f"volume{number}", tissue(9 + number))
    write_names(folder, "MRI")
    found = extract_fingerprint(read_dataset(612, folders), 1)
    assert [record.name[:-1] for record in found.cases] == [kept] * max(slices, volumes)
    assert {entry.reason for entry in found.set_aside} == {reason}
    assert len(found.set_aside) == min(slices, volumes)


def test_intensities_are_sampled_at_odd_distances(monkeypatch):
    """An even step would align with the sides of images."""
    monkeypatch.setattr(body, "HISTOGRAM_VOXELS", 100)
    for size, step in ((99, 1), (100, 1), (101, 3), (250, 3), (350, 5), (1000, 11)):
        sample = body.spread_sample(np.arange(size).reshape(-1, 1))
        np.testing.assert_array_equal(sample, np.arange(0, size, step))
        assert len(sample) <= 100


def test_the_size_after_cropping_is_the_median(folders):
    folder = folders.raw / "Dataset613_Crops"
    for number, rows in enumerate((14, 13, 7)):
        volume = tissue(number)
        volume[:, rows:] = 0
        write_case(folder, f"case{number}", volume)
    write_names(folder, "MRI")
    found = extract_fingerprint(read_dataset(613, folders), 1)
    assert nnunet_fingerprint(found)["median_relative_size_after_cropping"] == pytest.approx(13 / 14)


def test_one_case_with_negative_numbers_makes_no_ct(folders):
    folder = folders.raw / "Dataset614_Odd"
    for number in range(3):
        volume = tissue(number)
        volume[:2] = -1000 if number == 0 else 0
        write_case(folder, f"case{number}", volume)
    said = []
    with lines_to(said.append):
        found = extract_fingerprint(read_dataset(614, folders), 1)
    assert found.modalities == ("MRI",)
    assert any("1 of 3 cases have voxels below -100" in line for line in said)


@pytest.mark.parametrize(("voxels", "modality"), [(13, "MRI"), (14, "CT")])
def test_a_voxel_of_air_makes_no_ct_but_a_hundredth_of_them_does(folders, voxels, modality):
    folder = folders.raw / "Dataset615_Edge"
    for number in range(3):
        volume = tissue(number)
        volume.reshape(-1)[:voxels] = -1000
        write_case(folder, f"case{number}", volume)
    assert 13 < volume.size / 100 < 14
    assert extract_fingerprint(read_dataset(615, folders), 1).modalities == (modality,)


def test_nan_is_found_where_the_reader_hands_it_on(folders):
    """ITK replaces NaN by 0 in NIfTI files (see the test above) and keeps it in other formats."""
    images = folders.raw / "Dataset611_Nrrd" / "imagesTr"
    images.mkdir(parents=True)
    holes = tissue(5)
    holes[3, 4, 5] = np.nan
    for name, array in (("a", tissue(0)), ("b", holes)):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(images / f"{name}_0000.nrrd"))
    found = extract_fingerprint(read_dataset(611, folders), 1)
    assert [(entry.case, entry.reason) for entry in found.set_aside] == [("b", "holds NaN or infinite intensities")]


def test_a_tenth_may_be_set_aside_and_no_more():
    entry = SetAside("a", "a_0000.nii.gz", "is constant")
    make = module.Fingerprint(1, "D", "", (), (), (None,) * 18, (entry,) * 2, (), {})
    check_set_aside(make)
    with pytest.raises(UserError, match="2 of 19"):
        check_set_aside(replace(make, cases=(None,) * 17))


def test_nothing_usable_is_an_error(folders):
    write_case(folders.raw / "Dataset604_Flat", "a", np.zeros(SHAPE, np.float32))
    with pytest.raises(UserError, match=r"1 of 1 cases cannot be used .*constant"):
        extract_fingerprint(read_dataset(604, folders), 1)


def test_equal_voxels_in_another_shape_are_no_duplicate(folders):
    folder = folders.raw / "Dataset605_Shapes"
    write_case(folder, "a", tissue(0))
    write_case(folder, "b", tissue(0).reshape(14, 9, 11))
    assert extract_fingerprint(read_dataset(605, folders), 1).duplicates == ()


@pytest.mark.parametrize(("modality", "judged"), [("CT", "CT"), ("MR", "MRI")])
def test_modality_is_judged_when_nothing_names_it(folders, modality, judged):
    folder = write_phantom_dataset(folders.raw, "Dataset606_X", 3, 1, (16, 24, 20), (5, 3, 4), modality, False)
    (folder / "dataset.json").unlink()
    said = []
    dataset = read_dataset(606, folders)
    assert dataset.channel_names == (UNKNOWN_CHANNEL,)
    with lines_to(said.append):
        found = extract_fingerprint(dataset, 1)
    assert found.modalities == found.channel_names == (judged,)
    assert any(f"detected as {judged}" in line for line in said)


def test_names_decide_the_modality_and_a_doubt_is_said(folders):
    folder = write_phantom_dataset(folders.raw, "Dataset607_X", 2, 1, (16, 24, 20), (5, 3, 4), "CT", False)
    for name, modality, doubts in (("ct", "CT", 0), ("MRI", "MRI", 1)):
        write_names(folder, name)
        said = []
        with lines_to(said.append):
            found = extract_fingerprint(read_dataset(607, folders), 1)
        assert (found.channel_names, found.modalities) == ((name,), (modality,))
        assert len(said) == 1 + doubts


@pytest.mark.parametrize(
    ("name", "shape", "modality"),
    [("chest X-ray", (14, 11), "X-ray"), ("CR", (14, 11), "X-ray"), ("CR", SHAPE, "CR"), ("XRAY", SHAPE, "X-ray")],
)
def test_x_rays_are_a_modality_of_their_own(folders, name, shape, modality):
    folder = folders.raw / "Dataset616_Xray"
    for number in range(2):
        write_case(folder, f"case{number}", tissue(number, shape), spacing=SPACING_XYZ[: len(shape)])
    write_names(folder, name)
    found = extract_fingerprint(read_dataset(616, folders), 1)
    assert (found.channel_names, found.modalities) == ((name,), (modality,))


def test_any_number_of_processes_gives_the_same_fingerprint(folders):
    write_phantom_dataset(folders.raw, "Dataset608_X", 4, 1, (16, 24, 20), (5, 3, 4), "MR", False)
    dataset = read_dataset(608, folders)
    assert extract_fingerprint(dataset, 2) == extract_fingerprint(dataset, 1)


def test_kept_intensities_are_bounded(folders, monkeypatch):
    write_phantom_dataset(folders.raw, "Dataset609_X", 3, 1, (16, 24, 20), (5, 3, 4), "MR", False)
    dataset = read_dataset(609, folders)
    sizes = []
    measure = module.measure_case

    def spy(*arguments, **options):
        outcome = measure(*arguments, **options)
        sizes.append(outcome.samples.size)
        return outcome

    monkeypatch.setattr(module, "measure_case", spy)
    monkeypatch.setattr(module, "SAMPLED_INTENSITIES", 100)
    extract_fingerprint(dataset, 1)
    assert sizes == [33, 33, 33]


def test_a_stored_fingerprint_is_reused_until_the_images_change(folders, monkeypatch):
    folder = write_phantom_dataset(folders.raw, "Dataset610_X", 2, 1, (16, 24, 20), (5, 3, 4), "MR", False)
    first = read_or_extract(read_dataset(610, folders), folders, 1)
    path = folders.preprocessed / "Dataset610_X" / "nnssl_fingerprint.json"
    runs = []
    extract = module.extract_fingerprint
    monkeypatch.setattr(module, "extract_fingerprint", lambda *arguments: runs.append(1) or extract(*arguments))
    said = []
    with lines_to(said.append):
        assert read_or_extract(read_dataset(610, folders), folders, 1) == first
    assert not runs
    assert "have not changed" in said[0]
    os.utime(folder / "imagesTr" / "phantom_0001_0000.nii.gz", ns=(0, 0))  # only touched
    assert read_or_extract(read_dataset(610, folders), folders, 1) == first
    assert not runs
    write_case(folder, "phantom_0000", tissue(0))
    assert read_or_extract(read_dataset(610, folders), folders, 1).cases[0].shape == SHAPE
    assert len(runs) == 1
    write_names(folder, "CT")  # the same files, read as something else
    assert read_or_extract(read_dataset(610, folders), folders, 1).modalities == ("CT",)
    assert len(runs) == 2
    path.write_text(path.read_text().replace('"orientation"', '"direction"', 1))
    read_or_extract(read_dataset(610, folders), folders, 1)
    assert len(runs) == 3


@pytest.mark.parametrize(("added_bytes", "later_ns"), [(1, 0), (0, 1)])
def test_an_image_has_changed_if_its_size_or_its_time_has(folders, added_bytes, later_ns):
    folder = write_phantom_dataset(folders.raw, "Dataset610_X", 2, 1, (16, 24, 20), (5, 3, 4), "MR", False)
    image = folder / "imagesTr" / "phantom_0001_0000.nii.gz"
    dataset, state = read_dataset(610, folders), image.stat()
    before = digest_sources(dataset)
    with image.open("ab") as file:
        file.write(bytes(added_bytes))
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns + later_ns))
    assert digest_sources(dataset) != before


@pytest.mark.real_data
def test_real_images_have_the_foreground_and_modality_that_they_show(real_data, folders):
    expected = {"Dataset004_Hippocampus": ("MRI", 0.99, 1.0), "Dataset027_ACDC": ("MRI", 0.3, 0.8),
                "Dataset017_BTCV": ("CT", 0.1, 0.7)}  # fmt: skip
    for number, (name, (modality, least, most)) in enumerate(expected.items(), start=701):
        images = folders.raw / f"Dataset{number}_{name[11:]}" / "imagesTr"
        images.mkdir(parents=True)
        for file in sorted((real_data / name / "imagesTr").iterdir())[:2]:
            (images / file.name).symlink_to(file)
        found = extract_fingerprint(read_dataset(number, folders), 1)
        assert found.modalities == (modality,)
        assert all(least <= case.foreground_share <= most for case in found.cases)


# units and sizes


def with_unit(folder, name, unit, spacing_xyz):
    """Rewrite a case with a unit and a spacing in its header."""
    import nibabel

    path = folder / "imagesTr" / f"{name}_0000.nii.gz"
    image = nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), np.diag([*spacing_xyz, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)


def test_a_header_in_metres_with_lengths_in_mm_is_set_aside(folders):
    folder = folders.raw / "Dataset501_Units"
    for number in range(5):
        write_case(folder, f"c{number}", tissue(number))
    in_metres = tuple(length / 1000 for length in SPACING_XYZ)
    with_unit(folder, "c0", "meter", in_metres)
    with_unit(folder, "c1", "meter", (2.5, 1.5, 1.5))
    with_unit(folder, "c2", "micron", SPACING_XYZ)
    with lines_to(hush):
        found = extract_fingerprint(read_dataset(501, folders), 1)
    assert [case.name for case in found.cases] == ["c0", "c3", "c4"]
    assert found.cases[0].spacing_mm == pytest.approx(SPACING_XYZ[::-1], rel=1e-5)
    impossible, unusual = found.set_aside
    assert impossible.case == "c1"
    assert impossible.file.endswith("c1_0000.nii.gz")
    assert impossible.reason.startswith(
        "is 27,500 mm long, which no scan is, with (9, 14, 11) voxels of (1500.0, 1500.0, 2500.0) mm"
    )
    assert unusual.case == "c2"
    assert unusual.reason.startswith("is 0.036 mm long, but half of the cases are 36 mm or more")


def test_what_one_image_makes_a_library_raise_does_not_end_the_others(folders, monkeypatch):
    folder = folders.raw / "Dataset501_Errors"
    for number in range(4):
        write_case(folder, f"c{number}", tissue(number))
    errors = iter([MemoryError(), KeyError("odd"), ZeroDivisionError("float division by zero")])

    def fail(volume):
        error = next(errors, None)
        if error is not None:
            raise error
        return body_mask(volume)

    monkeypatch.setattr("planners.case_record.body_mask", fail)
    with lines_to(hush):
        found = extract_fingerprint(read_dataset(501, folders), 1)
    assert [case.name for case in found.cases] == ["c3"]
    assert [entry.reason for entry in found.set_aside] == [
        "does not fit into memory; use fewer processes, or remove the case",
        "cannot be measured (KeyError: 'odd')",
        "cannot be measured (ZeroDivisionError: float division by zero)",
    ]


# numbers


@pytest.mark.parametrize("exponent", [40, 70, 110, -60, -110])
def test_measurements_of_extreme_intensities_scale_with_them(folders, exponent):
    """A power of two changes no digit, so the masks are the same and the statistics differ by that factor."""
    folder = folders.raw / "Dataset501_Extreme"
    volumes = [make_phantom(number, (16, 24, 20), (3.0, 1.5, 2.0))[0] for number in range(2)]
    for number, volume in enumerate(volumes):
        write_case(folder, f"a{number}", volume)
        write_case(folder, f"b{number}", np.ldexp(volume, exponent))
    with np.errstate(over="raise", invalid="raise"), lines_to(hush):
        found = extract_fingerprint(read_dataset(501, folders, ("MRI",)), 1)
    plain, extreme = found.cases[:2], found.cases[2:]
    for one, other in zip(plain, extreme, strict=True):
        assert other.foreground_share == one.foreground_share
        for key in ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"):
            expected = getattr(one.intensities[0], key) * 2.0**exponent
            assert getattr(other.intensities[0], key) == pytest.approx(expected, rel=1e-9)


def test_intensities_over_the_whole_range_of_float32_are_measured(folders):
    folder = folders.raw / "Dataset501_Range"
    volume = tissue(0)
    write_case(folder, "a", np.where(volume > 500, np.float32(3e38), np.float32(-3e38)))
    with np.errstate(over="raise", invalid="raise"), lines_to(hush):
        (record,) = extract_fingerprint(read_dataset(501, folders, ("MRI",)), 1).cases
    assert record.foreground_share == pytest.approx((volume > 500).mean())
    assert record.intensities[0].mean == pytest.approx(3e38)


def test_a_ct_image_with_impossible_intensities_is_set_aside(folders):
    """Its one voxel would make the standard deviation of the data set, by which all cases are normalised, infinite."""
    folder = folders.raw / "Dataset501_CT"
    for number in range(4):
        volume = make_phantom(number, (16, 24, 20), (3.0, 1.5, 2.0), "CT")[0]
        if number == 2:
            volume[8, 12, 10] = 1e30
        write_case(folder, f"c{number}", volume)
    with lines_to(hush):
        found = extract_fingerprint(read_dataset(501, folders, ("CT",)), 1)
        mri = extract_fingerprint(read_dataset(501, folders, ("MRI",)), 1)
    assert [case.name for case in found.cases] == ["c0", "c1", "c3"]
    (entry,) = found.set_aside
    assert entry.case == "c2"
    assert entry.file.endswith("c2_0000.nii.gz")
    assert entry.reason == "has intensities up to 1e+30, which are no Hounsfield units; correct them"
    assert found.foreground_intensity_properties_per_channel["0"].std < 2000
    assert len(mri.cases) == 4  # where each case is normalised by itself
