"""Weights for a hub: who is held out."""

import re

from tools.make_weights import RECIPES, split


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
