import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from nnssl.data.dataset_json import NO_LABELS
from nnssl.data.heart_phantoms import LABELS, make_heart_phantom
from nnssl.data.phantoms import describe_phantoms, write_phantom_dataset
from nnssl.data.raw import read_dataset, read_volume
from nnssl.files import read_json
from nnssl.paths import resolve_folders

SHAPE, SPACING_MM = (9, 48, 40), (8.0, 4.0, 5.0)
RIGHT, MYOCARDIUM, LEFT = (LABELS[name] for name in ("right_ventricle", "myocardium", "left_ventricle"))


def patient(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return make_heart_phantom(np.random.default_rng(seed), SHAPE, SPACING_MM)


@pytest.mark.parametrize("seed", range(5))
def test_the_myocardium_is_a_ring_around_the_left_ventricle(seed):
    volume, labels = patient(seed)
    assert volume.shape == labels.shape == SHAPE
    assert (volume.dtype, labels.dtype) == (np.float32, np.uint8)
    assert set(np.unique(labels)) == set(LABELS.values())
    planes = [plane for plane in labels if (plane == LEFT).any()]
    assert len(planes) >= 5
    for plane in planes:
        around = binary_dilation(plane == LEFT) & (plane != LEFT)
        assert (plane[around] == MYOCARDIUM).mean() > 0.95


def test_the_heart_becomes_smaller_towards_its_apex():
    sizes = np.mean([[(plane > 0).sum() for plane in patient(seed)[1]] for seed in range(8)], axis=0)
    assert sizes[0] < 0.6 * sizes[5]


def test_patients_differ_in_place_and_contrast_and_blood_is_brighter_than_muscle():
    places, contrasts = [], []
    for seed in range(20):
        volume, labels = patient(seed)
        places.append(np.argwhere(labels == LEFT).mean(axis=0)[1:])
        blood, muscle = (float(np.median(volume[labels == label])) for label in (LEFT, MYOCARDIUM))
        assert blood > 1.2 * muscle
        contrasts.append(blood / muscle)
    assert np.std(places, axis=0).min() > 1.5
    assert max(contrasts) > 1.4 * min(contrasts)


def test_most_of_what_is_as_bright_as_blood_is_something_else():
    """Otherwise a threshold would find the ventricles."""
    shares = []
    for seed in range(8):
        volume, labels = patient(seed)
        low, high = np.percentile(volume[labels == LEFT], (10, 90))
        shares.append(np.isin(labels[(volume >= low) & (volume <= high)], (LEFT, RIGHT)).mean())
    assert np.mean(shares) < 0.5


def test_wrong_sizes_and_modalities_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape must be three numbers of at least 8"):
        make_heart_phantom(np.random.default_rng(0), (1, 48, 48), SPACING_MM)
    for anatomy, modality in (("heart", "CT"), ("brain", "MR")):
        with pytest.raises(ValueError, match=f"got {anatomy} in {modality}"):
            write_phantom_dataset(tmp_path, "Dataset701_A", 1, 0, SHAPE, SPACING_MM, modality, anatomy=anatomy)
    assert not any(tmp_path.iterdir())


def test_equal_seeds_give_equal_patients():
    for first, second in zip(patient(3), patient(3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (patient(3)[0] != patient(4)[0]).mean() > 0.5


def test_a_data_set_of_hearts_names_its_structures(nnunet_folders):
    folders = resolve_folders()
    write_phantom_dataset(folders.raw, "Dataset701_Hearts", 2, 0, SHAPE, SPACING_MM, first_case=3, anatomy="heart")
    dataset = read_dataset("Dataset701_Hearts", folders)
    assert [case.name for case in dataset.cases] == ["phantom_0003", "phantom_0004"]
    volume, spacing_mm = read_volume(dataset.cases[0], dataset.reader)
    assert (volume.shape, spacing_mm) == ((1, *SHAPE), SPACING_MM)
    content = read_json(folders.raw / "Dataset701_Hearts" / "dataset.json", "dataset.json")
    assert content["labels"] == LABELS
    assert content["description"] == describe_phantoms("heart", 0, 3)
    write_phantom_dataset(folders.raw, "Dataset702_Hearts", 1, 0, SHAPE, SPACING_MM, labelled=False, anatomy="heart")
    assert read_json(folders.raw / "Dataset702_Hearts" / "dataset.json", "dataset.json")["labels"] == NO_LABELS
