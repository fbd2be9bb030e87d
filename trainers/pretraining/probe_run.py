"""The online probe of a pretraining: the Dice of a linear layer on frozen features of a few labelled cases.

The cases are prepared as for fine-tuning: the plan of the pretraining is adopted for their data set, and nnU-Net
preprocesses them. The training does not depend on the probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.patients import patient_in_name
from nnssl.draws import make_generator
from nnssl.errors import ArgumentError
from nnssl.evaluation.labels import foreground_labels, ignore_label
from nnssl.evaluation.probe import IGNORED, LabelledTile, fit_probe, mean_dice, score_probe
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.paths import Folders, make_writable
from nnssl.plan import Plan
from nnssl.tables import points, signed_points
from planners.finetune_planner import adopt_plan
from trainers.finetuning.labelled_cases import find_labelled_cases, label_order
from trainers.finetuning.labelled_data import prepare_data

KEY = "probe_dice"
"""Name of the probe's Dice among the metrics."""
BEST = "checkpoint_probe_best.pth"
CASES = 4
"""Default number of labelled cases that the probe learns from; it is scored on as many others."""
PROBES = 20
"""Default number of probes per stage, approximately."""
TILES = 4
"""Number of tiles per case."""
TREND_PROBES = 5
"""Number of last probes that the trend is computed from."""
FLAT = 0.01
"""A trend with a smaller change of Dice over the last probes is called flat."""


@dataclass(frozen=True)
class ProbeOptions:
    """Everything that a run needs for its probe, as plain values that can be sent to other processes.

    Attributes:
        dataset_name: Name of the labelled data set.
        data_folder: Folder of the cases that nnU-Net preprocessed.
        labels: Label values by class, without the background.
        ignore: Label of voxels to ignore; None if there is none.
        train: Cases that the probe learns from.
        test: Cases that it is scored on.
        every: Epochs between two probes; None for about twenty probes per stage.
        contents: Digests of the images and labels of these cases.
    """

    dataset_name: str
    data_folder: Path
    labels: dict[str, int]
    ignore: int | None
    train: tuple[str, ...]
    test: tuple[str, ...]
    every: int | None = None
    contents: dict[str, str] = field(default_factory=dict)


def prepare_probe(
    dataset_name: str, plan: Plan, configuration: str, folders: Folders, cases: int, every: int | None, processes: int
) -> ProbeOptions:
    """Choose the labelled cases of a probe and preprocess their data set with the plan of the pretraining.

    Args:
        dataset_name: Labelled data set in nnU-Net's raw format.
        plan: Plan of the pretraining.
        configuration: Configuration that is pretrained.
        folders: nnU-Net's folders.
        cases: Number of cases to learn from, each of another patient; the probe is scored on as many further patients.
        every: Epochs between two probes; None for about twenty probes per stage.
        processes: Worker processes for preprocessing.

    Raises:
        UserError: If there are too few cases, if labels overlap, if the channels are not those of the plan, or if nnU-Net
            cannot prepare the data.
    """
    labelled = find_labelled_cases(dataset_name, folders)
    one_each = {patient_in_name(case): case for case in reversed(labelled)}
    if len(one_each) < 2 * cases:
        raise ArgumentError(
            f"probe_cases must be at most {len(one_each) // 2}, got {cases}: {dataset_name} has {len(one_each)} labelled "
            "patients, and as many are needed for scoring"
            if len(one_each) > 1
            else f"probe must be a data set with at least two labelled patients, got {dataset_name} with {len(one_each)}",
            "probe",
            "probe_cases",
        )
    content = read_labelled_json(folders.raw / dataset_name / "dataset.json")
    labels = foreground_labels(content)
    regions = [name for name, value in labels.items() if not isinstance(value, int)]
    if regions:
        raise ArgumentError(
            f"probe must be a data set without regions, got {dataset_name}, whose region {regions[0]} may overlap others",
            "probe",
        )
    order = label_order(sorted(one_each.values()), seed=0)
    # every process of torchrun gets here
    with only_process(make_writable(folders.preprocessed / dataset_name), "preparing labelled cases of a probe"):
        adopted = adopt_plan(plan.nnunet, dataset_name, folders)
        found = prepare_data(dataset_name, adopted, configuration, sorted(order[: 2 * cases]), folders, processes)
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    data = PlansManager(adopted.content).get_configuration(configuration).data_identifier
    train, test = tuple(sorted(order[:cases])), tuple(sorted(order[cases : 2 * cases]))
    logger.info(
        f"Probe on {dataset_name}: trained on {', '.join(train)}; scored on {', '.join(test)}. Do not use these as test cases"
    )
    values = {name: value for name, value in labels.items() if isinstance(value, int)}
    contents = {case: f"{own.images} {own.label}" for case, own in sorted(found.items())}
    return ProbeOptions(
        dataset_name,
        folders.preprocessed / dataset_name / data,
        values,
        ignore_label(content),
        train,
        test,
        every,
        contents,
    )


