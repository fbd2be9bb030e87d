"""The choice by ranks against pairwise comparisons, and that no scale of a measure matters."""

import random

import pytest

from nnssl.evaluation.method_choice import choose_candidate, mean_ranks


def slow_ranks(gains):
    """One duel after the other: a lost one costs a rank, a drawn one half a rank."""
    ranks = {}
    for name, own in gains.items():
        total = 0.0
        for number, value in enumerate(own):
            rank = 1.0
            for other, theirs in gains.items():
                if other != name and theirs[number] > value:
                    rank += 1
                elif other != name and theirs[number] == value:
                    rank += 0.5
            total += rank
        ranks[name] = total / len(own)
    return ranks


def slow_choice(gains):
    ranks = slow_ranks(gains)
    best = None
    for name, own in gains.items():
        if max(own) <= 0:
            continue
        better = best is None or ranks[name] < ranks[best]
        if better or (ranks[name] == ranks[best] and own[-1] > gains[best][-1]):
            best = name
    return best


@pytest.mark.parametrize("seed", range(40))
def test_ranks_and_choice_are_those_of_duels(seed):
    rng = random.Random(seed)
    count, measures = rng.randint(1, 6), rng.randint(1, 3)
    # few different values, so that there are ties and candidates without any gain
    gains = {f"m{i}": [rng.choice((-0.2, -0.1, 0.0, 0.1, 0.3)) for _ in range(measures)] for i in range(count)}
    assert mean_ranks(gains) == pytest.approx(slow_ranks(gains))
    assert choose_candidate(gains) == slow_choice(gains)


def test_scales_do_not_matter():
    gains = {"a": [0.02, 0.1, 0.01], "b": [0.01, 0.9, 0.0], "c": [-0.5, 0.0, 0.005]}
    assert choose_candidate(gains) == "a"
    stretched = {name: [100 * own[0], own[1], own[2] ** 3] for name, own in gains.items()}
    assert mean_ranks(stretched) == mean_ranks(gains)


def test_without_a_gain_nothing_is_chosen():
    assert choose_candidate({"a": [0.0, -0.1], "b": [-0.3, 0.0]}) is None
    assert choose_candidate({}) is None
    # a loser in every other measure is chosen before one without any gain
    assert choose_candidate({"a": [0.0, 0.0], "b": [0.1, -0.5]}) == "b"
