import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnssl.data.phantoms import LABELS, make_phantom, write_phantom_dataset
from nnssl.data.raw import read_dataset, read_volume
from nnssl.errors import UserError
from nnssl.paths import resolve_folders

SHAPE = (32, 48, 40)
SPACING_MM = (3.0, 1.5, 2.0)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_every_organ_is_there_and_every_patient_differs(modality):
    seen = []
    for seed in range(4):
        volume, labels = make_phantom(seed, SHAPE, SPACING_MM, modality)
        assert volume.shape == labels.shape == SHAPE
        assert (volume.dtype, labels.dtype) == (np.float32, np.uint8)
        shares = np.bincount(labels.ravel(), minlength=5) / labels.size
        assert len(shares) == len(LABELS)
        assert (shares[1:] > 0.002).all()
        assert shares[1] > shares[2:].max()
        assert not (labels == labels[:, :, ::-1]).all()
        seen.append((volume, labels))
    for volume, labels in seen[1:]:
        assert (volume != seen[0][0]).mean() > 0.5
        assert (labels != seen[0][1]).mean() > 0.01


def test_intensities_look_like_the_modality():
    ct, labels = make_phantom(3, SHAPE, SPACING_MM, "CT")
    assert ct[:, :3, :3].mean() == pytest.approx(-1000, abs=10)
    assert ct.max() > 300
    assert 40 < ct[labels == LABELS["liver"]].mean() < 150
    mr, labels = make_phantom(3, SHAPE, SPACING_MM, "MR")
    assert mr.min() >= 0
    assert 0 < mr[:, :3, :3].mean() < 60
    assert 250 < mr[labels == LABELS["liver"]].mean() < 520


def test_equal_seeds_give_equal_patients_and_a_generator_moves_on():
    for first, second in zip(make_phantom(5, SHAPE, SPACING_MM), make_phantom(5, SHAPE, SPACING_MM), strict=True):
        np.testing.assert_array_equal(first, second)
    generator, same = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    first = make_phantom(generator, SHAPE, SPACING_MM)[0]
    np.testing.assert_array_equal(first, make_phantom(same, SHAPE, SPACING_MM)[0])
    assert (first != make_phantom(generator, SHAPE, SPACING_MM)[0]).any()


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_no_threshold_tells_the_organs_apart(modality):
    """The best intensity window of four, chosen over all patients at once, must find no organ well."""
    patients = [make_phantom(seed, SHAPE, SPACING_MM, modality) for seed in range(6)]
    volume, labels = (np.concatenate(parts) for parts in zip(*patients, strict=True))
    for name, limit in (("liver", 0.75), ("spleen", 0.4), ("stomach", 0.4)):
        organ = labels == LABELS[name]
        for low, high in ((1, 99), (5, 95), (15, 85), (25, 75)):
            window = (volume >= np.percentile(volume[organ], low)) & (volume <= np.percentile(volume[organ], high))
            assert 2 * (window & organ).sum() / (window.sum() + organ.sum()) < limit


def test_anatomy_keeps_its_place():
    """Liver and spleen lie on opposite sides in every patient, which is what makes them learnable."""
    for seed in range(6):
        _, labels = make_phantom(seed, SHAPE, SPACING_MM)
        centre = {name: np.argwhere(labels == label).mean(0) for name, label in LABELS.items()}
        assert centre["liver"][2] + 5 < centre["aorta"][2] < centre["spleen"][2] - 5
        assert centre["stomach"][1] < centre["aorta"][1]


@pytest.mark.parametrize(("shape", "modality"), [((4, 40, 40), "MR"), ((40, 40), "MR"), (SHAPE, "PET")])
def test_nonsense_is_refused(shape, modality):
    with pytest.raises(ValueError, match="shape must be three numbers|modality must be MR or CT"):
        make_phantom(0, shape, SPACING_MM, modality)


def test_written_data_set_is_nnunets_raw_layout(nnunet_folders):
    folders = resolve_folders()
    folder = write_phantom_dataset(
        folders.raw, "Dataset901_Phantoms", 2, 7, SHAPE, SPACING_MM, "CT", True, first_case=3
    )
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == [
        "phantom_0003.nii.gz",
        "phantom_0004.nii.gz",
    ]
    dataset = read_dataset(901, folders)
    assert dataset.channel_names == ("CT",)
    volume, spacing_mm = read_volume(dataset.cases[1], dataset.reader)
    assert spacing_mm == SPACING_MM
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "phantom_0004.nii.gz")))
    assert labels.shape == volume.shape[1:] == SHAPE
    assert json.loads((folder / "dataset.json").read_text())["labels"] == LABELS
    # the same patient again from another first_case, without labels
    bare = write_phantom_dataset(folders.raw, "Dataset902_Bare", 1, 7, SHAPE, SPACING_MM, "CT", False, first_case=4)
    assert not (bare / "labelsTr").exists()
    again = read_dataset(902, folders)
    np.testing.assert_array_equal(read_volume(again.cases[0], again.reader)[0], volume)
    with pytest.raises(UserError, match="already contains files"):
        write_phantom_dataset(folders.raw, "Dataset902_Bare", 1, 7, SHAPE, SPACING_MM, "CT", False)
