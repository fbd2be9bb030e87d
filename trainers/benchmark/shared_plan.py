"""The plan that all arms of a study share: one of nnssl, or the plain plan of nnU-Net that comes with a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.plan import Decision, Plan, plan_from_dict
from nnssl.weights.opened_checkpoint import open_checkpoint


@dataclass(frozen=True)
class SharedPlan:
    """Plan of a study.

    Attributes:
        nnunet: Content of the plans file.
        pretraining: The plan with nnssl's section; None for a plain plan, of weights that nnU-Net trained or that were exported.
    """

    nnunet: dict[str, Any]
    pretraining: Plan | None

    @property
    def name(self) -> str:
        """Name of the plan."""
        return str(self.nnunet["plans_name"])

    @property
    def dataset_name(self) -> str:
        """Name of the data set that it was made for."""
        return str(self.nnunet["dataset_name"])

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Decisions of nnssl's planner with their reasons; none for a plain plan."""
        return () if self.pretraining is None else tuple(self.pretraining.pretext.decisions)

    def check_configuration(self, name: str) -> None:
        """Check that the plan has a configuration.

        Raises:
            UserError: If the plan has no such configuration.
        """
        if self.pretraining is not None:
            self.pretraining.configuration(name)
        elif name not in self.nnunet["configurations"]:
            known = ", ".join(sorted(self.nnunet["configurations"]))
            raise UserError(f"plan {self.name} of {self.dataset_name} has no configuration {name!r}; it has {known}")


def plan_of_checkpoint(path: Path) -> SharedPlan:
    """Return the plan that comes with a checkpoint.

    Raises:
        UserError: If the checkpoint has none.
    """
    plans = open_checkpoint(path).own_provenance.plans
    return SharedPlan(plans, plan_from_dict(plans, str(path)) if "pretext" in plans else None)
