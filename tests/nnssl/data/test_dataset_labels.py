"""Labels and channel names of a dataset.json in all spellings, against what nnU-Net's label manager makes of the result."""

import json

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl.data.dataset_json import channel_names_in, read_labelled_json
from nnssl.data.dataset_labels import check_trainable, read_labels
from nnssl.errors import UserError

PLAIN = {"background": 0, "liver": 1, "spleen": 2}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (PLAIN, PLAIN),
        ({"0": "background", "1": "liver", "2": "spleen"}, PLAIN),
        (["background", "liver", "spleen"], PLAIN),
        ({"background": "0", "liver": "1", "spleen": " 2"}, PLAIN),
        ({"background": 0.0, "liver": 1.0, "spleen": 2}, PLAIN),
        ({"liver": 1, "spleen": 2}, PLAIN),
        ({"Background": 0, "liver": [1], "spleen": 2}, PLAIN),
        ({"background": [0], "liver": 1, "spleen": 2}, PLAIN),
        ({"background": 0, "1": 1, "2": 2}, {"background": 0, "1": 1, "2": 2}),
        ({"background": 0, "all": ["2", 1], "core": 2}, {"background": 0, "all": [1, 2], "core": 2}),
        ({"background": 0, "all": [4, 2, 1], "core": [4]}, {"background": 0, "all": [1, 2, 4], "core": 4}),
        ({**PLAIN, "ignore": [3]}, {**PLAIN, "ignore": 3}),
    ],
)
def test_labels_are_read_in_every_spelling(written, read):
    assert read_labels({"labels": written}, "x") == read
    assert next(iter(read_labels({"labels": written}, "x"))) == "background"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("liver", "labels must have the form"),
        ({}, "labels must have the form"),
        (None, "labels must have the form"),
        (["liver", "spleen"], 'must begin with "background"'),
        ({**PLAIN, "x": 0.5}, '"x" must have a whole number of at least 0 as its value, got 0.5'),
        ({**PLAIN, "x": float("nan")}, '"x" must have a whole number'),
        ({**PLAIN, "x": -1}, '"x" must have a whole number of at least 0 as its value, got -1'),
        ({**PLAIN, "x": True}, '"x" must have a whole number'),
        ({**PLAIN, "x": None}, '"x" must have a whole number'),
        ({**PLAIN, "x": "three"}, '"x" must have a whole number'),
        ({**PLAIN, "x": []}, '"x" must have whole numbers'),
        ({**PLAIN, "x": [3, [4]]}, '"x" must have whole numbers'),
        ({**PLAIN, "ignore": [3, 4]}, '"ignore" must have a single value'),
        ({"background": 1, "x": 0}, '"background" must be 0, got 1'),
        ({"left": 0, "right": 1}, 'value 0 must be that of the label "background", got "left: 0"'),
        ({"background": 0, "Background": 0, "x": 1}, 'must name "background" once'),
        ({"0": "background", "1": "x", "2": "x"}, 'different names, got "x" twice'),
        ({"0": "background", "1": None}, "must have names, got None"),
    ],
)
def test_labels_without_a_plain_meaning_are_refused(written, message):
    with pytest.raises(UserError, match=message) as error:
        read_labels({"labels": written}, "here")
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0}, "no structure but the background"),
        ({"background": 0, "ignore": 1}, "no structure but the background"),
        ({"background": 0, "liver": 1, "spleen": 3}, "without gaps, got background: 0, liver: 1, spleen: 3"),
        ({"background": 0, "liver": 1, "spleen": 1}, "different values"),
        ({**PLAIN, "ignore": 2}, "ignore must have the value 3, one more than the highest label, got 2"),
        ({**PLAIN, "ignore": 255}, "ignore must have the value 3"),
    ],
)
def test_labels_that_nnunet_cannot_be_trained_on_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        check_trainable(labels, "here")


def test_regions_may_have_gaps_because_nnunet_counts_regions():
    labels = {"background": 0, "whole": [1, 2, 4], "core": [1, 4], "enhancing": 4}
    check_trainable(labels, "here")
    assert LabelManager(labels, [2, 1, 4]).num_segmentation_heads == 3


def described(tmp_path, **changes):
    content = {"channel_names": {"0": "CT"}, "labels": PLAIN, "file_ending": ".nii.gz", "numTraining": 1, **changes}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def test_nnunets_label_manager_accepts_what_is_read(tmp_path):
    labels = {"background": [0], "whole": ["1", "2"], "core": [2], "ignore": "3"}
    read = read_labelled_json(described(tmp_path, labels=labels, regions_class_order=["1", 2.0]))
    manager = LabelManager(read["labels"], read["regions_class_order"])
    assert manager.foreground_regions == [(1, 2), 2]
    assert manager.all_labels == [0, 1, 2]
    assert manager.ignore_label == 3
    assert read["regions_class_order"] == [1, 2]


@pytest.mark.parametrize("order", [..., [1], [1, 2, 3], "12", [1, 7], [1, None]])
def test_regions_need_an_order_of_their_classes(order, tmp_path):
    path = described(tmp_path, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=order)
    with pytest.raises(UserError, match=r"regions_class_order must") as error:
        read_labelled_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_names": {"0": "T1", "1": "T2"}},
        {"channel_names": {"1": "T2", "0": "T1"}},
        {"channel_names": ["T1", "T2"]},
        {"channel_names": {"T1": 0, "T2": 1}},
        {"channel_names": {"T2": "1", "T1": "0"}},
        {"channel_names": {"1": "T1", "2": "T2"}},
        {"channel_names": ..., "modality": {"0": "T1", "1": "T2"}},
        {"channel_names": ..., "modality": ["T1", "T2"]},
        {"channel_names": {}, "modality": {"T1": 0, "T2": 1}},
    ],
)
def test_channel_names_are_read_in_every_spelling(changes, tmp_path):
    path = described(tmp_path, **changes)
    assert channel_names_in(json.loads(path.read_text())) == ("T1", "T2")
    read = read_labelled_json(path)
    assert list(read["channel_names"].items()) == [("0", "T1"), ("1", "T2")]
    assert "modality" not in read


def test_one_name_is_that_of_the_only_channel(tmp_path):
    assert read_labelled_json(described(tmp_path, channel_names="CT"))["channel_names"] == {"0": "CT"}


@pytest.mark.parametrize(
    "names",
    [
        {"0": "T1", "2": "T2"},
        {"T1": 0, "T2": 0},
        {"c0": "T1"},
        {"0": {"name": "T1"}},
        {"0": ""},
        [None],
        7,
        {"-1": "T1"},
    ],
)
def test_channel_names_without_a_plain_meaning_are_refused(names, tmp_path):
    path = described(tmp_path, channel_names=names)
    with pytest.raises(UserError, match="channel_names must have the form") as error:
        read_labelled_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["channel_names", "labels", "file_ending"])
def test_what_nnunet_needs_must_be_there(key, tmp_path):
    with pytest.raises(UserError, match=f"has no key '{key}'"):
        read_labelled_json(described(tmp_path, **{key: ...}))
    with pytest.raises(UserError, match="file_ending must be a text"):
        read_labelled_json(described(tmp_path, file_ending=3))
