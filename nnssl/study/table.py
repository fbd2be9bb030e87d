"""The table of a label-efficiency study: the measurements of every cell and the conclusions that they allow."""

from dataclasses import dataclass

from nnssl.evaluation.metrics import CaseMetrics

SCRATCH = "scratch"
FEWEST_CASES = 6
"""Smallest number of paired cases with which p can fall below 0.05.

The two-sided p of Wilcoxon's signed-rank test is smallest where all n differences have the same sign: 2 / 2**n, which is
0.0625 for five pairs and 0.031 for six. A p value of fewer pairs could not be significant and is not shown.
"""


@dataclass(frozen=True)
class Cell:
    """A fine-tuned network and its metrics on the held-out cases."""

    arm: str
    """Name given by the user, such as ``pix2rep`` or ``pcrl:attention=none``; ``scratch`` for random weights."""
    mode: str
    """``finetune``, ``linear`` or ``mean_teacher``."""
    labels: int
    """Number of labelled patients in the training set."""
    seed: int
    steps: int
    """Number of optimizer steps of fine-tuning."""
    metrics: tuple[CaseMetrics, ...]
    """One entry for each held-out case and class."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """Difference in Dice (-1 to 1) from scratch with the same cases, seeds, schedule and mode."""

    difference: Interval
    seed_differences: tuple[float, ...]
    """Mean difference over the cases for each seed, in the order of the seeds."""
    p_value: float
    """Two-sided p of Wilcoxon's signed-rank test over cases; differences are averaged over the seeds first."""
    p_holm: float
    """``p_value`` after Holm's correction over the arms of the same mode, number of labels and length."""
    num_cases: int
    """Number of paired cases, on which the difference and the test rest."""


@dataclass(frozen=True)
class Row:
    """A line of the table: an arm at one number of labels and one length, over all seeds."""

    arm: str
    mode: str
    labels: int
    steps: int
    seeds: tuple[int, ...]
    dice: Interval
    """Dice averaged over classes, then seeds, then cases."""
    seed_dice: tuple[float, ...]
    class_dice: dict[str, float | None]
    nsd: float | None
    hd95_mm: float | None
    gain: Gain | None
    """None for scratch, and where scratch lacks a seed that this arm has."""
    verdict: str
    """Conclusion that the gain allows, or the reason why it allows none; empty for scratch."""
    labels_of_scratch: str
    """Number of labels that scratch needs for this Dice at this length, with its 95 % interval; empty for scratch.

    For example ``4.2 [2.9, > 20]``: ``> 20`` and ``< 1`` are numbers beyond the ends of the curve of scratch.
    """


@dataclass(frozen=True)
class RateChoice:
    """The learning rates that an arm was trained with at one number of labels and one length, and the best of them."""

    arm: str
    mode: str
    labels: int
    steps: int
    dice: dict[float, float]
    """Mean Dice (0 to 1) over the validation cases and seeds, by learning rate."""

    @property
    def chosen(self) -> float:
        """The rate with the highest Dice; the first of equals."""
        return max(self.dice, key=lambda rate: self.dice[rate])


@dataclass(frozen=True)
class Rise:
    """Improvement of scratch from the second longest to the longest length."""

    mode: str
    labels: int
    steps: tuple[int, int]
    difference: float
    """Difference in Dice, -1 to 1."""
    begun: bool
    """Whether scratch has begun to segment at the longest length, so that a standstill can be the end of learning."""
    stopped: bool
    """Whether scratch has begun to segment and hardly rises any more."""


@dataclass(frozen=True)
class StudyTable:
    """The rows of a study in the order mode, labels, steps, arm (scratch first), and the improvement of scratch."""

    rows: tuple[Row, ...]
    rises: tuple[Rise, ...]
    tolerance_mm: float
    """Tolerance of the normalised surface distance in mm."""
    num_test_cases: int
