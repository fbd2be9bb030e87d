"""Metrics compared with nnU-Net's Dice and brute-force distances, on images that are neither cubic nor isotropic."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage.measure import marching_cubes, mesh_surface_area

from nnssl.errors import UserError
from nnssl.evaluation.labels import foreground_labels, ignore_label
from nnssl.evaluation.metrics import (
    CaseMetrics,
    compare_masks,
    evaluate_case,
    evaluate_folders,
    read_metrics_csv,
    write_metrics_csv,
)
from nnssl.evaluation.segmentation_files import find_segmentations

SPACING_MM = (3.0, 1.25, 0.8)
LABELS = {"liver": 1, "kidney": 2}


def write(path, array, spacing_mm=SPACING_MM, origin=(4.0, -7.0, 11.0), dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(dtype))
    image.SetSpacing([float(mm) for mm in spacing_mm[-array.ndim :][::-1]])
    image.SetOrigin(origin[: array.ndim])
    sitk.WriteImage(image, str(path))
    return path


def blobs(seed, shape=(7, 12, 15)):
    """Return two lumpy classes that are neither centred nor equal."""
    rng = np.random.default_rng(seed)
    array = np.zeros(shape, np.uint8)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    for value, centre, radii in ((1, (0.4, 0.4, 0.3), (0.3, 0.25, 0.2)), (2, (0.6, 0.6, 0.7), (0.25, 0.2, 0.25))):
        moved = (np.array(centre) + rng.uniform(-0.06, 0.06, 3))[-len(shape) :] * shape
        size = (np.array(radii) * rng.uniform(0.8, 1.2, 3))[-len(shape) :] * shape
        array[(((grid - moved) / size) ** 2).sum(axis=-1) < 1] = value
    return array


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "predictions" / "a.nii.gz", blobs(0)), write(tmp_path / "references" / "a.nii.gz", blobs(1))


def test_dice_is_nnunets(pair):
    ours = evaluate_case(*pair, LABELS, 2.0)
    theirs = compute_metrics(str(pair[1]), str(pair[0]), SimpleITKIO(), [1, 2])["metrics"]
    for entry, value in zip(ours, (1, 2), strict=True):
        assert 0.2 < entry.dice < 0.99
        assert entry.dice == pytest.approx(theirs[value]["Dice"], abs=1e-9)


def test_volumes_in_ml(pair):
    voxel_ml = math.prod(SPACING_MM) / 1000
    for entry, value in zip(evaluate_case(*pair, LABELS, 2.0), (1, 2), strict=True):
        assert entry.volume_ml == pytest.approx((blobs(0) == value).sum() * voxel_ml)
        assert entry.reference_volume_ml == pytest.approx((blobs(1) == value).sum() * voxel_ml)


def surface(mask):
    """Return the voxels of a mask that have a neighbour outside it along any axis, by a loop."""
    found = []
    for place in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = place.copy()
            neighbour[axis] += step
            outside = neighbour[axis] < 0 or neighbour[axis] >= mask.shape[axis]
            if outside or not mask[tuple(neighbour)]:
                found.append(place)
                break
    return np.array(found)


def brute_force_hd95(first, second, spacing_mm):
    a, b = (surface(mask) * np.array(spacing_mm) for mask in (first, second))
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
    return max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))


@pytest.mark.parametrize(("shape", "spacing_mm"), [((7, 12, 15), SPACING_MM), ((17, 22), (1.25, 0.8))])
def test_hd95_by_brute_force(shape, spacing_mm):
    first, second = (blobs(seed, shape) == 1 for seed in (0, 1))
    hd95_mm = compare_masks(first, second, spacing_mm, 1.0, 99.0)[2]
    assert hd95_mm == pytest.approx(brute_force_hd95(first, second, spacing_mm), abs=1e-5)


def element_mm(corners, spacing_mm):
    """Return the length in mm of a contour in a square of four voxel centres, or the area in mm2 in a cube of eight.

    The surface intersects edges in their middle. 2D is computed by hand, 3D by marching cubes for unambiguous cubes.
    """
    if corners.ndim == 3:
        faces = [corners.take(place, axis=axis) for axis in range(3) for place in (0, 1)]
        assert not any(face[0, 0] == face[1, 1] != face[0, 1] == face[1, 0] for face in faces)
        points, triangles, _, _ = marching_cubes(corners.astype(float), 0.5, spacing=spacing_mm, method="lorensen")
        return mesh_surface_area(points, triangles)
    cut = math.hypot(*spacing_mm) / 2
    if corners.sum() in (1, 3):
        return cut
    if corners[0, 0] == corners[1, 1]:
        return 2 * cut
    return spacing_mm[1] if corners[0, 0] == corners[0, 1] else spacing_mm[0]


def surface_elements(mask, spacing_mm):
    """Return places and sizes in mm of all surface elements, by a loop over squares or cubes of neighbours."""
    padded = np.pad(mask, 1)
    places, sizes = [], []
    for place in itertools.product(*(range(n - 1) for n in padded.shape)):
        corners = padded[tuple(slice(start, start + 2) for start in place)]
        if corners.any() and not corners.all():
            places.append(np.multiply(place, spacing_mm))
            sizes.append(element_mm(corners, spacing_mm))
    return np.array(places), np.array(sizes)


def brute_force_nsd(first, second, spacing_mm, tolerance_mm):
    (a, a_mm), (b, b_mm) = (surface_elements(mask, spacing_mm) for mask in (first, second))
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
    near = a_mm[distances.min(axis=1) <= tolerance_mm].sum() + b_mm[distances.min(axis=0) <= tolerance_mm].sum()
    return near / (a_mm.sum() + b_mm.sum())


@pytest.mark.parametrize("tolerance_mm", [0.1, 0.9, 1.7, 9.0])
@pytest.mark.parametrize(
    ("shape", "spacing_mm"), [((7, 12, 15), SPACING_MM), ((9, 8, 13), (0.7, 1.9, 1.1)), ((17, 22), (1.25, 0.8))]
)
def test_surface_distance_by_brute_force(shape, spacing_mm, tolerance_mm):
    first, second = (blobs(seed, shape) == 1 for seed in (0, 1))
    nsd = compare_masks(first, second, spacing_mm, tolerance_mm, 99.0)[1]
    assert nsd == pytest.approx(brute_force_nsd(first, second, spacing_mm, tolerance_mm), abs=1e-5)


def test_both_diagonals_of_a_2d_contour():
    first, second = np.zeros((2, 9, 11), bool)
    first[2:4, 3:6] = first[4:7, 6:8] = second[2:5, 4:9] = True
    nsd = compare_masks(first, second, (1.25, 0.8), 1.0, 99.0)[1]
    assert nsd == pytest.approx(brute_force_nsd(first, second, (1.25, 0.8), 1.0), abs=1e-6)


@pytest.mark.parametrize("spacing_mm", [0.4, 0.7, 1.1, 1.3, 2.3])
def test_a_distance_equal_to_the_tolerance_is_within_it(spacing_mm):
    """Rounding to float32, in which NIfTI stores spacings, does not matter."""
    stored_mm = float(np.float32(spacing_mm))
    first = box((12, 30), (3, 4), (9, 10))
    for voxels in (1, 2, 3, 5, 7):
        second = box((12, 30), (3, 4), (9, 10 + voxels))
        exact, more = (
            compare_masks(first, second, (stored_mm,) * 2, factor * round(voxels * spacing_mm, 6), 99.0)[1]
            for factor in (1, 1.001)
        )
        assert exact == more == 1.0


def test_one_slice_is_an_image_of_two_dimensions():
    first, second = (blobs(seed, (17, 22)) == 1 for seed in (0, 1))
    flat = compare_masks(first, second, (1.25, 0.8), 1.0, 99.0)
    for axis in range(3):
        spacing_mm = np.insert((1.25, 0.8), axis, 5.0)
        thick = compare_masks(np.expand_dims(first, axis), np.expand_dims(second, axis), spacing_mm, 1.0, 99.0)
        assert thick == flat


def box(shape, lower, upper):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = True
    return mask


def test_surface_distance_of_boxes():
    """A box is longer at one end by 6 voxels: its far face is 7.5 mm away, the other faces agree."""
    shape, spacing_mm = (40, 70, 60), (1.5, 1.25, 0.8)
    first, second = box(shape, (4, 8, 5), (34, 52, 55)), box(shape, (4, 8, 5), (34, 58, 55))
    size_mm, longer_mm = np.multiply((30, 44, 50), spacing_mm), np.multiply((30, 50, 50), spacing_mm)
    tolerance_mm = 3.1

    def area(size):
        return 2 * (size[0] * size[1] + size[0] * size[2] + size[1] * size[2])

    # Beyond the tolerance are the far faces of both boxes, and the outer part of the sides of the longer one.
    face = size_mm[0] * size_mm[2]
    beyond = 2 * (size_mm[0] + size_mm[2]) * (7.5 - tolerance_mm)
    expected = 1 - (2 * face + beyond) / (area(size_mm) + area(longer_mm))
    nsd = compare_masks(first, second, spacing_mm, tolerance_mm, 99.0)[1]
    assert nsd == pytest.approx(expected, abs=0.02)  # voxels round the edges off
    assert compare_masks(first, second, spacing_mm, 7.6, 99.0)[1] == pytest.approx(1.0, abs=1e-6)
    assert compare_masks(first, first, spacing_mm, 0.1, 99.0) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("shape", [(7, 12, 15), (17, 22)])
def test_the_field_of_view_does_not_matter(shape):
    """More air around the image changes nothing, even for an object that touches the border."""
    first, second = (blobs(seed, shape) == 1 for seed in (0, 1))
    first[0], second[0] = False, False
    first[0, 3:6], second[0, 4:7] = True, True
    spacing_mm = SPACING_MM[-len(shape) :]
    small = compare_masks(first, second, spacing_mm, 1.0, 99.0)
    large = compare_masks(np.pad(first, 9), np.pad(second, 9), spacing_mm, 1.0, 99.0)
    assert small == pytest.approx(large, abs=1e-7)
    assert 0 < small[1] < 1


def test_empty_sides(tmp_path):
    empty, one = np.zeros((7, 12, 15), np.uint8), (blobs(0) == 1).astype(np.uint8)
    diagonal = float(np.linalg.norm(np.multiply(one.shape, SPACING_MM)))
    for ours, theirs, expected in (
        (empty, one, (0.0, 0.0, diagonal)), (one, empty, (0.0, 0.0, diagonal)), (empty, empty, (None, None, None))
    ):  # fmt: skip
        files = write(tmp_path / "p.nii.gz", ours), write(tmp_path / "r.nii.gz", theirs)
        liver, kidney = evaluate_case(*files, LABELS, 2.0)
        assert (liver.dice, liver.nsd, liver.hd95_mm) == pytest.approx(expected)
        assert (kidney.dice, kidney.volume_ml) == (None, 0.0)


def test_regions_and_ignored_voxels(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    dataset_json = {"labels": labels}
    assert foreground_labels(dataset_json) == {"whole": (1, 2), "core": (2,)}
    assert ignore_label(dataset_json) == 3
    assert ignore_label({"labels": {"background": 0, "a": 1}}) is None
    reference = blobs(1)
    reference[:, :4] = 3
    files = write(tmp_path / "p.nii.gz", blobs(0)), write(tmp_path / "r.nii.gz", reference)
    whole, core = evaluate_case(*files, foreground_labels(dataset_json), 2.0, 3)
    counted = reference != 3
    ours, theirs = (blobs(0) > 0) & counted, (blobs(1) > 0) & counted
    assert whole.dice == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
    assert core.reference_volume_ml < whole.reference_volume_ml
    theirs = compute_metrics(str(files[1]), str(files[0]), SimpleITKIO(), [(1, 2), (2,)], ignore_label=3)["metrics"]
    assert [whole.dice, core.dice] == pytest.approx([theirs[(1, 2)]["Dice"], theirs[(2,)]["Dice"]])


def test_folders_in_processes_and_a_table_that_comes_back(tmp_path):
    for seed, name in enumerate("cba"):
        write(tmp_path / "p" / f"{name}.nii.gz", blobs(seed))
        write(tmp_path / "r" / f"{name}.nii.gz", blobs(seed + 9))
    (tmp_path / "p" / "summary.json").write_text("{}")
    one = evaluate_folders(tmp_path / "p", tmp_path / "r", {**LABELS, "lung": 7}, 2.0)
    assert one == evaluate_folders(tmp_path / "p", tmp_path / "r", {**LABELS, "lung": 7}, 2.0, processes=2)
    assert [entry.case for entry in one] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert one[0] == evaluate_case(tmp_path / "p" / "a.nii.gz", tmp_path / "r" / "a.nii.gz", LABELS, 2.0)[0]
    write_metrics_csv(tmp_path / "metrics.csv", one)
    assert read_metrics_csv(tmp_path / "metrics.csv") == one
    assert ",,,," not in (tmp_path / "metrics.csv").read_text().splitlines()[1]
    chosen = evaluate_folders(tmp_path / "p", tmp_path / "r", LABELS, 2.0, cases=["b"])
    assert {entry.case for entry in chosen} == {"b"}


def test_natural_images(tmp_path):
    files = [
        write(tmp_path / side / "x.png", blobs(seed, (17, 22)), (1, 1, 1), (0, 0, 0)) for seed, side in enumerate("pr")
    ]
    liver = evaluate_case(*files, LABELS, 2.0)[0]
    assert 0 < liver.dice < 1
    assert liver.reference_volume_ml == pytest.approx((blobs(1, (17, 22)) == 1).sum() / 1000)


def test_tiffs_of_nnunet_have_their_spacing_beside_them(tmp_path):
    files = [tmp_path / side / "x.tif" for side in "pr"]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        Tiff3DIO().write_seg(blobs(seed), str(file), {"spacing": SPACING_MM})
    arrays = [blobs(seed) == 1 for seed in (0, 1)]
    diagonal_mm = float(np.linalg.norm(np.multiply(arrays[0].shape, SPACING_MM)))
    liver = evaluate_case(*files, LABELS, 1.0)[0]
    assert (liver.dice, liver.nsd, liver.hd95_mm) == compare_masks(*arrays, SPACING_MM, 1.0, diagonal_mm)
    assert list(find_segmentations(tmp_path / "p")) == ["x"]
    (tmp_path / "r" / "x.json").unlink()
    with pytest.raises(UserError, match="differs in spacing"):
        evaluate_case(*files, LABELS, 1.0)
    for text in ("{}", '{"spacing": [1, 2]}', '{"spacing": [1, 2, "a"]}', "[]"):
        (tmp_path / "p" / "x.json").write_text(text)
        with pytest.raises(UserError, match=r"x.json: has no 'spacing' of 3 numbers above 0 for x.tif"):
            evaluate_case(*files, LABELS, 1.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"file_ending": ".nii.gz"}', ["a"]),
        ('{"file_ending": ".PNG"}', ["propagate"]),
        ('{"file_ending": ".b2nd"}', ["a", "propagate"]),
        ('{"labels": {}}', ["a", "propagate"]),
        ('{"file_end', ["a", "propagate"]),
        ("[1]", ["a", "propagate"]),
    ],
)
def test_a_picture_beside_segmentations_is_not_taken_for_one_if_dataset_json_names_their_ending(
    tmp_path, content, expected
):
    for name in ("a.nii.gz", "propagate.png"):
        (tmp_path / name).touch()
    assert list(find_segmentations(tmp_path)) == ["a", "propagate"]
    (tmp_path / "dataset.json").write_text(content)
    assert list(find_segmentations(tmp_path)) == expected
    (tmp_path / "dataset.json").write_text('{"file_ending": ".nrrd"}')
    with pytest.raises(UserError, match=r"contains no file ending in \.nrrd, which its dataset\.json names"):
        find_segmentations(tmp_path)


def cut(path):
    """Truncate a file, which ITK would read with zeros for the missing part."""
    path.write_bytes(path.read_bytes()[:-30])


def turn(path):
    """Reverse the direction of the x axis at the same origin."""
    image = sitk.ReadImage(str(path))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


def make_series(path):
    volume = sitk.GetImageFromArray(blobs(0))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut, "is truncated .*; copy or predict it again"),
        (lambda f: write(f, np.where(blobs(0) == 1, np.nan, 0), dtype=np.float32), "contains NaN"),
        (turn, "differs in direction from its reference"),
        (make_series, "has 4 axes; give an image with 2 or 3"),
        (lambda f: f.unlink(), "does not exist"),
        (
            lambda f: sitk.WriteImage(sitk.GetImageFromArray(np.zeros((7, 12, 15, 3), np.uint8), True), str(f)),
            "has 3 values per voxel",
        ),
        (lambda f: write(f, blobs(0)[:-1]), r"has \(6, 12, 15\) voxels"),
        (lambda f: write(f, blobs(0), (3.0, 1.25, 0.9)), "differs in spacing from its reference"),
        (lambda f: write(f, blobs(0), origin=(4.0, -7.0, 14.0)), "differs in origin from its reference"),
        (lambda f: write(f, blobs(0) * 2), "contains the value 4, which is not a label"),
        (lambda f: write(f, blobs(0) * 0.5, dtype=np.float32), "contains fractions, so it is not a segmentation"),
        (lambda f: f.write_bytes(b"no image"), "unreadable header"),
    ],
)
def test_wrong_files_are_named(pair, make, message):
    make(pair[0])
    with pytest.raises(UserError, match=message) as error:
        evaluate_case(*pair, LABELS, 2.0)
    assert str(pair[0]) in str(error.value)


def test_a_missing_side_is_named(tmp_path):
    for folder, names in (("p", "ab"), ("r", "bc")):
        for name in names:
            write(tmp_path / folder / f"{name}.nii.gz", blobs(0))
    with pytest.raises(UserError, match="p: has no prediction of c"):
        evaluate_folders(tmp_path / "p", tmp_path / "r", LABELS, 2.0)
    with pytest.raises(UserError, match="r: has no reference of a"):
        evaluate_folders(tmp_path / "p", tmp_path / "r", LABELS, 2.0, cases=["a", "b"])
    with pytest.raises(UserError, match="this folder does not exist"):
        evaluate_folders(tmp_path / "q", tmp_path / "r", LABELS, 2.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no segmentation"):
        evaluate_folders(tmp_path / "empty", tmp_path / "r", LABELS, 2.0)
    write(tmp_path / "p" / "a.nrrd", blobs(0))
    with pytest.raises(UserError, match="has two files for a"):
        evaluate_folders(tmp_path / "p", tmp_path / "r", LABELS, 2.0)


def test_damaged_tables(tmp_path):
    path = tmp_path / "metrics.csv"
    write_metrics_csv(path, [CaseMetrics("a", "liver", 0.5, None, 3.0, 1.0, 2.0)])
    good = path.read_text()
    for text in ("", "case,dice\n", good.replace("0.5", "half"), good + "b,liver\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="is not a table of metrics"):
            read_metrics_csv(path)


def test_without_surfaces_dice_and_volumes_are_the_same(tmp_path):
    write_pair = {}
    for folder, shift in (("ours", 0), ("theirs", 2)):
        (tmp_path / folder).mkdir()
        values = np.zeros((6, 10, 12), np.uint8)
        values[1:4, 2 + shift : 7 + shift, 3:9] = 1
        write_pair[folder] = tmp_path / folder / "a.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(values), str(write_pair[folder]))
    labels = {"organ": 1, "absent": 2}
    whole = evaluate_folders(tmp_path / "ours", tmp_path / "theirs", labels, 1.0)
    quick = evaluate_folders(tmp_path / "ours", tmp_path / "theirs", labels, 1.0, surfaces=False)
    assert [(each.label, each.dice, each.volume_ml) for each in quick] == [
        (each.label, each.dice, each.volume_ml) for each in whole
    ]
    assert quick[0].dice == pytest.approx(0.6)
    assert all(each.nsd is None and each.hd95_mm is None for each in quick)
    assert whole[0].nsd is not None
