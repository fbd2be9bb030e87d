"""Arms whose method is chosen on the pretraining data, without labels, before the study begins."""

from collections.abc import Sequence
from dataclasses import replace

from nnssl.errors import ArgumentError
from nnssl.files import content_digest
from nnssl.methods import AUTO, find_method
from nnssl.paths import PROBES_FOLDER
from trainers.benchmark.arms import OWN_FOLDER, Arm, Source
from trainers.pretraining.auto import Comparison, choose_method, open_comparison, stored_record
from trainers.pretraining.auto_record import AutoRecord
from trainers.pretraining.settings import BUDGET_MINUTES, PretrainSettings

OPEN = "not chosen yet"


def comparison_of(arm: Arm, source: Source) -> Comparison:
    """Return the comparison by which the method of an arm is chosen; write nothing.

    The comparison of ``nnssl_pretrain -m auto`` serves if it was made with the same arguments, so that the study evaluates that
    choice. One that was made with labels or with other arguments does not; the arm then has a comparison of its own.

    Raises:
        UserError: If the plan allows fewer than two candidates, or a setting is wrong.
    """
    settings = PretrainSettings(
        configuration=source.configuration,
        plans_name=source.plan.name,
        overrides=(*source.overrides, *arm.overrides),
        seed=source.seed,
        device=source.device,
        budget_minutes=BUDGET_MINUTES if arm.budget_minutes is None else arm.budget_minutes,
        candidates=arm.candidates,
    )
    shared = open_comparison(source.plan.dataset_name, settings, source.folders)
    try:
        if stored_record(shared) is not None:
            return shared
    except ArgumentError:  # made with other arguments
        pass
    asked = shared.asked
    digest = content_digest([asked.budget_minutes, asked.candidates, asked.seed, asked.overrides, asked.plan])
    own = source.folders.results / OWN_FOLDER / f"{AUTO}-{digest}"
    return replace(shared, folder=own / PROBES_FOLDER / shared.folder.name)


def settle_all(arms: Sequence[Arm], source: Source | None) -> tuple[tuple[Arm, ...], tuple[Arm, ...]]:
    """Return the arms with the chosen methods, and those whose method is not chosen yet, as the user named them.

    Raises:
        UserError: As ``comparison_of``.
    """
    if source is None:
        return tuple(arms), ()
    settled = tuple(settle(arm, source) if arm.method == AUTO else arm for arm in arms)
    pairs = zip(arms, settled, strict=True)
    return settled, tuple(given for given, arm in pairs if given.method == AUTO and not arm.reason)


def settle(arm: Arm, source: Source) -> Arm:
    """Return an arm with the chosen method; with the first candidate, and no reason, if nothing is chosen yet.

    The name says what was chosen.

    Raises:
        UserError: As ``comparison_of``.
    """
    comparison = comparison_of(arm, source)
    record = stored_record(comparison)
    choice = record.choice if record is not None else None
    method = find_method(choice or comparison.asked.candidates[0])
    return replace(
        arm,
        name=f"{arm.name} ({choice or OPEN})",
        method=method.name,
        stages=tuple(stage.name for stage in method.stages),
        reason=record.reason if record is not None and choice is not None else None,
    )


def choose(arm: Arm, source: Source) -> AutoRecord:
    """Choose the method of an arm, as it was parsed, by short runs on the pretraining data.

    Raises:
        UserError: As ``choose_method``.
    """
    return choose_method(comparison_of(arm, source))


def describe_open(arm: Arm, source: Source) -> str:
    """Return a line that says how the method of an arm will be chosen."""
    asked = comparison_of(arm, source).asked
    return (
        f"{arm.name}: the method will be chosen by short runs of {', '.join(asked.candidates)} on {source.plan.dataset_name}, "
        f"about {asked.budget_minutes:g} min; until then, {asked.candidates[0]} stands for it below"
    )
