"""Statistics of a study, compared with SciPy on data with and without a known effect."""

import re

import numpy as np
import pytest
from scipy import stats

from nnssl.evaluation.metrics import CaseMetrics
from nnssl.study.statistics import (
    bootstrap_interval,
    case_scores,
    holm,
    judge,
    labels_of_scratch,
    paired_p_value,
    tabulate,
)
from nnssl.study.table import FEWEST_CASES, Cell, Gain, Interval, Rise

CASES, SEEDS = 20, (0, 1, 2)
SIMULATIONS = 200
QUICK = 100
"""Resamples of tests that do not check the interval."""


def make_cell(arm, dice, labels=5, seed=0, steps=300, mode="finetune", label="organ"):
    metrics = tuple(
        CaseMetrics(f"case_{number:02}", label, float(value), float(value) / 2, 3.0, 1.0, 1.0)
        for number, value in enumerate(dice)
    )
    return Cell(arm, mode, labels, seed, steps, metrics)


def make_study(rng, effects, cases=CASES, noise=0.05, lengths=(100, 300), rise=0.0):
    """Return scratch and arms with given effects; cases differ in difficulty, which all arms share."""
    difficulty = rng.uniform(0.5, 0.8, cases)
    cells = []
    for steps in lengths:
        for seed in SEEDS:
            for arm, effect in {"scratch": 0.0, **effects}.items():
                later = rise if steps == lengths[-1] else 0.0
                dice = difficulty + effect + later + noise * rng.standard_normal(cases)
                cells.append(make_cell(arm, dice, seed=seed, steps=steps))
    return cells


def last_rows(cells, resamples=QUICK):
    table = tabulate(cells, 2.0, resamples)
    longest = max(row.steps for row in table.rows)
    return {row.arm: row for row in table.rows if row.steps == longest}


def test_a_known_effect_is_found_and_covered():
    """The interval contains the true difference in about 95 % of the studies."""
    covered, found = 0, 0
    for number in range(SIMULATIONS):
        row = last_rows(make_study(np.random.default_rng(number), {"a": 0.05}), 400)["a"]
        covered += row.gain.difference.low <= 0.05 <= row.gain.difference.high
        found += row.verdict == "gain"
    assert 0.90 <= covered / SIMULATIONS <= 0.98
    assert found / SIMULATIONS > 0.95


@pytest.mark.nightly
def test_no_effect_raises_false_alarms_at_the_nominal_rate():
    """For one arm, 5 % of the p values are below 0.05. For four arms, 5 % of the studies have one below it after Holm."""
    single, family, claims = 0, 0, 0
    for number in range(SIMULATIONS):
        rows = last_rows(make_study(np.random.default_rng(1000 + number), dict.fromkeys("abcd", 0.0)))
        arms = [rows[arm] for arm in "abcd"]
        single += arms[0].gain.p_value < 0.05
        family += any(row.gain.p_holm < 0.05 for row in arms)
        claims += any(row.verdict in ("gain", "loss") for row in arms)
    low, high = stats.binom.interval(0.995, SIMULATIONS, 0.05)
    assert low <= single <= high
    assert family <= high  # arms share scratch, so Holm is conservative
    assert claims <= family


def test_the_numbers_are_scipys():
    rng = np.random.default_rng(3)
    cells = make_study(rng, {"a": 0.03, "b": 0.001})
    rows = last_rows(cells, 2000)
    dice = {
        arm: np.array([list(case_scores(c).values()) for c in cells if (c.arm, c.steps) == (arm, 300)])
        for arm in ("scratch", "a", "b")
    }
    p_values = []
    for arm in "ab":
        differences = (dice[arm] - dice["scratch"]).mean(axis=0)
        gain = rows[arm].gain
        assert gain.difference.mean == pytest.approx(differences.mean())
        assert gain.p_value == pytest.approx(stats.wilcoxon(differences).pvalue)
        expected = stats.bootstrap((differences,), np.mean, n_resamples=2000, rng=np.random.default_rng(0))
        assert gain.difference.low == pytest.approx(expected.confidence_interval.low)
        assert gain.difference.high == pytest.approx(expected.confidence_interval.high)
        assert gain.num_cases == CASES
        assert gain.seed_differences == pytest.approx((dice[arm] - dice["scratch"]).mean(axis=1))
        p_values.append(gain.p_value)
    assert [rows[arm].gain.p_holm for arm in "ab"] == pytest.approx(holm(p_values))
    assert rows["a"].dice.mean == pytest.approx(dice["a"].mean())
    assert rows["a"].nsd == pytest.approx(dice["a"].mean() / 2)
    assert rows["scratch"].gain is None


