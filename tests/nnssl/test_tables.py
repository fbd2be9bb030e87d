"""Columns stand below one another, and what is not there is a dash."""

import pytest

from nnssl.tables import align, number, points, signed_points


def test_names_stand_to_the_left_and_numbers_to_the_right():
    rows = [("class", "Dice", "why"), ("liver", "0.9", ""), ("left kidney", "10.25", "small")]
    assert align(rows, left=(0, 2)) == [
        "class         Dice  why",
        "liver          0.9",
        "left kidney  10.25  small",
    ]
    assert align(rows[:2]) == ["class  Dice  why", "liver   0.9"]


def test_numbers_have_digits_and_nothing_is_a_dash():
    assert [number(value, 2) for value in (0.126, -3.0, None)] == ["0.13", "-3.00", "-"]


def test_fractions_are_points():
    assert [points(value) for value in (0.7234, 1.0, 0.0, -0.0004, None)] == ["72.3", "100.0", "0.0", "0.0", "-"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0927, "+9.3"), (-0.0049, "-0.5"), (0.0004, "0.0"), (-0.0004, "0.0"), (None, "-")]
)
def test_signs(value, text):
    assert signed_points(value) == text
