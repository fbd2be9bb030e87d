"""Columns stand below one another, and what is not there is a dash."""

from nnssl.tables import align, number


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
