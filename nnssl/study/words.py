"""Words and numbers of a study as readers see them.

Dice, differences of Dice and the normalised surface distance are stored from 0 to 1 and shown in points from 0 to 100.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from nnssl.study.table import FEWEST_CASES, SCRATCH, Gain, Interval, Row, StudyTable
from nnssl.tables import points, signed_points

GAIN, LOSS, NO_DIFFERENCE = "gain", "loss", "no difference seen"
"""Verdicts that state a result; every other verdict gives the reason why none can be stated."""
NO_CLAIM = ": no claim"
MODES = {"finetune": "fine-tuning", "linear": "linear probe", "mean_teacher": "mean teacher"}
NOTHING_YET = "No network of this study has been evaluated yet, so there is nothing to conclude."
FEW = 3
"""Largest number of arms, or of arms and modes, that a sentence lists by name."""


def interval_points(interval: Interval, signed: bool = False) -> str:
    """Return the bounds of an interval in points: ``[68.1, 75.2]``."""
    show = signed_points if signed else points
    return f"[{show(interval.low)}, {show(interval.high)}]"


def p_value(gain: Gain) -> str:
    """Return the corrected p value with three digits: ``0.012``, ``< 0.001``; ``n/a (2 pairs)`` for too few pairs."""
    if gain.num_cases < FEWEST_CASES:
        return f"n/a ({count(gain.num_cases, 'pair')})"
    return "< 0.001" if gain.p_holm < 0.001 else f"{gain.p_holm:.3f}"


def mode_name(mode: str) -> str:
    """Return the name of a mode for readers."""
    return MODES.get(mode, mode.replace("_", " "))


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: ``1 label``, ``5 labels``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def enumerate_words(words: Sequence[object]) -> str:
    """Return ``1``, ``1 and 5`` or ``1, 5 and 20``."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def summarise(table: StudyTable, dataset_name: str, source_name: str) -> tuple[str, ...]:
    """Summarise a study: what was compared, which gains and losses are claimed, and why the rest allows no claim.

    The summary rests on the verdicts at the longest length of each arm. A difference without a verdict is not mentioned.

    Args:
        table: Table of the study.
        dataset_name: Data set of fine-tuning and evaluation.
        source_name: Data set of pretraining.

    Returns:
        Up to three paragraphs.
    """
    if not table.rows:
        return (NOTHING_YET,)
    judged = _longest(table.rows)
    outcomes = {verdict: [row for row in judged if row.verdict == verdict] for verdict in (GAIN, LOSS)}
    claims = []
    if outcomes[GAIN]:
        claims.append(f"Pretraining helps{_list_claims(outcomes[GAIN], len(judged))}.")
    elif judged:
        which = f"any of the {len(judged)} comparisons" if len(judged) > 1 else "the only comparison"
        claims.append(f"No gain is claimed for {which}.")
    if outcomes[LOSS]:
        claims.append(f"Pretraining harms{_list_claims(outcomes[LOSS], len(judged))}.")
    if _two_lengths_only(table, outcomes[GAIN]):
        claims.append(
            "Scratch was measured at two lengths only; a third, longer one would show whether it has stopped improving."
        )
    sentences = [_describe(table, dataset_name, source_name), " ".join(claims), _describe_rest(judged)]
    return tuple(sentence for sentence in sentences if sentence)


def _two_lengths_only(table: StudyTable, gains: Iterable[Row]) -> bool:
    """Return whether a gain rests on two lengths of scratch only: scratch may not have begun to learn at either."""
    lengths: dict[tuple[str, int], set[int]] = {}
    for row in table.rows:
        if row.arm == SCRATCH:
            lengths.setdefault((row.mode, row.labels), set()).add(row.steps)
    return any(len(lengths.get((row.mode, row.labels), ())) == 2 for row in gains)


def _longest(rows: Iterable[Row]) -> list[Row]:
    """Return the row with the most steps for each arm, mode and number of labels, without scratch."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        key = (row.mode, row.arm, row.labels)
        if row.arm != SCRATCH and (key not in found or row.steps > found[key].steps):
            found[key] = row
    return list(found.values())


def _describe(table: StudyTable, dataset_name: str, source_name: str) -> str:
    arms = list(dict.fromkeys(row.arm for row in table.rows if row.arm != SCRATCH))
    labels = sorted({row.labels for row in table.rows})
    seeds = {seed for row in table.rows for seed in row.seeds}
    data = (
        f"on {dataset_name} with {enumerate_words(labels)} label{'' if labels == [1] else 's'} and "
        f"{count(len(seeds), 'seed')}, evaluated on {count(table.num_test_cases, 'held-out case')}"
    )
    if not arms:
        return f"So far, only training from scratch has been measured, {data}."
    named = enumerate_words(arms) if len(arms) <= FEW else f"{len(arms)} arms"
    were = "was" if len(arms) == 1 else "were"
    return f"{named}, pretrained on {source_name}, {were} compared with training from scratch {data}."


def _list_claims(rows: Sequence[Row], total: int) -> str:
    """Return each arm and mode with its numbers of labels and range of differences; only totals for more than ``FEW``."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.mode), []).append(row)
    if len(groups) <= FEW:
        parts = (
            f"{arm} ({_conditions(mode, [row.labels for row in members])}: {_difference_range(members)})"
            for (arm, mode), members in groups.items()
        )
        return f": {'; '.join(parts)}"
    most = max(rows, key=lambda row: abs(row.gain.difference.mean) if row.gain else 0.0)
    largest = f"most for {most.arm} ({_conditions(most.mode, [most.labels])})"
    return f" in {len(rows)} of {count(total, 'comparison')}, by {_difference_range(rows)}, {largest}"


def _conditions(mode: str, labels: Sequence[int]) -> str:
    return f"{mode_name(mode)}, {enumerate_words(labels)} {'label' if list(labels) == [1] else 'labels'}"


def _difference_range(rows: Sequence[Row]) -> str:
    differences = sorted(row.gain.difference.mean for row in rows if row.gain)
    bounds = dict.fromkeys(signed_points(value) for value in (*differences[:1], *differences[-1:]))
    return f"{' to '.join(bounds)} Dice points"


def _describe_rest(judged: Sequence[Row]) -> str:
    """State how many comparisons show no difference, and how many allow no claim for which reasons."""
    open_rows = [row for row in judged if row.verdict not in {GAIN, LOSS, NO_DIFFERENCE}]
    same = sum(row.verdict == NO_DIFFERENCE for row in judged)
    total = count(len(judged), "comparison")
    sentences = []
    if same:
        sentences.append(f"No difference was seen{'' if same == len(judged) else f' in {same} of {total}'}.")
    if open_rows:
        reasons = Counter(_reason(row) for row in open_rows)
        listed = ", ".join(f"{reason} ({number})" if len(reasons) > 1 else reason for reason, number in reasons.items())
        allows = f"{len(open_rows)} of {total} {'allows' if len(open_rows) == 1 else 'allow'} no claim"
        every = "Reason" if len(reasons) == 1 else "Reasons"
        sentences.append(f"{every if len(open_rows) == len(judged) else allows}: {listed}.")
    return " ".join(sentences)


def _reason(row: Row) -> str:
    """Return the reason of a verdict without a claim, less the numbers that differ between rows."""
    return re.sub(r" by [+-]?[\d.]+ points?", "", row.verdict.removesuffix(NO_CLAIM)) or "no verdict yet"
