"""What the networks that leave short runs can do: the measures by which a method is chosen, all on the same cases and patches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import default_processes
from nnssl.data.patients import FEWEST_PATIENTS, set_aside
from nnssl.data.supervoxels import prepare_supervoxels
from nnssl.evaluation.probe import fit_probe, mean_dice, score_probe
from nnssl.evaluation.region_probe import draw_regions, measure_regions
from nnssl.evaluation.view_retrieval import PATCHES, draw_view_pairs, measure_retrieval, smallest_patch
from nnssl.log import logger
from nnssl.methods.regions import edges_of_patch
from nnssl.networks.backbone import build_network, planned_configuration
from nnssl.networks.primus_positions import architecture_of_patch
from nnssl.paths import Folders
from nnssl.plan import Plan
from nnssl.schema import STRICT
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from trainers.pretraining.patches import MOST_PROCESSES
from trainers.pretraining.probe_run import ProbeOptions, read_tiles

DICE = "dice"
"""Measure on labelled cases: the Dice of the linear probe."""
FEATURES = ("patches", "points", "regions")
"""Measures without labels; the last one decides between candidates with equal mean ranks."""
EVERYTHING = ("encoder.", "decoder.stages.", "transformer.blocks.")
"""Prefixes of all parts of a network whose features are measured."""

Values = dict[str, dict[str, float]]
"""Values from 0 to 1 by measure and by stage of the network."""


@dataclass(frozen=True)
class Score:
    """A measure of the network that leaves a run, from 0 to 1.

    Attributes:
        value: Mean over the stages that the method pretrains; for Dice, the value of all of them together.
        random: The same for random weights.
        stages: Value of each stage; empty for Dice.
    """

    __pydantic_config__: ClassVar = STRICT

    value: float
    random: float
    stages: dict[str, float]

    @property
    def gain(self) -> float:
        """Gain over random weights."""
        return self.value - self.random


class CandidateMeasures:
    """The measures of all candidates of a plan's configuration.

    Features are measured on cases that no candidate is trained on, if there are enough (``set_aside``).

    Attributes:
        chance: Expected value of features that say nothing, by measure.
        names: Names of the measures. One that the data do not allow is left out for all candidates.

    Args:
        plan: Plan of the data set.
        configuration: Configuration that all candidates pretrain.
        folders: nnU-Net's folders.
        seed: Random seed of the random weights.
        device: Device of the networks.
        probe: Labelled cases of the linear probe; None for no probe.
    """

    def __init__(
        self,
        plan: Plan,
        configuration: str,
        folders: Folders,
        seed: int,
        device: torch.device,
        probe: ProbeOptions | None,
    ) -> None:
        own = plan.configuration(configuration)
        planned = planned_configuration(plan.nnunet, configuration)
        is_unet = "input_shape" not in planned["architecture"]["arch_kwargs"]
        patch = (
            smallest_patch(own) if is_unet else own.patch_size
        )  # Primus accepts only the patch that it was built for
        store = CaseStore(folders.preprocessed / plan.dataset_name / own.case_folder)
        aside = set_aside(store.names)
        cases = aside or tuple(store.names)
        where = (
            f"{len(cases)} cases that are not trained on"
            if aside
            else (f"the training cases, since fewer than {FEWEST_PATIENTS} patients are too few to set some aside")
        )
        logger.info(f"Features of the candidates are measured on {where}")
        edge_mm = edges_of_patch(patch, own.spacing_mm, own.thick_axis)[-1]
        prepare_supervoxels(store.restricted_to(cases), (edge_mm,), min(MOST_PROCESSES, default_processes()))
        self._pairs = draw_view_pairs(store, cases, patch, own, PATCHES)
        self._regions = draw_regions(store, cases, patch, own, edge_mm, PATCHES)
        self._probe, self._device = probe, device
        self._architecture = architecture_of_patch(planned["architecture"], patch)
        self._channels, self._seed = len(planned["normalization_schemes"]), seed
        by_chance = (self._pairs.chance.pooled, self._pairs.chance.points, self._regions.chance)
        self.chance = {name: value for name, value in zip(FEATURES, by_chance, strict=True) if value is not None}
        self.names = ((DICE,) if probe else ()) + tuple(self.chance)
        self._random_dice: dict[bool, float] = {}
        if probe is not None:
            self._tiles = [read_tiles(probe, cases, patch) for cases in (probe.train, probe.test)]

    def scores(self, weights: OpenedCheckpoint) -> dict[str, Score]:
        """Return the scores of the network that a finished run exports, by measure."""
        pretrained = weights.own_provenance.pretrained
        network = weights.build_network(self._seed)
        weights.load_into(network)
        network = network.to(self._device)
        found = {}
        if self._probe is not None:
            with_decoder = _pretrains_decoder(pretrained)
            found[DICE] = Score(self._dice(network, with_decoder), self._dice_of_random(with_decoder), {})
        for name, stages in self._features(network, pretrained).items():
            random = [self._random_features[name][stage] for stage in stages]
            found[name] = Score(_mean(stages.values()), _mean(random), stages)
        return found

    def random_scores(self) -> dict[str, float]:
        """Return the values of random weights, over all stages of the network."""
        found = {DICE: self._dice_of_random(True)} if self._probe is not None else {}
        return found | {name: _mean(stages.values()) for name, stages in self._random_features.items()}

    @cached_property
    def _random_network(self) -> Any:
        return build_network(self._architecture, self._channels, 1, self._seed).to(self._device)

    @cached_property
    def _random_features(self) -> Values:
        return self._features(self._random_network, EVERYTHING)

    def _features(self, network: Any, pretrained: Sequence[str]) -> Values:
        """Return the measures without labels, by stage."""
        retrieved = measure_retrieval(network, self._pairs, pretrained, {}, self._device)
        values = {
            "patches": {name: each.pooled for name, each in retrieved.items()},
            "points": {name: each.points for name, each in retrieved.items()},
        }
        if "regions" in self.chance:
            values["regions"] = measure_regions(network, self._regions, pretrained, {}, self._device)
        return values

    def _dice_of_random(self, with_decoder: bool) -> float:
        if with_decoder not in self._random_dice:
            self._random_dice[with_decoder] = self._dice(self._random_network, with_decoder)
        return self._random_dice[with_decoder]

    def _dice(self, network: Any, with_decoder: bool) -> float:
        assert self._probe is not None
        train, test = self._tiles
        probe = fit_probe(network, train, (0, *self._probe.labels.values()), with_decoder, 0, self._device)
        return mean_dice(score_probe(network, probe, test, with_decoder, self._device))


def _pretrains_decoder(pretrained: Sequence[str]) -> bool:
    return any("decoder.stages.".startswith(prefix) for prefix in pretrained)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
