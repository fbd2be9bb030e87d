"""What a study found, in words and numbers for a person.

Dice, its differences and the normalised surface distance are kept from 0 to 1 and shown in points from 0 to 100.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from nnssl.study.table import SCRATCH, Interval, Row, StudyTable

GAIN, LOSS, NO_DIFFERENCE = "gain", "loss", "no difference seen"
"""Verdicts that say something of the arm; every other one says why nothing is said."""
NO_CLAIM = ": no claim"
MODES = {"finetune": "fine-tuning", "linear": "linear probe", "mean_teacher": "mean teacher"}
NOTHING_YET = "No network of this study has been evaluated yet, so there is nothing to conclude."
NOTHING = "–"
FEW = 3
"""Arms, or arms and modes, that a sentence names one by one."""


def points(value: float | None) -> str:
    """Return a value from 0 to 1 in points: ``0.7234`` as ``72.3``; a dash for None."""
    return NOTHING if value is None else f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0")


def signed_points(value: float) -> str:
    """Return a difference in points with its sign: ``+9.3``, ``-0.5``, ``0.0``."""
    text = points(value)
    return f"+{text}" if float(text) > 0 else text


def interval_points(interval: Interval, signed: bool = False) -> str:
    """Return the bounds of an interval in points: ``[68.1, 75.2]``."""
    show = signed_points if signed else points
    return f"[{show(interval.low)}, {show(interval.high)}]"


def p_value(value: float) -> str:
    """Return a p value with three digits: ``0.012``, ``< 0.001``."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def mode_name(mode: str) -> str:
    """Return a mode in words."""
    return MODES.get(mode, mode.replace("_", " "))


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or the plural: ``1 label``, ``5 labels``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def enumerate_words(words: Sequence[object]) -> str:
    """Return ``1``, ``1 and 5`` or ``1, 5 and 20``."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def summarise(table: StudyTable, dataset_name: str, source_name: str) -> tuple[str, ...]:
    """Say in two or three sentences what was compared, which verdicts there are, and where nothing is claimed.

    Only the verdicts are read, of each arm's longest length: a difference without one is not mentioned.

    Args:
        table: of the study.
        dataset_name: what was fine-tuned and judged on.
        source_name: what was pretrained on.
    """
    if not table.rows:
        return (NOTHING_YET,)
    judged = _longest(table.rows)
    outcomes = {verdict: [row for row in judged if row.verdict == verdict] for verdict in (GAIN, LOSS)}
    claims = []
    if outcomes[GAIN]:
        claims.append(f"Pretraining helps{_list_claims(outcomes[GAIN], len(judged))}.")
    elif judged:
        claims.append("No gain over scratch can be claimed.")
    if outcomes[LOSS]:
        claims.append(f"Pretraining harms{_list_claims(outcomes[LOSS], len(judged))}.")
    if _two_lengths_only(table, outcomes[GAIN]):
        claims.append(
            "Scratch was seen at two lengths only; a third, longer one would show whether it has stopped improving."
        )
    sentences = [_describe(table, dataset_name, source_name), " ".join(claims), _describe_rest(judged)]
    return tuple(sentence for sentence in sentences if sentence)


def _two_lengths_only(table: StudyTable, gains: Iterable[Row]) -> bool:
    """Whether some gain rests on two lengths of scratch, which may both be too early for it to have begun to learn."""
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
        f"{count(len(seeds), 'seed')}, judged on {count(table.num_test_cases, 'held-out case')}"
    )
    if not arms:
        return f"So far only training from scratch was measured, {data}."
    named = enumerate_words(arms) if len(arms) <= FEW else f"{len(arms)} arms"
    were = "was" if len(arms) == 1 else "were"
    return f"{named}, pretrained on {source_name}, {were} compared with training from scratch {data}."


def _list_claims(rows: Sequence[Row], total: int) -> str:
    """Return each arm and mode with its numbers of labels and range of differences, or how many where they are many."""
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
    return f"{' to '.join(bounds)} points of Dice"


def _describe_rest(judged: Sequence[Row]) -> str:
    """Say how many comparisons have no claim, and why."""
    open_rows = [row for row in judged if row.verdict not in {GAIN, LOSS, NO_DIFFERENCE}]
    same = sum(row.verdict == NO_DIFFERENCE for row in judged)
    parts = [f"no difference was seen in {same}"] if same else []
    if open_rows:
        reasons = Counter(_reason(row) for row in open_rows)
        listed = "; ".join(f"{reason}: {number}" if len(reasons) > 1 else reason for reason, number in reasons.items())
        parts.append(f"nothing is claimed for {len(open_rows)} ({listed})")
    return f"Of {count(len(judged), 'comparison')} {enumerate_words(parts)}." if parts else ""


def _reason(row: Row) -> str:
    """Return why a verdict claims nothing, without the numbers in which rows differ."""
    return re.sub(r" by [+-]?[\d.]+ points?", "", row.verdict.removesuffix(NO_CLAIM)) or "no verdict yet"