class ProbeRun:
    """The probe of one stage, with its tiles and the Dice of every probe so far."""

    def __init__(
        self, options: ProbeOptions, patch_size: Sequence[int], epochs: int, with_decoder: bool, device: torch.device
    ) -> None:
        self.options = options
        self.device = device
        self.with_decoder = with_decoder
        self.every = options.every or max(1, epochs // PROBES)
        self.epochs = epochs
        self.history: list[dict[str, Any]] = []
        logger.info(f"Reading tiles of {len(options.train) + len(options.test)} labelled cases for the probe ...")
        self.train, self.test = (read_tiles(options, cases, patch_size) for cases in (options.train, options.test))

    def is_due(self, finished_epochs: int) -> bool:
        """Return whether to probe after this number of epochs: before the first, after every ``every``-th and after the last."""
        return finished_epochs % self.every == 0 or finished_epochs == self.epochs

    def measure(self, network: Any, finished_epochs: int) -> float:
        """Fit and score the probe, add the result to the history, and return its mean Dice."""
        classes = (0, *self.options.labels.values())
        probe = fit_probe(network, self.train, classes, self.with_decoder, 0, self.device)
        dice = score_probe(network, probe, self.test, self.with_decoder, self.device)
        names = {value: name for name, value in self.options.labels.items()}
        mean = mean_dice(dice)
        self.history = [entry for entry in self.history if entry["epochs"] < finished_epochs]
        self.history.append(
            {"epochs": finished_epochs, "dice": {names[value]: own for value, own in dice.items()}, "mean": mean}
        )
        return mean

    @property
    def best(self) -> dict[str, Any]:
        """The result with the highest mean Dice, the earliest if several are equal. The probe before training does not count."""
        trained = [entry for entry in self.history if entry["epochs"] > 0] or self.history
        return max(trained, key=lambda entry: entry["mean"])

    def describe(self) -> str:
        """Return the last result, the best so far and the trend in one line."""
        last, best = self.history[-1], self.best
        if last["epochs"] == 0:
            return f"Probe before training: Dice {points(last['mean'])} points"
        return (
            f"Probe: Dice {points(last['mean'])} points (best {points(best['mean'])} after {best['epochs']} epochs; "
            f"{trend([entry['mean'] for entry in self.history])})"
        )

    def state(self, chose_weights: bool = False) -> dict[str, Any]:
        """Return the content of ``probe.json`` and of the probe's part of a checkpoint: the cases and every result.

        Args:
            chose_weights: Whether the weights are saved because of their Dice, so that the cases must not be test cases.
        """
        return {
            "dataset_name": self.options.dataset_name,
            "train": list(self.options.train),
            "test": list(self.options.test),
            "contents": self.options.contents,
            "chose_weights": chose_weights,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore the results of a checkpoint if they were measured on the same cases, and these have not changed since."""
        own = self.state()
        if state is None or any(state[key] != own[key] for key in ("dataset_name", "train", "test")):
            return
        if state.get("contents", own["contents"]) != own["contents"]:  # files of earlier versions lack it
            logger.info(
                f"Cases of the probe on {self.options.dataset_name} have changed; its earlier results are dropped"
            )
            return
        self.history = list(state["history"])


def trend(values: Sequence[float]) -> str:
    """Return the trend of the last probes in words: the change of Dice along a straight line fitted to them."""
    last = np.array(values[-TREND_PROBES:])
    if len(last) < 3:
        return "too early for a trend"
    change = float(np.polyfit(np.arange(len(last)), last, 1)[0] * (len(last) - 1))
    direction = "flat" if abs(change) < FLAT else "still rising" if change > 0 else "falling"
    return f"{direction}, {signed_points(change)} points over the last {len(last)} probes"


def read_tiles(options: ProbeOptions, cases: Sequence[str], patch_size: Sequence[int]) -> list[LabelledTile]:
    """Return tiles of labelled cases around foreground voxels; the draw depends on the case's name only.

    Args:
        options: Options of the probe.
        cases: Names of the cases.
        patch_size: Size of a tile in voxels, (z, y, x) or (y, x).

    Raises:
        UserError: If a case has no foreground.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    dataset = nnUNetDatasetBlosc2(str(options.data_folder), list(cases))
    tiles = []
    for case in cases:
        volume, segmentation, *_ = dataset.load_case(case)
        labels = np.asarray(segmentation[0]).astype(np.int16)
        if options.ignore is not None:
            labels[labels == options.ignore] = IGNORED
        generator = make_generator(0, "probe/tiles", case)
        present = [value for value in options.labels.values() if (labels == value).any()]
        if not present:
            raise ArgumentError(
                f"probe: case {case} of {options.dataset_name} has no foreground; label it or choose another data set",
                "probe",
            )
        for number in range(TILES):
            places = np.argwhere(labels == present[number % len(present)])
            centre = places[int(torch.randint(len(places), (1,), generator=generator))]
            size = (*[1] * (3 - len(patch_size)), *patch_size)
            box = [[int(c) - n // 2, int(c) - n // 2 + n] for c, n in zip(centre, size, strict=True)]
            tile = np.asarray(crop_and_pad_nd(volume, box, 0)).astype(np.float32)
            known = np.asarray(crop_and_pad_nd(labels[None], box, IGNORED))[0]
            if len(patch_size) == 2:
                tile, known = tile[:, 0], known[0]
            tiles.append(LabelledTile(case, np.ascontiguousarray(tile), np.ascontiguousarray(known)))
    return tiles
