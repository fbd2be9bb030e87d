"""Trials that estimate the duration of a cell before one has been run: steps, augmentation, tiles and one evaluated case.

Not measured are the set-up of a cell, deep supervision and the resampling of predictions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.data.raw import read_header
from nnssl.evaluation.labels import foreground_labels, ignore_label
from nnssl.evaluation.metrics import evaluate_folders
from nnssl.log import silence
from trainers.benchmark.study import Study
from trainers.finetuning.arm import augmentation_processes
from trainers.precision import choose_precision

TRIAL_STEPS = 3
"""Number of repetitions that are timed, after one to warm up."""
PASSES = {"finetune": 1.0, "linear": 1 / 3, "mean_teacher": 7 / 3}
"""Duration of a step of each mode in steps that train the whole network; a pass without gradient costs about a third.

A linear probe trains one layer on features without gradient. A mean teacher adds a step of the student on unlabelled patches
and a pass of the teacher.
"""
OVERLAP = 0.5
"""Step of nnU-Net's sliding window, as a share of the patch."""


@dataclass(frozen=True)
class Trial:
    """Measured durations in seconds."""

    step: float
    """Forward and backward pass of a batch."""
    held_out_batches: int
    """Number of held-out batches per epoch."""
    augmentation: float
    """Augmentation of a batch; 0 if other processes do it meanwhile."""
    prediction: float
    """All tiles of the held-out cases, with nnU-Net's mirrorings unless they are off."""
    evaluation: float
    """Metrics of the held-out cases."""

    def training(self, mode: str, epochs: int, steps: int) -> float:
        """Return the seconds that a cell trains."""
        batches = 2 if mode == "mean_teacher" else 1
        own = steps * (PASSES[mode] * self.step + batches * self.augmentation)
        return own + epochs * self.held_out_batches * self.step / 3

    @property
    def afterwards(self) -> float:
        """Seconds of prediction and evaluation."""
        return self.prediction + self.evaluation


def try_cell(study: Study) -> Trial:
    """Time the parts of a cell of a study, and write nothing."""
    configuration = study.nnunet_configuration
    patch = tuple(configuration["patch_size"])
    batch_size = study.settings.batch_size or configuration["batch_size"]
    alone = augmentation_processes(study.device) == 0
    return Trial(
        step=time_bare_step(study, study.settings.batch_size),
        augmentation=batch_size * time_augmentation(patch, _channels(study)) if alone else 0.0,
        held_out_batches=study.schedule(study.cells[0]).held_out_batches,
        prediction=number_of_passes(study) * time_tile(study),
        evaluation=time_evaluation(study) * -(-len(study.test) // study.processes),
    )


def time_bare_step(study: Study, batch_size: int | None) -> float:
    """Return the seconds of a forward and a backward pass of the network on a batch, without data loading.

    Args:
        study: Study that fine-tunes the network.
        batch_size: Patches per step; None for the plan's.
    """
    configuration = study.nnunet_configuration
    axes = len(configuration["patch_size"])
    network = study.build_network().to(study.device)
    precision = choose_precision(study.device)
    precision.lay_out(network, axes)
    size = (batch_size or configuration["batch_size"], _channels(study), *configuration["patch_size"])
    volumes: Any = precision.lay_out(torch.zeros(size, device=study.device), axes)

    def step() -> None:
        with precision.autocast(study.device):
            outputs = network(volumes)
        first = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        first.float().mean().backward()

    return _time(step, study.device)


def time_tile(study: Study) -> float:
    """Return the seconds of one pass of nnU-Net's prediction: one patch without gradient, in float32 on the CPU as there."""
    network = study.build_network().to(study.device).eval()
    volumes = torch.zeros(1, _channels(study), *study.nnunet_configuration["patch_size"], device=study.device)

    def predict() -> None:
        with torch.inference_mode(), torch.autocast(study.device.type, enabled=study.device.type == "cuda"):
            network(volumes)

    return _time(predict, study.device)


def number_of_passes(study: Study) -> int:
    """Return the number of passes that predict held-out and validation cases: all tiles, each in all mirrorings unless off.

    The sizes are those of the image headers, resampled to the spacing of the plan.
    """
    configuration = study.nnunet_configuration
    patch, spacing_mm = configuration["patch_size"], configuration["spacing"]
    order = study.plan.nnunet["transpose_forward"]
    tiles = 0
    for case in study.dataset.cases:
        if case.name not in (*study.test, *study.validation):
            continue
        shape, own_mm, _ = read_header(case, study.dataset.reader)
        slices = shape[order[0]] if len(patch) == 2 else 1
        axes = order[-len(patch) :]
        resampled = [round(shape[axis] * own_mm[axis] / mm) for axis, mm in zip(axes, spacing_mm, strict=True)]
        tiles += slices * tiles_of(resampled, patch)
    return tiles * (2 ** len(patch) if study.settings.mirroring else 1)


def tiles_of(shape: Sequence[int], patch: Sequence[int]) -> int:
    """Return the number of tiles of nnU-Net's sliding window over an image, which is padded to at least one patch."""
    padded = [max(size, side) for size, side in zip(shape, patch, strict=True)]
    starts = compute_steps_for_sliding_window(tuple(padded), tuple(patch), OVERLAP)
    return int(np.prod([len(each) for each in starts]))


def time_augmentation(patch: tuple[int, ...], channels: int) -> float:
    """Return the seconds in which nnU-Net augments a patch; its random choices are averaged over a few."""
    rotation = (-np.pi / 6, np.pi / 6)
    mirrored = tuple(range(len(patch)))
    augment = nnUNetTrainer.get_training_transforms(patch, rotation, None, mirrored, False, foreground_labels=(1,))
    larger = [round(1.25 * side) for side in patch]  # nnU-Net cuts the patch out of a larger one, which can be rotated
    image, labels = torch.zeros(channels, *larger), torch.zeros(1, *larger, dtype=torch.int16)
    return _time(lambda: augment(image=image, segmentation=labels), torch.device("cpu"))


def time_evaluation(study: Study) -> float:
    """Return the seconds in which one held-out case is evaluated: its reference against itself."""
    references: Path = study.folders.raw / study.dataset.name / "labelsTr"
    classes, tolerance_mm = foreground_labels(study.dataset_json), study.settings.tolerance_mm
    started = perf_counter()
    with silence():
        evaluate_folders(
            references, references, classes, tolerance_mm, ignore_label(study.dataset_json), 1, study.test[:1]
        )
    return perf_counter() - started


def _channels(study: Study) -> int:
    return len(study.nnunet_configuration["normalization_schemes"])


def _time(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, from a few calls after one to warm up."""
    work()
    wait_for(device)
    started = perf_counter()
    for _ in range(TRIAL_STEPS):
        work()
    wait_for(device)
    return (perf_counter() - started) / TRIAL_STEPS


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
