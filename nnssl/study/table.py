"""The table of a label-efficiency study: what was measured in every cell, and what may be concluded from it."""

from dataclasses import dataclass

from nnssl.evaluation.metrics import CaseMetrics

SCRATCH = "scratch"


@dataclass(frozen=True)
class Cell:
    """One fine-tuned network and its held-out cases."""

    arm: str
    """As the user names it: ``pix2rep``, ``pcrl:attention=none``; ``scratch`` for random weights."""
    mode: str
    """``finetune``, ``linear`` or ``mean_teacher``."""
    labels: int
    """Labelled patients that were trained on."""
    seed: int
    steps: int
    """Optimizer steps of fine-tuning."""
    metrics: tuple[CaseMetrics, ...]
    """One entry for each held-out case and class."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """Difference from scratch with the same cases, seeds, schedule and mode, in Dice from -1 to 1."""

    difference: Interval
    seed_differences: tuple[float, ...]
    """Mean over the cases for each seed, in the order of the seeds."""
    p_value: float
    """Wilcoxon signed-rank test over cases, two-sided, of differences averaged over the seeds."""
    p_holm: float
    """The same after Holm's correction over the arms of the same mode, number of labels and length."""


@dataclass(frozen=True)
class Row:
    """One line of the table: an arm at one number of labels and one length, over all seeds."""

    arm: str
    mode: str
    labels: int
    steps: int
    seeds: tuple[int, ...]
    dice: Interval
    """Case scores are means over classes; they are averaged over seeds, then over cases."""
    seed_dice: tuple[float, ...]
    class_dice: dict[str, float | None]
    nsd: float | None
    hd95_mm: float | None
    gain: Gain | None
    """None for scratch, and where scratch lacks a seed that this arm has."""
    verdict: str
    """What may be said of the gain, in one line; empty for scratch."""
    labels_of_scratch: str
    """Labels that scratch needs for this Dice at this length: ``4.2``, ``> 20``, ``< 1``; empty for scratch."""


@dataclass(frozen=True)
class Rise:
    """How much scratch still gains from the second longest to the longest length."""

    mode: str
    labels: int
    steps: tuple[int, int]
    difference: float
    """In Dice from -1 to 1."""
    begun: bool
    """Whether scratch segments well enough at the longest length for standing still to be an end and not a beginning."""
    stopped: bool
    """Whether scratch has begun, and rises so little that it has stopped improving."""


@dataclass(frozen=True)
class StudyTable:
    """All rows in the order mode, labels, steps, arm (scratch first), and whether scratch has stopped improving."""

    rows: tuple[Row, ...]
    rises: tuple[Rise, ...]
    tolerance_mm: float
    """Of the normalised surface distance."""
    num_test_cases: int
