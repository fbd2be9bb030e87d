"""Masks of the user: found by name, refused with another geometry, and followed by preprocessing."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile

from nnssl.cli.plan_and_preprocess import make_parser
from nnssl.data.case_store import LEARNABLE, CaseStore, read_properties
from nnssl.data.exclusion import check_exclusion_mask, read_exclusion_mask
from nnssl.data.learnable import learnable_mask, resample_mask
from nnssl.data.preprocess import preprocess_dataset
from nnssl.data.raw import RawCase, read_volume
from nnssl.data.recipe import plan_targets
from nnssl.errors import ArgumentError, UserError
from nnssl.log import lines_to
from tests.nnssl.data.test_preprocess import NAME, Scene, make_plan


@pytest.fixture
def scene(nnunet_folders) -> Scene:
    return Scene(3)


def write_mask(scene, folder, case: str, **changes) -> np.ndarray:
    """Write a mask of a case that excludes a corner; ``changes`` are of the image's geometry."""
    image = sitk.ReadImage(str(scene.images / f"{case}_0000.nii.gz"))
    values = np.zeros(sitk.GetArrayFromImage(image).shape, np.uint8)
    values[2:6, 3:20, :14] = 3
    if "shape" in changes:
        values = values[: changes["shape"]]
    mask = sitk.GetImageFromArray(values)
    mask.SetSpacing(changes.get("spacing", image.GetSpacing()))
    mask.SetOrigin(changes.get("origin", image.GetOrigin()))
    mask.SetDirection(changes.get("direction", image.GetDirection()))
    folder.mkdir(exist_ok=True)
    sitk.WriteImage(mask, str(folder / f"{case}.nii.gz"))
    return values


def run(scene, folder, plan=None):
    lines = []
    with lines_to(lines.append):
        report = preprocess_dataset(
            scene.dataset,
            plan or scene.plan,
            scene.fingerprint.usable,
            scene.folders,
            None,
            1,
            None,
            exclude_mask=folder,
        )
    return report, "\n".join(lines)


def test_masks_of_tiff_images_have_the_spacing_that_lies_beside_them(tmp_path):
    values = np.zeros((4, 6, 5), np.uint8)
    values[1, 2:, :3] = 1
    for name, spacing_mm in (
        ("case01", (3.0, 1.5, 2.0)),
        ("masks/case01", (3.0, 1.5, 2.0)),
        ("wrong", (3.0, 1.5, 1.0)),
    ):
        path = tmp_path / f"{name}{'_0000' * (name == 'case01')}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, values)
        (tmp_path / f"{name}.json").write_text(json.dumps({"spacing": spacing_mm}))
    case = RawCase("case01", (tmp_path / "case01_0000.tif",))
    check_exclusion_mask(case, tmp_path / "masks" / "case01.tif", "Tiff3DIO")
    assert (read_exclusion_mask(tmp_path / "masks" / "case01.tif", "Tiff3DIO") == (values > 0)).all()
    with pytest.raises(UserError, match=r"spacing .* must be \(3.0, 1.5, 2.0\), .* got \(3.0, 1.5, 1.0\)"):
        check_exclusion_mask(case, tmp_path / "wrong.tif", "Tiff3DIO")


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2)])
def test_what_is_excluded_leaves_the_mask_and_the_foreground(scene, tmp_path, transpose):
    values = write_mask(scene, tmp_path / "masks", "case01")
    plan = make_plan(transpose=transpose)
    report, said = run(scene, tmp_path / "masks", plan)
    assert report.done == 3
    assert "excluding regions of 1 cases; 2 cases have no mask" in said
    recipe = plan_targets(plan, scene.folder(), None)[0].recipe
    for case in scene.dataset.cases:
        volume, spacing_mm = read_volume(case, scene.dataset.reader)
        stored = CaseStore(scene.folder()).case(case.name)
        expected = learnable_mask(volume, spacing_mm)
        if case.name == "case01":
            assert expected[values > 0].any()
            expected &= values == 0
        occupied = np.argwhere((volume[0] != 0).transpose(transpose))
        box = tuple(slice(low, high + 1) for low, high in zip(occupied.min(axis=0), occupied.max(axis=0), strict=True))
        cropped = expected.transpose(recipe.transpose_forward)[box]
        found = stored.read_learnable((0, 0, 0), stored.shape)
        np.testing.assert_array_equal(found, resample_mask(cropped, stored.shape))
        assert stored.properties.learnable_share == pytest.approx(found.mean())
        assert (stored.properties.exclude_mask is not None) == (case.name == "case01")
        z, y, x = stored.foreground_vox.T
        assert len(z) > 100
        # points lie anywhere within a voxel of the image, whose mask is nearest for most of its share of the grid
        source = [
            (place * old / new).astype(int)
            for place, old, new in zip((z, y, x), cropped.shape, stored.shape, strict=True)
        ]
        assert cropped[tuple(source)].mean() > 0.85