def test_significance_needs_six_pairs():
    """The smallest p belongs to differences of one sign: 2 of the 2**n equally likely patterns of signs."""
    for num_cases in range(1, 12):
        p = paired_p_value(np.linspace(0.1, 0.2, num_cases))
        assert p == pytest.approx(2 / 2**num_cases)
        assert (p < 0.05) == (num_cases >= FEWEST_CASES)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, 0.02, 0.02, 0.001]) == pytest.approx([0.06, 0.06, 0.06, 0.004])
    assert holm([]) == []


def test_degenerate_values():
    assert bootstrap_interval(np.array([0.7])) == Interval(0.7, 0.7, 0.7)
    assert bootstrap_interval(np.full(5, 0.3)).low == pytest.approx(0.3)
    assert paired_p_value(np.zeros(8)) == 1.0
    noise = np.full(8, 0.1 - 0.3 + 0.2) * np.arange(1, 9)
    assert noise.all()  # eight differences of one sign, none of them above 1e-15
    assert paired_p_value(noise) == 1.0
    interval = bootstrap_interval(np.array([0.1, 0.5, 0.6, 0.9]))
    assert interval.low < interval.mean < interval.high
    assert interval == bootstrap_interval(np.array([0.1, 0.5, 0.6, 0.9]))


def test_scores_are_means_over_the_classes_that_count():
    metrics = (
        CaseMetrics("a", "liver", 0.8, 0.1, 1.0, 1.0, 1.0),
        CaseMetrics("a", "spleen", 0.4, 0.1, 1.0, 1.0, 1.0),
        CaseMetrics("b", "liver", 0.6, 0.1, 1.0, 1.0, 1.0),
        CaseMetrics("b", "spleen", None, None, None, 0.0, 0.0),
        CaseMetrics("c", "liver", None, None, None, 0.0, 0.0),
    )
    cell = Cell("scratch", "finetune", 1, 0, 10, metrics)
    assert case_scores(cell) == pytest.approx({"a": 0.6, "b": 0.6})
    row = tabulate([cell], 2.0).rows[0]
    assert row.class_dice == pytest.approx({"liver": 0.7, "spleen": 0.4})
    assert (row.nsd, row.verdict, row.labels_of_scratch) == (pytest.approx(0.1), "", "")


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.5, "1"), (0.6, "2.2"), (0.7, "5"), (0.75, "10"), (0.81, "> 20"), (0.4, "< 1"), (0.8, "20")],
)
def test_annotation_saving_on_a_curve(target, expected):
    """The middle between 1 and 5 labels on a logarithmic scale is their geometric mean, 2.2."""
    assert labels_of_scratch({1: {"a": 0.5}, 5: {"a": 0.7}, 20: {"a": 0.8}}, {"a": target}) == expected


def test_the_last_crossing_counts_where_the_curve_falls():
    assert labels_of_scratch({1: {"a": 0.7}, 5: {"a": 0.5}, 20: {"a": 0.9}}, {"a": 0.6}) == "7.1"
    assert labels_of_scratch({1: {"a": 0.7}, 5: {"a": 0.5}, 20: {"a": 0.4}}, {"a": 0.6}) == "> 20"


