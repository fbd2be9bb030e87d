"""The methods that a short probe compares, the reasons for which others are left out, and the lengths of their short runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nnssl.errors import ArgumentError
from nnssl.methods import METHODS, Method
from nnssl.plan import Plan
from nnssl.schema import STRICT
from trainers.pretraining.stage_run import StageRun

UNETS = ("3d_fullres", "2d")
"""Configurations with nnU-Net's own network, plain or residual; the first one of a plan is probed by default."""
EPOCHS = 20
"""Largest number of epochs of a short stage; enough for a warm-up of a twentieth of the run."""


@dataclass(frozen=True)
class StageLength:
    """Length of a stage of a short run.

    Attributes:
        stage: Name of the stage.
        seconds_per_step: Measured duration of a step.
        epochs: Epochs of the short run.
        iterations_per_epoch: Optimizer steps of an epoch.
    """

    __pydantic_config__: ClassVar = STRICT

    stage: str
    seconds_per_step: float
    epochs: int
    iterations_per_epoch: int

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.epochs * self.iterations_per_epoch

    @property
    def overrides(self) -> tuple[str, ...]:
        """The length as settings ``key=value``."""
        return (
            f"{self.stage}.epochs={self.epochs}",
            f"{self.stage}.iterations_per_epoch={self.iterations_per_epoch}",
        )


def configuration_to_probe(plan: Plan, wanted: str | None) -> str:
    """Return the configuration whose network all candidates pretrain: the wanted one, or else that of nnU-Net's U-Net.

    Raises:
        UserError: If the plan does not have it.
    """
    if wanted is not None:
        plan.configuration(wanted)
        return wanted
    found = [name for name in UNETS if name in plan.pretext.configurations]
    if not found:
        known = ", ".join(sorted(plan.pretext.configurations))
        raise ArgumentError(
            f"configuration must be given for the method auto: plan {plan.name} of {plan.dataset_name} has no U-Net, only "
            f"{known}",
            "configuration",
        )
    return found[0]


def find_candidates(plan: Plan, configuration: str, wanted: Sequence[str]) -> tuple[tuple[Method, ...], dict[str, str]]:
    """Return the methods that a plan allows for a configuration, and the reasons for which the others are left out.

    Args:
        plan: Plan of the data set.
        configuration: Configuration that all candidates pretrain.
        wanted: Names of the methods to choose among; empty for all.

    Raises:
        ArgumentError: If a wanted method is unknown, named twice or left out by the plan, or if fewer than two remain.
    """
    left_out = {name: reason for name, method in METHODS.items() if (reason := _obstacle(method, plan, configuration))}
    for number, name in enumerate(wanted):
        if name not in METHODS:
            raise ArgumentError(f"candidates must be methods ({', '.join(METHODS)}), got {name}", "candidates")
        if name in wanted[:number]:
            raise ArgumentError(f"candidates must be different methods, got {name} more than once", "candidates")
        if name in left_out:
            raise ArgumentError(
                f"candidates must be methods that the plan allows, got {name}: {left_out[name]}", "candidates"
            )
    found = tuple(method for name, method in METHODS.items() if name not in left_out and (not wanted or name in wanted))
    if len(found) < 2:
        got = " ".join(method.name for method in found) or "none"
        raise ArgumentError(
            f"candidates must be at least two methods for {configuration} of plan {plan.name}, got {got}; name a method "
            "in place of auto",
            "candidates",
        )
    return found, {} if wanted else left_out


def _obstacle(method: Method, plan: Plan, configuration: str) -> str | None:
    """Return the reason for which a method cannot be run in a configuration of a plan; None if it can."""
    if configuration not in method.configurations:
        return f"needs {method.backbone} ({', '.join(method.configurations)})"
    for stage in method.stages:
        own = stage.runs_in(configuration)
        if own not in plan.pretext.configurations:
            return f"its stage {stage.name} needs {own}, which the plan does not have"
        if stage.name not in plan.pretext.configurations[own].stages:
            reasons = [
                each.reason
                for each in plan.pretext.decisions
                if (each.configuration, each.what, each.value) == (own, stage.name, "left out")
            ]
            return (
                f"the planner left out its stage {stage.name}: {reasons[0] if reasons else 'the plan is older than it'}"
            )
    return None


def share_of_run(seconds: float, runs: Sequence[StageRun], seconds_per_step: Sequence[float]) -> float:
    """Return the share of a method's steps that fits into some seconds, at most 1; all stages are shortened by it.

    Args:
        seconds: Wall time of all stages together.
        runs: The stages with their full lengths.
        seconds_per_step: Duration of a step of each stage.
    """
    whole = sum(run.settings.training.total_steps * each for run, each in zip(runs, seconds_per_step, strict=True))
    return min(1.0, seconds / whole)


def shorten(run: StageRun, share: float, seconds_per_step: float) -> StageLength:
    """Return the length of a stage that is shortened to a share of its steps, at least one step.

    It has ``EPOCHS`` epochs or somewhat fewer, but at least half of them if the full run has as many. Thus the warm-up, which is
    counted in epochs, keeps its share of the run. Of these numbers, the one that leaves the fewest steps over is taken.

    Args:
        run: The stage with its full length.
        share: Share of the steps, above 0 and at most 1.
        seconds_per_step: Duration of a step.
    """
    training = run.settings.training
    if share >= 1:
        return StageLength(run.stage.name, seconds_per_step, training.epochs, training.iterations_per_epoch)
    steps = max(1, int(share * training.total_steps))
    most = min(EPOCHS, training.epochs, steps)
    epochs = max(range((most + 1) // 2, most + 1), key=lambda number: (steps // number * number, number))
    return StageLength(run.stage.name, seconds_per_step, epochs, steps // epochs)


def check_lengths(epochs: int | Sequence[int] | None) -> None:
    """Check that the number of epochs of the chosen method does not depend on its number of stages.

    Raises:
        UserError: If it does.
    """
    if epochs is not None and not isinstance(epochs, int) and len(list(epochs)) > 1:
        raise ArgumentError(
            f"epochs must be one number for the method auto, whose number of stages is not known, got {len(list(epochs))} "
            "numbers",
            "epochs",
        )