def test_a_case_is_preprocessed_again_if_its_mask_changed_or_went(scene, tmp_path):
    folder = tmp_path / "masks"
    write_mask(scene, folder, "case01")
    write_mask(scene, folder, "case02")
    assert run(scene, folder)[0].done == 3
    assert run(scene, folder)[0].done == 0
    path = folder / "case02.nii.gz"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000_000))
    assert run(scene, folder)[0].done == 0  # its bytes are the same
    mask = sitk.ReadImage(str(path))
    sitk.WriteImage(1 - (mask != 0), str(path))
    assert run(scene, folder)[0].done == 1
    report, said = run(scene, None)
    assert report.done == 2
    assert "2 cases were preprocessed with an exclusion mask that is no longer given" in said
    assert read_properties(scene.folder(), "case01").exclude_mask is None


def test_cases_of_an_earlier_version_are_preprocessed_again(scene, tmp_path):
    run(scene, None)
    path = scene.folder() / "case00.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    (scene.folder() / LEARNABLE / "case00.b2nd").unlink()
    assert run(scene, None)[0].done == 1
    assert (scene.folder() / LEARNABLE / "case00.b2nd").exists()


def test_a_mask_that_is_missing_is_an_error_of_one_line(scene, tmp_path):
    run(scene, None)
    (scene.folder() / LEARNABLE / "case00.b2nd").unlink()
    case = CaseStore(scene.folder()).case("case00")
    with pytest.raises(
        UserError, match=r"learnable/case00\.b2nd cannot be opened .*run nnssl_plan_and_preprocess again"
    ):
        case.read_learnable((0, 0, 0), case.shape)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": 5}, r"shape \(z, y, x\) must be \(10, 25, 30\), as in case01_0000.nii.gz, got \(5, 25, 30\)"),
        (
            {"spacing": (1.0, 0.9, 3.4)},
            r"spacing .* must be \(3.5, 0.9, 1.0\), as in case01_0000.nii.gz, got \(3.4, 0.9",
        ),
        ({"origin": (0.0, 0.5, 0.0)}, r"origin .* must be \(0.0, 0.0, 0.0\), .* got \(0.0, 0.5, 0.0\)"),
        ({"direction": (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)}, "orientation must be LPS, .* got RAS"),
    ],
)
def test_another_geometry_is_refused_before_anything_is_preprocessed(scene, tmp_path, change, words):
    write_mask(scene, tmp_path / "masks", "case01", **change)
    with pytest.raises(
        UserError, match=rf"masks/case01\.nii\.gz: {words}.*; resample the mask to the grid of the image$"
    ):
        run(scene, tmp_path / "masks")
    assert not list(scene.folder().glob("*.json"))


def test_files_without_a_case_are_listed_and_a_folder_without_masks_is_refused(scene, tmp_path):
    folder = tmp_path / "masks"
    write_mask(scene, folder, "case01")
    (folder / "case01.nii.gz").rename(folder / "case77.nii.gz")
    with pytest.raises(ArgumentError, match=rf"must contain masks named <case>.nii.gz for cases of {NAME}"):
        run(scene, folder)
    with pytest.raises(ArgumentError, match="does not exist"):
        run(scene, tmp_path / "nowhere")
    write_mask(scene, folder, "case00")
    assert f"1 files belong to no case of {NAME} (case77.nii.gz)" in run(scene, folder)[1]


def test_a_damaged_mask_is_named(scene, tmp_path):
    write_mask(scene, tmp_path / "masks", "case01")
    path = tmp_path / "masks" / "case01.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"exclusion mask .*case01\.nii\.gz .*; replace it"):
        run(scene, tmp_path / "masks")


def test_the_command_takes_a_folder():
    args = make_parser().parse_args(["-d", "501", "--exclude-mask", "/masks"])
    assert str(args.exclude_mask) == "/masks"
