"""The user's settings of a study."""

from dataclasses import dataclass
from pathlib import Path

from nnssl.errors import ArgumentError
from nnssl.plan import PLANS_NAME
from trainers.finetuning.schedule import Optimizer, check_mode


@dataclass(frozen=True)
class StudySettings:
    """Settings of ``benchmark``.

    Attributes:
        dataset: Labelled data set, number or name.
        arms: Pretrainings to compare with scratch: methods, methods with settings (``pix2rep:temperature=0.2``), single
            stages (``reprec.generative``) or checkpoints (``FILE.pth``, ``NAME=FILE.pth``).
        labels: Numbers of labelled patients.
        epochs: Lengths of fine-tuning in epochs.
        source: Data set to pretrain on; None for the one that was planned last, or that of the first checkpoint.
        plans_name: Name of the source's plan.
        seeds: Number of seeds; the seeds are 0, 1, ...
        modes: Modes of fine-tuning (``finetune``, ``linear``, ``mean_teacher``).
        iterations_per_epoch: Optimizer steps per epoch.
        batch_size: Patches per step of fine-tuning; None for the plan's.
        optimizer: Optimizer of fine-tuning; None for the mode's.
        learning_rate: Learning rate of the modes that train the whole network; None for the mode's.
        configuration: Configuration to fine-tune; None to choose one that fits all arms.
        test_cases: File that lists the cases to hold out; None to draw patients.
        test_patients: Number of patients to draw; None for a quarter of them.
        patients: Table of cases and patients; None to derive the patients from the names of the cases.
        subsets: Folder with ``seed0.txt``, ..., which list labelled cases in the order in which they are added; None to
            draw the order.
        pretrain_overrides: Settings of every pretraining, as ``key=value``.
        tolerance_mm: Tolerance of the normalised surface distance, in mm.
    """

    dataset: str | int
    arms: tuple[str, ...]
    labels: tuple[int, ...]
    epochs: tuple[int, ...]
    source: str | int | None = None
    plans_name: str = PLANS_NAME
    seeds: int = 3
    modes: tuple[str, ...] = ("finetune",)
    iterations_per_epoch: int = 250
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    learning_rate: float | None = None
    configuration: str | None = None
    test_cases: Path | None = None
    test_patients: int | None = None
    patients: Path | None = None
    subsets: Path | None = None
    pretrain_overrides: tuple[str, ...] = ()
    tolerance_mm: float = 2.0


def check_settings(settings: StudySettings) -> None:
    """Check the settings that can be checked without data.

    Raises:
        ArgumentError: If one is wrong.
    """
    for name, values in (("labels", settings.labels), ("epochs", settings.epochs), ("modes", settings.modes)):
        if not values or len(set(values)) != len(values):
            got = " ".join(map(str, values)) or "none"
            raise ArgumentError(f"{name} must be one or more different values, got {got}", name)
    for name, least in (("labels", min(settings.labels)), ("seeds", settings.seeds)):
        if least < 1:
            raise ArgumentError(f"{name} must be at least 1, got {least}", name)
    for mode in settings.modes:
        check_mode(mode)
    if settings.tolerance_mm <= 0:
        raise ArgumentError(f"tolerance_mm must be above 0, got {settings.tolerance_mm}", "tolerance_mm")
