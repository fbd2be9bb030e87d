"""Settings of a fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from trainers.finetuning.labelled_cases import Fold
from trainers.finetuning.recipes import Choices, NetworkKind, make_schedule
from trainers.finetuning.schedule import FinetuneSchedule, Optimizer, Recipe, Trained


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of ``finetune``.

    Attributes:
        configuration: Configuration of the weights' plan; None for the one they were pretrained with.
        scratch: Whether to train the same network from random weights as well.
        labels: Number of training cases, drawn with ``seed`` so that smaller subsets are contained in larger ones; all other
            cases are held out. Without it and without lists, nnU-Net's fold 0 is used.
        cases: File that lists the training cases, one name per line, in place of ``labels``.
        test_cases: File that lists the held-out cases.
        folds: Folds of nnU-Net's cross-validation to train, from 0 to 4, or ``"all"`` to train on all cases. They share a model
            folder, and are evaluated together once all five are finished. Without it, and without other choices, fold 0.
        seed: Random seed for the label subset, random weights and batches.
        epochs: Total number of epochs, warm-up included; the default is nnU-Net's.
        iterations_per_epoch: Optimizer steps per epoch.
        recipe: How the learning rate of the pretrained arm changes and which layers are trained first: ``"nnunet"``,
            ``"warmup"`` or ``"sawtooth"``. None for ``"sawtooth"`` with a U-Net, else ``"warmup"``.
        scratch_recipe: The same of the arm with random weights.
        warmup: Length of the warm-up: a share of the run if below 1, else a number of steps. None for a tenth, but at most
            12,500 steps.
        learning_rate: Highest learning rate of both arms; None for the default of optimizer, network and start
            (``trainers.finetuning.recipes``).
        head_learning_rate: Highest learning rate of layers that were not pretrained; None for ``learning_rate``.
        batch_size: Patches per step; None for the plan's.
        optimizer: ``"sgd"`` as in nnU-Net, ``"adam"``, which needs fewer steps, or ``"adamw"``, as in nnU-Net's training of
            Primus. None for the default: Adam for ``"linear"`` and hybrid networks, AdamW for Primus, else SGD.
        trained: What is trained of pretrained weights: ``"everything"``, ``"new"`` (what was not pretrained), ``"decoder"`` or
            ``"head"`` (the segmentation layers). From random weights, everything is trained.
        device: Device to compute on; None for a GPU if one is available, else the CPU.
        processes: Worker processes for preprocessing and evaluation; None for one per core, at most 8.
        plans_name: Name of the plan in the data set's folder; None to choose one.
        mode: ``"finetune"`` trains all weights, ``"linear"`` only the segmentation layer, ``"mean_teacher"`` all weights
            with a consistency term on unlabelled cases.
        unlabelled: Unlabelled images for ``"mean_teacher"``: a file with case names, one per line, or a data set (number or
            name), whose images are used except for those that are held out. None for all labelled cases that are neither trained
            on nor held out. The images of the training cases are used in addition.
        mirroring: Whether held-out cases are predicted as the mean over all mirrored images, as in nnU-Net; without it, the
            prediction of volumes takes an eighth of the time.
        num_gpus: Number of training processes, one per GPU, or CPU processes with ``device="cpu"``; they share the batch.
        save_probabilities: Whether the probabilities of the held-out cases are kept, which nnU-Net's ensembles of several
            configurations need.
        restart: Whether to delete existing results of these arms and train them again.
        track: Where curves and pictures are written besides ``progress.png``: ``"tensorboard"``, ``"wandb"`` (offline) or
            both. Each needs the extra of the same name. The training does not depend on it.
    """

    configuration: str | None = None
    scratch: bool = False
    labels: int | None = None
    cases: Path | None = None
    test_cases: Path | None = None
    folds: tuple[Fold, ...] = ()
    seed: int = 0
    epochs: int = 1000
    iterations_per_epoch: int = 250
    recipe: Recipe | None = None
    scratch_recipe: Recipe = "nnunet"
    warmup: float | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    trained: Trained = "everything"
    device: torch.device | str | None = None
    processes: int | None = None
    plans_name: str | None = None
    mode: str = "finetune"
    unlabelled: str | int | None = None
    mirroring: bool = True
    num_gpus: int = 1
    save_probabilities: bool = False
    restart: bool = False
    track: Sequence[str] = ()


def schedule_from(
    settings: FinetuneSettings, kind: NetworkKind, pretrained: bool, head: bool = False
) -> FinetuneSchedule:
    """Return the schedule of an arm, with the defaults of mode, network and start.

    Args:
        settings: How to fine-tune.
        kind: Kind of the network.
        pretrained: Whether the arm starts from pretrained weights.
        head: Whether the segmentation layers are kept, too.

    Raises:
        ArgumentError: If the mode is unknown, a number is out of range, or mode, optimizer and recipe do not fit.
    """
    choices = Choices(**{each.name: getattr(settings, each.name) for each in fields(Choices)})
    return make_schedule(settings.mode, choices, kind, pretrained, head)
