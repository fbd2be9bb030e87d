"""Choice of the learning rate of every arm, by the Dice of validation patients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnssl.study.statistics import case_scores
from nnssl.study.table import RateChoice

if TYPE_CHECKING:
    from trainers.benchmark.cells import StudyCells
    from trainers.benchmark.study import CellKey


def choose_rates(cells: "StudyCells") -> tuple[RateChoice, ...]:
    """Return the choices of all arms whose cells are finished; none if the study has one rate.

    The mean over seeds decides, so that all seeds of a row of the table have one rate.
    """
    study = cells.study
    groups: dict[tuple[str, str, int, int], list[CellKey]] = {}
    for cell in study.cells:
        if cell.rate is not None and study.validation:
            groups.setdefault((cell.arm, cell.mode, cell.labels, cell.epochs), []).append(cell)
    choices = []
    for (arm, mode, labels, _), members in groups.items():
        if not all(map(cells.is_finished, members)):
            continue
        found: dict[float, list[float]] = {}
        for cell in members:
            assert cell.rate is not None
            found.setdefault(cell.rate, []).append(validation_dice(cells, cell))
        dice = {rate: float(np.mean(values)) for rate, values in found.items()}
        choices.append(RateChoice(arm, mode, labels, study.steps(members[0]), dice))
    return tuple(choices)


def validation_dice(cells: "StudyCells", cell: "CellKey") -> float:
    """Return the mean Dice of a finished cell over its validation cases; 0 if no class is in any of them."""
    scores = list(case_scores(cells.read(cell, validation=True)).values())
    return float(np.mean(scores)) if scores else 0.0


def with_chosen_rates(cells: "StudyCells", keys: Sequence["CellKey"]) -> list["CellKey"]:
    """Return the cells that have one rate only or the rate that was chosen for them."""
    if not cells.study.validation:
        return list(keys)
    chosen = {(each.arm, each.mode, each.labels, each.steps): each.chosen for each in choose_rates(cells)}
    steps = cells.study.steps
    return [
        key for key in keys if key.rate is None or chosen.get((key.arm, key.mode, key.labels, steps(key))) == key.rate
    ]