def test_annotation_saving_counts_the_cases_that_all_have():
    curve = {1: {"a": 0.5, "b": 0.0, "c": 1.0}, 5: {"a": 0.7, "c": 1.0}}
    assert labels_of_scratch(curve, {"a": 0.6, "b": 1.0}) == "2.2"
    assert labels_of_scratch(curve, {"b": 1.0}) == ""
    assert labels_of_scratch({**curve, 20: {}}, {"a": 0.6, "b": 1.0}) == "2.2"
    assert labels_of_scratch({20: {}}, {"a": 0.6}) == ""


def test_the_interval_of_annotation_saving_covers_the_true_number():
    """The truth is 2.24 labels; cases differ in difficulty, which the arms share, and every point has noise of its own."""
    covered = 0
    for number in range(SIMULATIONS):
        rng = np.random.default_rng(number)
        difficulty = rng.uniform(-0.2, 0.2, CASES)
        points = [dice + difficulty + 0.05 * rng.standard_normal(CASES) for dice in (0.5, 0.7, 0.6)]
        few, many, target = ({str(case): value for case, value in enumerate(values)} for values in points)
        found = labels_of_scratch({1: few, 5: many}, target, QUICK)
        low, high = re.fullmatch(r"[\d.]+ \[([\d.]+), ([\d.]+)\]", found).groups()
        covered += float(low) <= 5**0.5 <= float(high)
    assert 0.88 <= covered / SIMULATIONS <= 0.98


def test_the_interval_of_annotation_saving_may_end_beyond_the_curve():
    curve = {1: {"a": 0.2, "b": 0.4}, 5: {"a": 0.3, "b": 0.6}}
    assert labels_of_scratch(curve, {"a": 0.1, "b": 0.7}, QUICK) == "2.9 [< 1, > 5]"
    cells = [make_cell("scratch", values.values(), labels) for labels, values in curve.items()]
    rows = tabulate([*cells, make_cell("a", (0.1, 0.7))], 2.0, QUICK).rows
    assert [row.labels_of_scratch for row in rows] == ["", "", "2.9 [< 1, > 5]"]


def gain(p_holm, *seeds, num_cases=20):
    return Gain(Interval(float(np.mean(seeds)), 0.0, 0.1), seeds, p_holm / 2, p_holm, num_cases)


STOPPED = Rise("finetune", 5, (100, 300), 0.01, begun=True, stopped=True)
RISING = Rise("finetune", 5, (100, 300), 0.123, begun=True, stopped=False)
NOT_BEGUN = Rise("finetune", 5, (100, 300), 0.01, begun=False, stopped=False)


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        ((gain(0.01, 0.1, 0.2), 300, STOPPED), "gain"),
        ((gain(0.01, -0.1, -0.2), 300, STOPPED), "loss"),
        ((gain(0.01, 0.1, -0.02), 300, STOPPED), "no difference seen"),
        ((gain(0.06, 0.1, 0.2), 300, STOPPED), "no difference seen"),
        ((gain(0.01, 0.1, 0.2), 100, STOPPED), "short schedule: no claim"),
        ((gain(0.01, 0.1, 0.2), 300, RISING), "scratch still rises by +12.3 points: no claim"),
        ((gain(0.01, 0.1, 0.2), 300, NOT_BEGUN), "scratch has hardly begun to segment: no claim"),
        ((gain(0.01, 0.1, 0.2), 300, None), "one length only: no claim"),
        ((gain(0.01, 0.1), 300, STOPPED), "one seed only: no claim"),
        ((gain(0.01, 0.1, 0.2, num_cases=5), 300, STOPPED), "fewer than 6 cases: no claim"),
        ((None, 300, STOPPED), "scratch is not finished: no claim"),
    ],
)
def test_verdicts(arguments, verdict):
    assert judge(*arguments) == verdict


