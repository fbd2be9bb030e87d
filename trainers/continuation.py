"""Whether a checkpoint is of the run that is about to start: going on with anything else would be a silent mixture."""

import json
from pathlib import Path
from typing import Any

from nnssl.checkpoint import Provenance, to_plain
from nnssl.errors import UserError
from nnssl.methods.settings import describe_settings
from planners.plan import Plan


def plain_settings(settings: Any, origins: dict[str, str]) -> dict[str, Any]:
    """Return resolved settings by key as JSON knows them (lists for tuples), which is how a checkpoint holds them."""
    described = describe_settings(settings, origins)
    return json.loads(json.dumps({key: to_plain(entry["value"]) for key, entry in described.items()}))


def check_same_run(
    path: Path, found: Provenance, plan: Plan, configuration: str, stage: str, settings: dict[str, Any], seed: int
) -> None:
    """Check that a checkpoint is of the run that is about to start.

    Raises:
        UserError: it is of another stage, data set, plan, configuration, seed, or was run with other settings.
    """
    expected = {
        "stage": stage,
        "dataset_name": plan.dataset_name,
        "plans_name": plan.name,
        "configuration": configuration,
        "seed": seed,
    }
    for key, value in expected.items():
        if getattr(found, key) != value:
            raise UserError(f"{path}: is of {key} {getattr(found, key)}, this run of {value}; --restart starts again")
    changes = [
        f"{key} {found.settings.get(key)} -> {value}"
        for key, value in settings.items()
        if found.settings.get(key) != value
    ]
    if changes:
        raise UserError(
            f"{path}: was run with other settings ({', '.join(changes)}); --restart starts again with the new ones"
        )
    planned = (plan.nnunet["pretext"]["configurations"][configuration], plan.nnunet["configurations"])
    earlier = (found.plans["pretext"]["configurations"].get(configuration), found.plans["configurations"])
    if earlier != planned:
        raise UserError(f"{path}: was run with an earlier plan {plan.name}; --restart starts again with the new one")
