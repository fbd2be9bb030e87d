"""Planes are shown as radiologists see them: a bright spot that is anterior, superior and on the right is where it belongs."""

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data.case_store import CaseStore
from nnssl.pictures.components import CaseComponents, Embedding
from nnssl.pictures.figures import embedding_figure
from nnssl.pictures.orientation import describe_views, view_plane
from tests.nnssl.data.test_preprocess import Scene, make_plan

ORIENTATIONS = [
    "".join(letters)
    for axes in permutations(("LR", "PA", "SI"))
    for letters in product(*axes)
]  # fmt: skip
SPOT_ZYX, SHAPE_ZYX = (5, 2, 2), (7, 11, 14)  # of an image whose axes go to the left, to posterior and to superior


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[tuple[int, ...], CaseStore]:
    """One image in all 48 orientations, preprocessed with and without turning the axes."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("orientation")
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        scene = Scene(1)
        (scene.images / "case00_0000.nii.gz").unlink()
        volume = np.random.default_rng(0).uniform(1, 2, SHAPE_ZYX).astype(np.float32)
        volume[tuple(slice(place - 1, place + 2) for place in SPOT_ZYX)] = 100
        image = sitk.GetImageFromArray(volume)
        image.SetSpacing((1.0, 0.9, 2.5))
        for orientation in ORIENTATIONS:
            turned = sitk.DICOMOrient(image, orientation)
            sitk.WriteImage(turned, str(scene.images / f"{orientation}_0000.nii.gz"))
        scene.measure()
        found = {}
        for order in ((0, 1, 2), (2, 0, 1)):
            plan = make_plan({"3d_fullres": [1.0, 1.0, 1.0]}, transpose=order)
            assert scene.run(plan).done + len(scene.fingerprint.duplicates) == 48
            target = root / f"cases_{order[0]}"
            scene.folder().rename(target)
            found[order] = CaseStore(target)
    return found


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_spot_is_shown_where_a_radiologist_looks_for_it(stores, orientation, order):
    case = stores[order].case(orientation)
    assert case.orientation == "".join(orientation[::-1][axis] for axis in order)
    volume = case.read_box((0, 0, 0), case.shape)[0]
    spot = tuple(int(place) for place in np.argwhere(volume > 0.5 * volume.max()).mean(axis=0).round())
    components = np.zeros((3, *case.shape), np.float32)
    figure = embedding_figure(Embedding((CaseComponents(case, spot, components),), (0.5, 0.3, 0.2), False), "stage")
    figure.canvas.draw()
    for axis, axes in enumerate(figure.axes[::2]):
        (image,) = axes.images
        row, column = np.argwhere(image.get_array() > 0.5 * volume.max()).mean(axis=0)
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((column, row)))
        assert up > 0.6, axis  # anterior in axial planes, superior in the others
        assert across < 0.4, axis  # right in axial and coronal planes, anterior in sagittal ones


def test_planes_of_an_unknown_orientation_are_shown_as_stored():
    assert [view_plane("", axis) for axis in range(3)] == [
        (False, True, True),
        (False, False, True),
        (False, False, True),
    ]
    assert "as stored" in describe_views("")
    assert "patient's right on the left" in describe_views("SPL")
    assert [view_plane("SPL", axis) for axis in range(3)] == [view_plane("", axis) for axis in range(3)]
    # a sagittal scan, whose slices go from right to left and have their superior rows first
    assert view_plane("LIP", 0) == (False, True, True)
    assert view_plane("LIP", 1) == view_plane("LIP", 2) == (True, True, True)
