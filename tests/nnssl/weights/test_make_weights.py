"""Weights for a hub: which cases are held out."""

import re

from nnssl.files import read_json
from nnssl.paths import resolve_folders
from tools.make_weights import RECIPES, link_images, split


def test_both_frames_or_sides_of_a_patient_stay_together():
    for name, cases, held_out in (
        ("acdc", [f"patient{number:03}_frame{frame}" for number in range(1, 13) for frame in ("01", "12")], {1, 6, 11}),
        ("hippocampus", [f"hippocampus_{number:03}" for number in range(1, 25)], {1, 6, 11}),
        ("btcv", [f"BTCV_{number:03}" for number in range(1, 13)], {1, 6, 11}),
    ):
        pretrained, tested = split(cases[::-1], RECIPES[name].patient_of)
        assert sorted(pretrained + tested) == cases
        of_both = [{RECIPES[name].patient_of(case) for case in part} for part in (pretrained, tested)]
        assert not of_both[0] & of_both[1]
        assert {int(re.sub(r"\D", "", patient)) for patient in of_both[1]} == held_out, name


def test_only_the_images_to_pretrain_on_are_linked(nnunet_folders):
    folders, recipe = resolve_folders(), RECIPES["acdc"]
    source = folders.raw / recipe.labelled / "imagesTr"
    source.mkdir(parents=True)
    for case in ("a", "b", "c"):
        (source / f"{case}_0000.nii.gz").write_text(case)
    for cases in (["a", "b"], ["b", "c"]):
        link_images(recipe, cases, folders)
        linked = sorted((folders.raw / recipe.unlabelled / "imagesTr").iterdir())
        assert [path.read_text() for path in linked] == cases
    assert read_json(folders.raw / recipe.unlabelled / "dataset.json", "description")["numTraining"] == 2
