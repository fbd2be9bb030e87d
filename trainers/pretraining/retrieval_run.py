"""The retrieval of views during a run: what the features that leave it can do, beside random weights and chance.

It is measured on cases that the run is not trained on, if there are enough (``set_aside``). The training does not depend on
the values.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nnssl.data.case_store import CaseStore
from nnssl.data.patients import FEWEST_PATIENTS, set_aside
from nnssl.evaluation.view_retrieval import PATCHES, Retrieval, draw_view_pairs, measure_retrieval, smallest_patch
from nnssl.methods.protocol import Exported
from nnssl.networks.backbone import build_network
from nnssl.networks.primus_positions import architecture_of_patch
from trainers.pretraining.stage_run import StageRun

RETRIEVAL_JSON = "retrieval.json"
PREFIX = "retrieval_"
"""Start of the names of the values among the metrics."""
MEASUREMENTS = 10
"""Default number of measurements per stage, approximately."""
FEWEST_STEPS = 200
"""Smallest number of steps between two measurements by default, so that they take a small part of a short run."""


def training_cases(folder: Path) -> CaseStore:
    """Return the preprocessed cases of a folder without those that are set aside."""
    store = CaseStore(folder)
    aside = set(set_aside(store.names))
    return store.restricted_to([name for name in store.names if name not in aside])


def epochs_between(epochs: int, iterations_per_epoch: int) -> int:
    """Return the default number of epochs between two measurements: about ten in a stage, at least ``FEWEST_STEPS`` apart."""
    return max(1, epochs // MEASUREMENTS, math.ceil(FEWEST_STEPS / iterations_per_epoch))


class RetrievalRun:
    """The measurements of one stage.

    Attributes:
        history: Number of finished epochs and values by stage of the network, for every measurement.

    Args:
        folder: Folder of all preprocessed cases of the configuration.
        run: The run.
        architecture: Network of the configuration, as the plan describes it.
        exported: Weights that the stage exports.
        device: Device of the network.
        starts_random: Whether the network is random before the first step, so that it need not be measured twice.
        every: Epochs between two measurements, above 0; None for the default of ``epochs_between``.
    """

    def __init__(
        self,
        folder: Path,
        run: StageRun,
        architecture: dict[str, Any],
        exported: Exported,
        device: torch.device,
        starts_random: bool,
        every: int | None = None,
    ) -> None:
        store = CaseStore(folder)
        aside = set_aside(store.names)
        self.cases = aside or tuple(store.names)
        self.aside = bool(aside)
        self.exported = exported
        self.device = device
        training = run.settings.training
        self.epochs = training.epochs
        self.every = epochs_between(training.epochs, training.iterations_per_epoch) if every is None else every
        own = run.own
        patch = own.patch_size
        if "input_shape" not in architecture["arch_kwargs"]:  # Primus accepts only the patch that it was built for
            patch = smallest_patch(run.plan.configuration(run.configuration))
        self.patch_size = patch
        self.pairs = draw_view_pairs(store, self.cases, patch, own, PATCHES)
        self.random: dict[str, Retrieval] = {}
        self._architecture, self._seed = architecture_of_patch(architecture, patch), run.seed
        self._starts_random = starts_random
        self.history: list[dict[str, Any]] = []

    def _measure(self, network: Any) -> dict[str, Retrieval]:
        return measure_retrieval(network, self.pairs, self.exported.pretrained, self.exported.fixed, self.device)

    def _measure_random(self) -> dict[str, Retrieval]:
        channels = self.pairs.first.shape[1]
        return self._measure(build_network(self._architecture, channels, 1, self._seed).to(self.device))

    def is_due(self, finished_epochs: int) -> bool:
        """Return whether to measure after this number of epochs: before the first, every few, and after the last."""
        return finished_epochs % self.every == 0 or finished_epochs == self.epochs

    def measure(self, network: Any, finished_epochs: int) -> dict[str, float]:
        """Measure the network, add the result to the history, and return the values as metrics."""
        found = self._measure(network)
        if not self.random:
            self.random = found if self._starts_random and not finished_epochs else self._measure_random()
        self.history = [entry for entry in self.history if entry["epochs"] < finished_epochs]
        self.history.append({"epochs": finished_epochs, "stages": _plain(found)})
        return self.metrics(found)

    def metrics(self, found: dict[str, Retrieval]) -> dict[str, float]:
        """Return the mean over the stages, that of random weights, chance, and the value of every stage, by name."""
        values = {}
        for kind in ("pooled", "points"):
            values[f"{PREFIX}{kind}"] = mean_over_stages(found, kind)
            values[f"{PREFIX}{kind}_random"] = mean_over_stages(self.random, kind)
            values[f"{PREFIX}{kind}_chance"] = getattr(self.pairs.chance, kind)
            values |= {f"{PREFIX}{kind}_{name}": getattr(each, kind) for name, each in found.items()}
        return values

    def describe(self) -> str:
        """Return the last measurement in one line."""
        last = {name: Retrieval(**each) for name, each in self.history[-1]["stages"].items()}
        deepest = [name for name in last if name.startswith("encoder_")][-1]
        parts = []
        for kind, what in (("pooled", "patches"), ("points", "points")):
            own, random = (
                f"{mean_over_stages(stages, kind):.3f} and {getattr(stages[deepest], kind):.3f}"
                for stages in (last, self.random)
            )
            parts.append(f"{what} {own} (random weights {random}, chance {getattr(self.pairs.chance, kind):.3f})")
        return f"Other view found by the exported network, mean of its stages and {deepest}: {'; '.join(parts)}"

    def opening(self) -> str:
        """Return one line on the cases that features are measured on."""
        if not self.aside:
            return (
                f"Features are measured on patches of the training cases, since fewer than {FEWEST_PATIENTS} patients are "
                "too few to set some aside"
            )
        shown = ", ".join(self.cases[:4]) + (", ..." if len(self.cases) > 4 else "")
        return f"Features are measured on {len(self.cases)} cases that are not trained on: {shown}"

    def state(self) -> dict[str, Any]:
        """Return the content of ``retrieval.json`` and of the measurement's part of a checkpoint."""
        return {
            "cases": list(self.cases),
            "set_aside": self.aside,
            "patch_size": list(self.patch_size),
            "chance": asdict(self.pairs.chance),
            "random_weights": _plain(self.random),
            "history": self.history,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore the results of a checkpoint."""
        if state is not None:
            self.history = list(state["history"])
            self.random = {name: Retrieval(**each) for name, each in state["random_weights"].items()}


def mean_over_stages(stages: dict[str, Retrieval], kind: str) -> float:
    """Return the mean of a kind of retrieval over the stages of a network."""
    return sum(getattr(each, kind) for each in stages.values()) / len(stages)


def _plain(stages: dict[str, Retrieval]) -> dict[str, dict[str, float]]:
    return {name: asdict(each) for name, each in stages.items()}
