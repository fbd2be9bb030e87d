import re

import pytest

from nnssl.sizes import in_bytes, in_mm, in_time, in_voxels, in_words, length_in_patches

MAGNITUDES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "": 1}
UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (64, "64"),
        (999, "1,000"),
        (1234, "1,200"),
        (262_144, "260,000"),
        (994_999, "990,000"),
        (999_500, "1 million"),
        (1_048_576, "1 million"),
        (2_097_152, "2.1 million"),
        (16_777_216, "17 million"),
        (134_217_728, "130 million"),
        (999_900_000, "1 billion"),
        (8_400_000_000, "8.4 billion"),
        (3 * 10**16, "30,000 trillion"),
    ],
)
def test_counts_have_two_digits_and_words(count, text):
    assert in_words(count) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (512, "510 bytes"),
        (1000, "1 kB"),
        (201_326_592, "200 MB"),
        (999_990_000, "1 GB"),
        (1_577_058_304, "1.6 GB"),
        (80e9, "80 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_memory_has_two_digits_and_a_unit(size, text):
    assert in_bytes(size) == text


@pytest.mark.parametrize(("write", "units"), [(in_words, MAGNITUDES), (in_bytes, UNITS)])
def test_no_magnitude_is_written_with_an_exponent(write, units):
    for exponent in range(17):
        for digits in (1.0, 1.04, 1.3421, 2.5, 4.96, 9.4, 9.96, 9.9999):
            value = round(digits * 10**exponent)
            text = write(value)
            number, unit = re.fullmatch(r"(\d{1,3}(?:,\d{3})*(?:\.\d)?) ?([a-zA-Z]*)", text).groups()
            read = float(number.replace(",", "")) * units[unit]
            assert read == pytest.approx(value, rel=0.051), text


def test_sizes_along_axes():
    assert in_voxels((4.0, 8, 8)) == "4x8x8"
    assert in_mm((2.5, 1, 1.30225)) == "2.5 x 1 x 1.302"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.04 s"),
        (36, "36 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (5000, "83 min"),
        (5400, "1.5 h"),
        (6e6, "69 days"),
    ],
)
def test_a_duration_has_its_largest_unit(seconds, text):
    assert in_time(seconds) == text


def test_a_scan_is_counted_in_patches():
    assert length_in_patches((90.0, 60.0), (10, 20), (3.0, 1.5)) == pytest.approx([3.0, 2.0])
