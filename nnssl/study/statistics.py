"""Statistics of a study: paired differences from scratch with intervals, tests and the rule for a claim.

The unit is the case. Its score is the mean Dice over its classes, averaged over the seeds. Intervals and tests tell how well
results generalise to other cases, but not to other labelled patients. The differences of the single seeds show the latter, so
a claim requires that all of them agree.

Source: Wilcoxon signed-rank test and bias-corrected bootstrap (Efron, JASA 1987) as implemented in SciPy; Holm, Scandinavian
Journal of Statistics 6, 1979.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from nnssl.study.table import FEWEST_CASES, SCRATCH, Cell, Gain, Interval, Rise, Row, StudyTable
from nnssl.study.words import GAIN, LOSS, NO_CLAIM, NO_DIFFERENCE
from nnssl.tables import signed_points

CONVERGED_RISE = 0.02
"""Rise in Dice from the second longest to the longest length below which scratch counts as having stopped improving."""
BEGUN_DICE = 0.1
"""Dice at the longest length below which a network has not begun to segment.

Such a network finds little but its largest class: if its Dice stands still, it does so before learning, not after.
"""
MAY_STAY_LOW = "linear"
"""Mode in which scratch may stay below ``BEGUN_DICE``, because a linear layer finds little in random features."""
LEVEL = 0.05
CONFIDENCE = 0.95
RESAMPLES = 5000
ROUNDING_DIGITS = 12
"""Decimal places of differences before they are ranked; otherwise 0.1 - 0.3 + 0.2 would count as a difference."""


def case_scores(cell: Cell) -> dict[str, float]:
    """Return the mean Dice of each case over its classes with a Dice; cases without any are omitted."""
    values: dict[str, list[float]] = defaultdict(list)
    for entry in cell.metrics:
        if entry.dice is not None:
            values[entry.case].append(entry.dice)
    return {case: float(np.mean(dice)) for case, dice in values.items()}


def bootstrap_interval(values: Float[np.ndarray, " case"], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return the mean and its 95 % interval by the bias-corrected and accelerated bootstrap over cases.

    Args:
        values: One value per case.
        seed: Random seed of the resampling.
        resamples: Number of bootstrap samples.

    Returns:
        Mean and interval; the interval has no width for a single case or equal values.
    """
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) < 1e-12:
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=resamples, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def paired_p_value(differences: Float[np.ndarray, " case"]) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test; 1 if all differences are 0."""
    rounded = np.round(differences, ROUNDING_DIGITS)
    if not np.any(rounded):
        return 1.0
    return float(stats.wilcoxon(rounded).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's method, which bounds the family-wise error rate, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def labels_to_reach(curve: Mapping[int, float], target: float) -> float:
    """Interpolate the number of labels that scratch needs to reach a Dice, linearly in the logarithm of labels.

    If the curve is not monotone, the last crossing counts, because scratch stays above the target from there on.

    Args:
        curve: Dice of scratch by number of labels.
        target: Dice to reach.

    Returns:
        Number of labels; infinity if the curve ends below the target, 0 if it is above the target from its beginning.
    """
    labels = sorted(curve)
    if curve[labels[-1]] < target:
        return math.inf
    below = [place for place, number in enumerate(labels) if curve[number] < target]
    if not below:
        return 0.0 if curve[labels[0]] > target else float(labels[0])
    first, second = labels[below[-1]], labels[below[-1] + 1]
    share = (target - curve[first]) / (curve[second] - curve[first])
    return math.exp(math.log(first) + share * (math.log(second) - math.log(first)))


def labels_of_scratch(
    curve: Mapping[int, Mapping[str, float]], target: Mapping[str, float], resamples: int = RESAMPLES
) -> str:
    """Return the number of labels that scratch needs for a method's Dice, with its 95 % percentile interval.

    The interval is that of a bootstrap over the held-out cases. Every sample has the same cases for the method and for all points
    of the curve. Only cases that all of them have scored count.

    Args:
        curve: Dice of scratch by number of labels and case.
        target: The method's Dice by case.
        resamples: Number of bootstrap samples.

    Returns:
        Text such as ``4.2 [2.9, > 20]``, where ``> 20`` and ``< 1`` stand for numbers beyond the ends of the curve; without an
        interval if there is only one case or one number of labels, empty if no case counts.
    """
    labels = sorted(number for number, scores in curve.items() if scores)
    cases = sorted(set(target).intersection(*(curve[number] for number in labels)))
    if not labels or not cases:
        return ""
    scores = np.array([[values[case] for case in cases] for values in (*(curve[number] for number in labels), target)])

    def needed(means: Float[np.ndarray, " point"]) -> float:
        return labels_to_reach(dict(zip(labels, means[:-1], strict=True)), means[-1])

    found = _label_text(needed(scores.mean(axis=1)), labels)
    if len(cases) < 2 or len(labels) < 2:
        return found
    drawn = np.random.default_rng(0).integers(len(cases), size=(resamples, len(cases)))
    samples = np.sort([needed(means) for means in scores[:, drawn].mean(axis=2).T])
    # Percentiles by rank, because infinite numbers cannot be interpolated.
    low, high = (samples[round(share * (resamples - 1))] for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return f"{found} [{_label_text(low, labels)}, {_label_text(high, labels)}]"


def _label_text(number: float, labels: Sequence[int]) -> str:
    if math.isinf(number):
        return f"> {labels[-1]}"
    if number == 0:
        return f"< {labels[0]}"
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def tabulate(cells: Sequence[Cell], tolerance_mm: float, resamples: int = RESAMPLES) -> StudyTable:
    """Compute the table of a study, which may be unfinished.

    Args:
        cells: Finished cells in any order.
        tolerance_mm: Tolerance of their normalised surface distance in mm.
        resamples: Number of samples of each bootstrap.
    """
    groups: dict[tuple[str, int, int], dict[str, dict[int, Cell]]] = defaultdict(lambda: defaultdict(dict))
    arms = list(dict.fromkeys([SCRATCH, *(cell.arm for cell in cells)]))
    for cell in cells:
        groups[cell.mode, cell.labels, cell.steps][cell.arm][cell.seed] = cell
    means = {key: _mean_by_case(_scores_of(found[SCRATCH])) for key, found in groups.items() if found.get(SCRATCH)}
    rises = _find_rises(groups, means)
    modes = list(dict.fromkeys(cell.mode for cell in cells))
    rows: list[Row] = []
    for key in sorted(groups, key=lambda key: (modes.index(key[0]), key[1], key[2])):
        rows += _rows_of_group(key, groups[key], arms, means, rises, resamples)
    cases = {entry.case for cell in cells for entry in cell.metrics}
    return StudyTable(tuple(rows), tuple(rises.values()), tolerance_mm, len(cases))


Group = Mapping[str, Mapping[int, Cell]]
Key = tuple[str, int, int]
"""Mode, number of labels, steps."""


def _rows_of_group(
    key: Key,
    group: Group,
    arms: Sequence[str],
    means: Mapping[Key, Mapping[str, float]],
    rises: Mapping[tuple[str, int], Rise],
    resamples: int,
) -> list[Row]:
    """Return the rows of one mode, number of labels and number of steps, which are compared with one another."""
    mode, labels, steps = key
    curve = {other[1]: by_case for other, by_case in means.items() if (other[0], other[2]) == (mode, steps)}
    scratch = group.get(SCRATCH, {})
    shared = {arm: sorted(set(group.get(arm, {})) & set(scratch)) for arm in arms if arm != SCRATCH and group.get(arm)}
    paired = {
        arm: _differences(group[arm], scratch, seeds) for arm, seeds in shared.items() if seeds == sorted(group[arm])
    }
    paired = {arm: differences for arm, differences in paired.items() if differences.size}
    p_values = {arm: paired_p_value(differences.mean(axis=0)) for arm, differences in paired.items()}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    rows = []
    for arm in arms:
        if not group.get(arm):
            continue
        gain = None
        if arm in paired:
            difference = bootstrap_interval(paired[arm].mean(axis=0), resamples=resamples)
            seeds = tuple(paired[arm].mean(axis=1).tolist())
            gain = Gain(difference, seeds, p_values[arm], corrected[arm], num_cases=paired[arm].shape[1])
        rows.append(_make_row(arm, key, group[arm], gain, curve, rises.get((mode, labels)), resamples))
    return rows


def _make_row(
    arm: str,
    key: Key,
    cells: Mapping[int, Cell],
    gain: Gain | None,
    curve: Mapping[int, Mapping[str, float]],
    rise: Rise | None,
    resamples: int,
) -> Row:
    mode, labels, steps = key
    seeds = tuple(sorted(cells))
    scores = _scores_of(cells)
    by_case = _mean_by_case(scores)
    entries = [entry for seed in seeds for entry in cells[seed].metrics]
    classes = dict.fromkeys(entry.label for entry in entries)
    dice = bootstrap_interval(np.array(list(by_case.values()) or [0.0]), resamples=resamples)
    return Row(
        arm=arm,
        mode=mode,
        labels=labels,
        steps=steps,
        seeds=seeds,
        dice=dice,
        seed_dice=tuple(float(np.mean(list(each.values()))) if each else 0.0 for each in scores),
        class_dice={name: _mean([e.dice for e in entries if e.label == name]) for name in classes},
        nsd=_mean([entry.nsd for entry in entries]),
        hd95_mm=_mean([entry.hd95_mm for entry in entries]),
        gain=gain,
        verdict="" if arm == SCRATCH else judge(gain, steps, rise),
        labels_of_scratch="" if arm == SCRATCH or not curve else labels_of_scratch(curve, by_case, resamples),
    )


def judge(gain: Gain | None, steps: int, rise: Rise | None) -> str:
    """Return the verdict on a gain: the conclusion that it allows, or the reason why it allows none.

    Args:
        gain: Gain over scratch; None if scratch lacks a seed.
        steps: Number of steps of fine-tuning.
        rise: Rise of scratch between its two longest lengths; None if there is only one length.
    """
    if gain is None:
        return f"scratch is not finished{NO_CLAIM}"
    if rise is None:
        return f"one length only{NO_CLAIM}"
    if steps < rise.steps[1]:
        return f"short schedule{NO_CLAIM}"
    if not rise.begun:
        return f"scratch has hardly begun to segment{NO_CLAIM}"
    if not rise.stopped:
        return f"scratch still rises by {signed_points(rise.difference)} points{NO_CLAIM}"
    if len(gain.seed_differences) < 2:
        return f"one seed only{NO_CLAIM}"
    if gain.num_cases < FEWEST_CASES:
        return f"fewer than {FEWEST_CASES} cases{NO_CLAIM}"
    if gain.p_holm < LEVEL and all(difference > 0 for difference in gain.seed_differences):
        return GAIN
    if gain.p_holm < LEVEL and all(difference < 0 for difference in gain.seed_differences):
        return LOSS
    return NO_DIFFERENCE


def _find_rises(groups: Mapping[Key, Group], means: Mapping[Key, object]) -> dict[tuple[str, int], Rise]:
    """Return the rise of scratch between its two longest lengths by mode and labels, over the seeds of both lengths."""
    rises = {}
    for mode, labels in dict.fromkeys((mode, labels) for mode, labels, _ in sorted(means)):
        lengths = sorted(steps for other, number, steps in means if (other, number) == (mode, labels))
        if len(lengths) < 2:
            continue
        before, after = (groups[mode, labels, steps][SCRATCH] for steps in lengths[-2:])
        common = sorted(set(before) & set(after))
        if not common:
            continue
        reached = _mean_of({s: after[s] for s in common})
        rise = reached - _mean_of({s: before[s] for s in common})
        begun = mode == MAY_STAY_LOW or reached >= BEGUN_DICE
        stopped = begun and rise < CONVERGED_RISE
        rises[mode, labels] = Rise(mode, labels, (lengths[-2], lengths[-1]), rise, begun, stopped)
    return rises


def _differences(
    arm: Mapping[int, Cell], scratch: Mapping[int, Cell], seeds: Sequence[int]
) -> Float[np.ndarray, "seed case"]:
    """Return the difference from scratch by seed and case, for the cases that every cell of both has scored."""
    ours, theirs = ([case_scores(cells[seed]) for seed in seeds] for cells in (arm, scratch))
    common = sorted(set.intersection(*(set(scores) for scores in (*ours, *theirs)))) if seeds else []
    return np.array([[a[case] - b[case] for case in common] for a, b in zip(ours, theirs, strict=True)])


def _scores_of(cells: Mapping[int, Cell]) -> list[dict[str, float]]:
    return [case_scores(cells[seed]) for seed in sorted(cells)]


def _mean_of(cells: Mapping[int, Cell]) -> float:
    scores = list(_mean_by_case(_scores_of(cells)).values())
    return float(np.mean(scores)) if scores else 0.0


def _mean_by_case(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over the seeds for each case."""
    values: dict[str, list[float]] = defaultdict(list)
    for each in scores:
        for case, score in each.items():
            values[case].append(score)
    return {case: float(np.mean(values[case])) for case in sorted(values)}


def _mean(values: Sequence[float | None]) -> float | None:
    counted = [value for value in values if value is not None]
    return float(np.mean(counted)) if counted else None
