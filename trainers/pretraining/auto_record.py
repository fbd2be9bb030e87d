"""The record of a choice among methods: the files ``auto.json`` and ``auto.csv``, the table, and the choice in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from nnssl import schema
from nnssl.errors import ArgumentError
from nnssl.evaluation.method_choice import choose_candidate, mean_ranks
from nnssl.files import write_csv
from nnssl.schema import STRICT
from nnssl.tables import align, number, points, signed_points
from trainers.pretraining.candidate_scores import DICE, FEATURES, Score
from trainers.pretraining.candidates import StageLength

SCHEMA_VERSION = 1
AUTO_JSON, AUTO_CSV = "auto.json", "auto.csv"
MEASURES = (DICE, *FEATURES)


@dataclass(frozen=True)
class Asked:
    """Everything that determines the short runs and the choice.

    Attributes:
        budget_minutes: Wall time of all short runs together.
        candidates: Methods that are compared.
        seed: Random seed of the runs.
        overrides: Settings of the runs as ``key=value``, without their lengths.
        probe: Labelled data set of the linear probe; None without one.
        probe_cases: Number of labelled cases that the probe learns from; None without a probe.
        plan: Digest of the plan's configurations and of the preprocessed cases.
    """

    __pydantic_config__: ClassVar = STRICT

    budget_minutes: float
    candidates: tuple[str, ...]
    seed: int
    overrides: tuple[str, ...]
    probe: str | None
    probe_cases: int | None
    plan: str


@dataclass(frozen=True)
class Candidate:
    """A method and what is known of its short run so far.

    Attributes:
        method: Name of the method.
        stages: Length of each stage, fixed before the run starts; None if the steps have not been timed yet.
        minutes: Duration of the training; None if the run is not finished.
        scores: Scores of the exported network, by measure; None if they are not measured yet.
        failure: Reason for which the run ended without weights; None if it did not.
    """

    __pydantic_config__: ClassVar = STRICT

    method: str
    stages: tuple[StageLength, ...] | None = None
    minutes: float | None = None
    scores: dict[str, Score] | None = None
    failure: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.scores is not None or self.failure is not None

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps of all stages; None if it is not known yet."""
        return None if self.stages is None else sum(each.steps for each in self.stages)


@dataclass(frozen=True)
class AutoRecord:
    """The content of ``auto.json``.

    Attributes:
        schema_version: Version of the format.
        nnssl_version: Version that began the comparison.
        dataset_name: Data set that is pretrained on.
        plans_name: Name of its plan.
        configuration: Configuration that all candidates pretrain.
        asked: Arguments of the comparison.
        left_out: Reasons for which other methods are not candidates.
        candidates: The candidates in the order in which they are run.
        random_weights: Values of random weights by measure, over all stages of the network; None before the first measurement.
        chance: Values of features that say nothing, by measure; None before the first measurement.
        choice: Chosen method; None if nothing is chosen.
        reason: Reason for the choice, or for choosing nothing, in words; None before the comparison is finished.
    """

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    nnssl_version: str
    dataset_name: str
    plans_name: str
    configuration: str
    asked: Asked
    left_out: dict[str, str]
    candidates: tuple[Candidate, ...]
    random_weights: dict[str, float] | None = None
    chance: dict[str, float] | None = None
    choice: str | None = None
    reason: str | None = None

    def with_candidate(self, candidate: Candidate) -> "AutoRecord":
        """Return the record with new knowledge of a candidate."""
        changed = [candidate if each.method == candidate.method else each for each in self.candidates]
        return replace(self, candidates=tuple(changed))

    @property
    def scored(self) -> dict[str, dict[str, Score]]:
        """Scores of the candidates that have some, by method."""
        return {each.method: each.scores for each in self.candidates if each.scores is not None}

    @property
    def deciding(self) -> tuple[str, ...]:
        """Measures that decide: the Dice of the probe, or else all measures without labels."""
        measured = [name for name in MEASURES if all(name in scores for scores in self.scored.values())]
        return (DICE,) if DICE in measured else tuple(measured)

    @property
    def gains(self) -> dict[str, list[float]]:
        """Gains over random weights in the measures that decide, by method."""
        return {method: [scores[name].gain for name in self.deciding] for method, scores in self.scored.items()}


def read_record(path: Path) -> AutoRecord:
    """Read ``auto.json``.

    Raises:
        UserError: If it cannot be read or has another version.
    """
    return schema.read(AutoRecord, path, "record of a choice among methods", "use --restart to choose again")


def check_asked(path: Path, found: Asked, asked: Asked) -> None:
    """Check that a comparison continues with the arguments that it was begun with.

    Raises:
        ArgumentError: If it does not; the message names the first difference.
    """
    for field in fields(Asked):
        before, now = getattr(found, field.name), getattr(asked, field.name)
        if before != now:
            if field.name == "plan":
                raise ArgumentError(
                    f"{path}: made with an earlier plan or other preprocessed cases; use restart to choose again",
                    "restart",
                )
            raise ArgumentError(
                f"{path}: made with {field.name} {_shown(before)}, but this run has {_shown(now)}; use restart to choose again",
                field.name,
                "restart",
            )


