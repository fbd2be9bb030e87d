"""Selection of cases and slices, and the positions of the colours."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nnssl.study.segmentation_pictures import SegmentedCase, choose_cases, segmentation_figure, shown_slice


def test_lowest_median_and_highest_gain_are_shown():
    gains = {"a": 0.3, "b": -0.2, "c": 0.1, "d": 0.0, "e": 0.2}
    assert choose_cases(gains) == ["b", "c", "a"]
    assert choose_cases({"a": 0.1, "b": 0.2}) == ["a", "b"]
    assert choose_cases({"a": 0.1}) == ["a"]
    assert choose_cases({}) == []


def test_the_slice_with_the_most_foreground_across_the_thickest_axis():
    reference = np.zeros((4, 6, 5), np.int16)
    reference[2, 1:4, 1:3] = 2
    reference[:, 5, 4] = 1
    assert shown_slice(reference, (5.0, 1.0, 1.0)) == (0, 2)
    assert shown_slice(reference, (1.0, 5.0, 1.0)) == (1, 5)
    assert shown_slice(np.zeros((4, 6, 5), np.int16), (5.0, 1.0, 1.0)) == (0, 2)
    assert shown_slice(reference[:1], (1.0, 5.0, 1.0))[0] == 0  # a 2D image is shown as it is


def test_a_picture_has_a_panel_for_every_arm_and_paints_what_was_segmented():
    rng = np.random.default_rng(0)
    volume = rng.random((3, 12, 16))
    reference = np.zeros((3, 12, 16), np.int16)
    reference[1, 2:5, 3:9] = 1
    prediction = np.zeros_like(reference)
    prediction[1, 6:10, 8:14] = 2
    case = SegmentedCase(
        "case_1",
        volume,
        (8.0, 1.5, 1.0),
        reference,
        {"scratch": prediction, "pix2rep": reference},
        {"scratch": "Dice 0.0"},
    )
    figure = segmentation_figure([case, case], {"left": 1, "right": 2}, "title")
    FigureCanvasAgg(figure).draw()
    panels = figure.axes
    assert len(panels) == 2 * 4
    assert [axes.get_title() for axes in panels[:4]] == ["image", "reference", "scratch", "pix2rep"]
    assert panels[2].get_xlabel() == "Dice 0.0"
    assert len(panels[0].images) == 1
    for axes, shown in zip(panels[1:4], (reference, prediction, reference), strict=True):
        overlay = axes.images[1].get_array()
        np.testing.assert_array_equal(overlay[..., 3] > 0, shown[1] > 0)
        assert axes.get_aspect() == 1.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["left", "right"]
