import pytest

from nnssl.errors import ArgumentError

FLAGS = {"labels": "--labels", "modes": "--mode", "part": "--part"}


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("labels must be at least 1, got 0", ["labels"], "--labels must be at least 1, got 0"),
        ("labels and modes: choose other modes.", ["labels", "modes"], "--labels and --mode: choose other --mode."),
        ("part must be i/n, got part/2", ["part"], "--part must be i/n, got part/2"),
        ("/data/labels/seed0.txt: labels needs 4", ["labels"], "/data/labels/seed0.txt: --labels needs 4"),
        ("labels.txt: 3 unlabelled labels, my-labels", ["labels"], "labels.txt: 3 unlabelled --labels, my-labels"),
        ("folds must be 'all', got 3", ["folds"], "folds must be 'all', got 3"),
        ("modes must be one of a, b", [], "modes must be one of a, b"),
    ],
)
def test_arguments_become_flags_and_paths_stay(message, arguments, expected):
    error = ArgumentError(message, *arguments)
    assert str(error) == message
    assert error.with_flags(FLAGS) == expected
