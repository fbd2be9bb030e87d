"""What is measured of the network between the epochs of a run: the retrieval of views, and the Dice of a probe on request."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from nnssl.data.case_store import CaseStore
from nnssl.data.patients import set_aside
from nnssl.files import write_json
from nnssl.log import logger
from nnssl.methods.protocol import Exported
from trainers.pretraining.probe_run import KEY, ProbeRun
from trainers.pretraining.retrieval_run import RETRIEVAL_JSON, RetrievalRun
from trainers.pretraining.stage_run import RunOptions, StageRun

PROBE_JSON = "probe.json"


class Measurements:
    """The measurements of one run, in its first process; the other processes measure nothing.

    Attributes:
        probe: Probe on labelled cases; None for none.
        retrieval: Retrieval of views; None for none.

    Args:
        state: State of the measurements in the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.probe: ProbeRun | None = None
        self.retrieval: RetrievalRun | None = None
        self._state = state or {"probe": None, "retrieval": None, "chosen": None}
        self._chosen: dict[str, Any] | None = self._state["chosen"]

    def start(
        self,
        options: RunOptions,
        run: StageRun,
        architecture: dict[str, Any],
        cases: Path,
        exported: Exported,
        device: torch.device,
        starts_random: bool,
    ) -> None:
        """Prepare the measurements and restore the results that the checkpoint has of them.

        Args:
            options: Options of the run.
            run: The run.
            architecture: Network of the configuration, as the plan describes it.
            cases: Folder of all preprocessed cases of the configuration.
            exported: Weights that the stage exports.
            device: Device of the network.
            starts_random: Whether the run starts from random weights.
        """
        training = run.settings.training
        self._chosen = options.chosen or self._chosen
        if options.probe is not None:
            with_decoder = any("decoder.stages.".startswith(prefix) for prefix in exported.pretrained)
            self.probe = ProbeRun(options.probe, training.patch_size, training.epochs, with_decoder, device)
            self.probe.restore(self._state["probe"])
        if options.retrieval_every != 0:
            every = options.retrieval_every
            self.retrieval = RetrievalRun(cases, run, architecture, exported, device, starts_random, every)
            self.retrieval.restore(self._state["retrieval"])
            logger.info(self.retrieval.opening())
        elif aside := set_aside(CaseStore(cases).names):
            logger.info(f"{len(aside)} cases are set aside and not trained on: {', '.join(aside)}")

    def run(
        self,
        network: Any,
        finished_epochs: int,
        folder: Path,
        tell: Callable[[str], None],
        autocast: Callable[[], AbstractContextManager],
    ) -> dict[str, float]:
        """Measure what is due and return the values by the names of metrics.

        Args:
            network: Network of the run.
            finished_epochs: Number of finished epochs.
            folder: Results folder, which receives all results so far.
            tell: Function that receives one line per result.
            autocast: Function that returns the context of the run's precision.
        """
        values = {}
        if self.probe is not None and self.probe.is_due(finished_epochs):
            with autocast():
                values[KEY] = self.probe.measure(network, finished_epochs)
            tell(self.probe.describe())
            write_json(folder / PROBE_JSON, self.probe.state())
        if self.retrieval is not None and self.retrieval.is_due(finished_epochs):
            values |= self.retrieval.measure(network, finished_epochs)
            tell(self.retrieval.describe())
            write_json(folder / RETRIEVAL_JSON, self.retrieval.state())
        return values

    def are_best(self, finished_epochs: int) -> bool:
        """Return whether the probe was run after this number of epochs, above 0, and its Dice is the best so far."""
        return self.probe is not None and finished_epochs > 0 and self.probe.best["epochs"] == finished_epochs

    def state(self, leaves: bool = False) -> dict[str, Any]:
        """Return what a checkpoint stores of the measurements.

        Args:
            leaves: Whether the weights are saved because of the probe's Dice.
        """
        by_labels = self._chosen is not None and self._chosen["probe"] is not None
        return {
            "probe": self.probe.state(chose_weights=leaves or by_labels) if self.probe else self._state["probe"],
            "retrieval": self.retrieval.state() if self.retrieval else self._state["retrieval"],
            "chosen": self._chosen,
        }