def test_whether_scratch_has_stopped_is_measured_between_the_two_longest_lengths():
    rng = np.random.default_rng(0)
    cells = make_study(rng, {"a": 0.1}, noise=0.001, lengths=(50, 100, 300), rise=0.05)
    table = tabulate(cells, 2.0, QUICK)
    (rise,) = table.rises
    assert rise.steps == (100, 300)
    assert rise.difference == pytest.approx(0.05, abs=0.001)
    assert not rise.stopped
    verdicts = {row.steps: row.verdict for row in table.rows if row.arm == "a"}
    assert verdicts[300].startswith("scratch still rises by +5.0 points")
    assert verdicts[50] == verdicts[100] == "short schedule: no claim"


@pytest.mark.parametrize(("mode", "verdict"), [("finetune", "scratch has hardly begun"), ("linear", "gain")])
@pytest.mark.parametrize("scratch", [0.02, 0.12])
def test_standing_still_before_it_segments_is_not_the_end_of_learning(mode, verdict, scratch):
    """A network that finds next to nothing at both lengths has not stopped, except for a linear probe of random weights."""
    dice = np.linspace(0.8, 1.2, 20)
    cells = [
        make_cell(arm, scratch * dice + gain, steps=steps, seed=seed, mode=mode)
        for arm, gain in (("scratch", 0.0), ("a", 0.1))
        for steps in (100, 300)
        for seed in SEEDS
    ]
    assert last_rows(cells)["a"].verdict.startswith(verdict if scratch < 0.1 else "gain")


def test_an_unfinished_study_has_a_table_too():
    rng = np.random.default_rng(0)
    cells = [cell for cell in make_study(rng, {"a": 0.1}) if (cell.arm, cell.seed) != ("scratch", 2)]
    row = last_rows(cells)["a"]
    assert row.gain is None
    assert row.seeds == SEEDS
    assert row.verdict == "scratch is not finished: no claim"
    assert tabulate([], 2.0).rows == ()


def test_a_study_in_which_nothing_counts_has_a_table_too():
    nothing = tuple(CaseMetrics(f"case_{number}", "organ", None, None, None, 0.0, 0.0) for number in range(7))
    cells = [Cell(arm, "finetune", 5, 0, steps, nothing) for arm in ("scratch", "a") for steps in (100, 300)]
    table = tabulate(cells, 2.0, QUICK)
    assert [row.gain for row in table.rows] == [None] * 4
    assert [row.class_dice for row in table.rows] == [{"organ": None}] * 4
    assert [rise.difference for rise in table.rises] == [0.0]


def test_a_case_that_counts_on_one_side_only_is_in_the_mean_but_not_in_the_difference():
    cells = make_study(np.random.default_rng(0), {"a": 0.0})
    empty = CaseMetrics("empty", "organ", None, None, None, 0.0, 0.0)
    false_alarm = CaseMetrics("empty", "organ", 0.0, 0.0, 99.0, 1.0, 0.0)
    more = [
        Cell(c.arm, c.mode, c.labels, c.seed, c.steps, (*c.metrics, false_alarm if c.arm == "a" else empty))
        for c in cells
    ]
    before, after = last_rows(cells), last_rows(more)
    assert after["a"].dice.mean == pytest.approx(before["a"].dice.mean * CASES / (CASES + 1))
    assert after["scratch"].dice == before["scratch"].dice
    assert after["a"].gain == before["a"].gain


def test_the_two_directions_of_an_effect_are_distinguished():
    rows = last_rows(make_study(np.random.default_rng(0), {"better": 0.1, "worse": -0.1, "same": 0.0}))
    verdicts = {arm: rows[arm].verdict for arm in ("better", "worse", "same")}
    assert verdicts == {"better": "gain", "worse": "loss", "same": "no difference seen"}


def test_order_of_cells_does_not_matter():
    cells = make_study(np.random.default_rng(0), {"a": 0.1, "b": 0.0})
    table = tabulate(cells, 2.0, QUICK)
    assert [row.arm for row in table.rows] == ["scratch", "a", "b"] * 2
    shuffled = [*sorted(cells, key=lambda cell: (cell.arm, -cell.seed)), *cells[:0]]
    assert tabulate(shuffled, 2.0, QUICK) == table
