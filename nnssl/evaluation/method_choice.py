"""Choice among pretrained networks by several measures that have no common scale.

The measures are compared by ranks, so that none outweighs the others because its values spread more.
"""

from collections.abc import Mapping, Sequence


def mean_ranks(gains: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean rank of each candidate over the measures; 1 is the best in all of them.

    Candidates with equal gains share the mean of their ranks.

    Args:
        gains: Gain over random weights in each measure, by candidate; the measures have the same order for all.
    """
    columns = list(zip(*gains.values(), strict=True))
    return {
        name: sum(_rank(value, column) for value, column in zip(own, columns, strict=True)) / len(own)
        for name, own in gains.items()
    }


def choose_candidate(gains: Mapping[str, Sequence[float]]) -> str | None:
    """Return the candidate with the best mean rank among those with a gain in at least one measure; None if there is none.

    Of candidates with equal mean ranks, the one with the larger gain in the last measure is chosen, and of these the first.

    Args:
        gains: As for ``mean_ranks``.
    """
    ranks = mean_ranks(gains)
    able = [name for name, own in gains.items() if any(gain > 0 for gain in own)]
    return min(able, key=lambda name: (ranks[name], -gains[name][-1]), default=None)


def _rank(value: float, column: Sequence[float]) -> float:
    better = sum(other > value for other in column)
    equal = sum(other == value for other in column)
    return better + (equal + 1) / 2
