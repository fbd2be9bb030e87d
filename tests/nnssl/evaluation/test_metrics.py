"""Metrics against nnU-Net's Dice and against distances counted by brute force, on images that are neither cubic nor isotropic."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnssl.errors import UserError
from nnssl.evaluation.metrics import (
    CaseMetrics,
    compare_masks,
    evaluate_case,
    evaluate_folders,
    foreground_labels,
    ignore_label,
    read_metrics_csv,
    write_metrics_csv,
)

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
    """Two lumpy classes, neither centred nor alike."""
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
    """Voxels of a mask with a neighbour outside it, along any axis, by looking at each."""
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


def box(shape, lower, upper):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = True
    return mask


def test_surface_distance_of_boxes():
    """A box that is longer at one end by 6 voxels: its far face is 7.5 mm away, its other faces agree."""
    shape, spacing_mm = (40, 70, 60), (1.5, 1.25, 0.8)
    first, second = box(shape, (4, 8, 5), (34, 52, 55)), box(shape, (4, 8, 5), (34, 58, 55))
    size_mm, longer_mm = np.multiply((30, 44, 50), spacing_mm), np.multiply((30, 50, 50), spacing_mm)
    tolerance_mm = 3.1

    def area(size):
        return 2 * (size[0] * size[1] + size[0] * size[2] + size[1] * size[2])

    # beyond the tolerance: the far face of either box, and of the longer one its sides further out
    face = size_mm[0] * size_mm[2]
    beyond = 2 * (size_mm[0] + size_mm[2]) * (7.5 - tolerance_mm)
    expected = 1 - (2 * face + beyond) / (area(size_mm) + area(longer_mm))
    nsd = compare_masks(first, second, spacing_mm, tolerance_mm, 99.0)[1]
    assert nsd == pytest.approx(expected, abs=0.02)  # voxels round the edges off
    assert compare_masks(first, second, spacing_mm, 7.6, 99.0)[1] == pytest.approx(1.0, abs=1e-6)
    assert compare_masks(first, first, spacing_mm, 0.1, 99.0) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("shape", [(7, 12, 15), (17, 22)])
def test_the_field_of_view_does_not_matter(shape):
    """Also for an object that touches the border: an image with more air around it gives the same numbers."""
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f, blobs(0)[:-1]), r"has \(6, 12, 15\) voxels"),
        (lambda f: write(f, blobs(0), (3.0, 1.25, 0.9)), "differs in spacing from its reference"),
        (lambda f: write(f, blobs(0), origin=(4.0, -7.0, 14.0)), "differs in origin from its reference"),
        (lambda f: write(f, blobs(0) * 2), "holds the value 4, which is none of the labels"),
        (lambda f: write(f, blobs(0) * 0.5, dtype=np.float32), "holds fractions, so it is no segmentation"),
        (lambda f: f.write_bytes(b"no image"), "cannot be read"),
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
    with pytest.raises(UserError, match="there is no such folder"):
        evaluate_folders(tmp_path / "q", tmp_path / "r", LABELS, 2.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no segmentation"):
        evaluate_folders(tmp_path / "empty", tmp_path / "r", LABELS, 2.0)
    write(tmp_path / "p" / "a.nrrd", blobs(0))
    with pytest.raises(UserError, match="has two files of a"):
        evaluate_folders(tmp_path / "p", tmp_path / "r", LABELS, 2.0)


def test_damaged_tables(tmp_path):
    path = tmp_path / "metrics.csv"
    write_metrics_csv(path, [CaseMetrics("a", "liver", 0.5, None, 3.0, 1.0, 2.0)])
    good = path.read_text()
    for text in ("", "case,dice\n", good.replace("0.5", "half"), good + "b,liver\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="is no table of metrics"):
            read_metrics_csv(path)