def decide(record: AutoRecord) -> AutoRecord:
    """Return the record of a finished comparison with the choice and its reason.

    With a probe, the candidate with the highest Dice is chosen. Without one, the candidate with the best mean rank over the
    measures is chosen, each taken as its gain over random weights of the same stages. A candidate without a gain in any of these
    measures is never chosen.
    """
    if record.deciding == (DICE,):
        able = {method: scores[DICE].value for method, scores in record.scored.items() if scores[DICE].gain > 0}
        choice = max(able, key=lambda method: able[method], default=None)
    else:
        choice = choose_candidate(record.gains)
    if choice is None:
        return replace(record, choice=None, reason=_describe_nothing(record))
    return replace(record, choice=choice, reason=_describe_choice(record, choice))


def _describe_choice(record: AutoRecord, choice: str) -> str:
    own, others = record.scored[choice], [method for method in record.scored if method != choice]
    if record.deciding == (DICE,):
        scores = record.scored
        following = max(others, key=lambda method: scores[method][DICE].value, default=None)
        after = "" if following is None else f"next {following} {points(scores[following][DICE].value)}, "
        random = points(own[DICE].random)
        return f"{choice}: linear probe {points(own[DICE].value)}, {after}random weights {random} (Dice in points)"
    ranks = mean_ranks(record.gains)
    following = min(others, key=lambda method: ranks[method], default=None)
    after = "" if following is None else f", next {following} {ranks[following]:.1f}"
    gains = ", ".join(f"{name} {signed_points(own[name].gain)}" for name in record.deciding)
    return (
        f"{choice}: mean rank {ranks[choice]:.1f} of {len(ranks)}{after}; gains over random weights in points: {gains}"
    )


def _describe_nothing(record: AutoRecord) -> str:
    measures = "the linear probe" if record.deciding == (DICE,) else " or ".join(record.deciding)
    if not record.scored:
        return "no candidate finished its short run"
    return f"no candidate is above random weights in {measures}"


def ranks_of(record: AutoRecord) -> dict[str, float]:
    """Return the rank by which candidates are chosen, by method: by Dice with a probe, else the mean over the measures."""
    if record.deciding == (DICE,):
        return mean_ranks({method: [scores[DICE].value] for method, scores in record.scored.items()})
    return mean_ranks(record.gains) if record.scored else {}


def table_lines(record: AutoRecord) -> list[str]:
    """Return the table: one row per candidate, the best first, and rows for random weights and chance.

    Values are in points from 0 to 100, with the gain over random weights of the same stages.
    """
    ranks = ranks_of(record)
    shown = [name for name in MEASURES if record.random_weights and name in record.random_weights]
    rows = [["method", "steps", "minutes", *shown, "rank"]]
    for each in sorted(record.candidates, key=lambda each: ranks.get(each.method, float("inf"))):
        scores = each.scores or {}
        values = [
            f"{points(scores[name].value)} ({signed_points(scores[name].gain)})" if name in scores else "-"
            for name in shown
        ]
        steps = "-" if each.steps is None else str(each.steps)
        rows.append([each.method, steps, number(each.minutes, 1), *values, number(ranks.get(each.method), 1)])
    for title, known in (("random weights", record.random_weights), ("chance", record.chance)):
        rows.append([title, "-", "-", *(points((known or {}).get(name)) for name in shown), "-"])
    return align(rows)


def write_record(folder: Path, record: AutoRecord) -> None:
    """Write ``auto.json`` and ``auto.csv``, each atomically."""
    schema.write(folder / AUTO_JSON, record)
    ranks = ranks_of(record)
    header = ["method", "steps", "minutes", *(f"{name}{what}" for name in MEASURES for what in ("", "_random")), "rank"]
    rows: list[Sequence[Any]] = []
    for each in record.candidates:
        scores = each.scores or {}
        cells = [(scores[name].value, scores[name].random) if name in scores else ("", "") for name in MEASURES]
        values = [value for pair in cells for value in pair]
        known = ("" if value is None else value for value in (each.steps, each.minutes))
        rows.append([each.method, *known, *values, ranks.get(each.method, "")])
    write_csv(folder / AUTO_CSV, header, rows)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def describe_choice(record: AutoRecord, path: Path) -> dict[str, Any]:
    """Return what the chosen run records of the choice, as plain values."""
    scores = record.scored[record.choice] if record.choice is not None else {}
    return {
        "by": "auto",
        "reason": record.reason,
        "probe": record.asked.probe,
        "scores": {name: asdict(score) for name, score in scores.items()},
        "file": str(path),
    }
