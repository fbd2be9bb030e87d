"""The user's settings of a study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nnssl.errors import ArgumentError
from nnssl.plan import PLANS_NAME
from trainers.finetuning.recipes import Choices, check_mode
from trainers.finetuning.schedule import Optimizer, Recipe, Trained

Choose = Literal["random", "select"]
"""How the patients to label are chosen."""


@dataclass(frozen=True)
class StudySettings:
    """Settings of ``benchmark``.

    Attributes:
        dataset: Labelled data set, number or name.
        arms: Pretrainings to compare with scratch: methods, methods with settings (``pix2rep:temperature=0.2``),
            ``auto`` for a method that is chosen without labels (``auto:budget=10``), single stages
            (``reprec.generative``) or checkpoints (``FILE.pth``, ``NAME=FILE.pth``).
        labels: Numbers of labelled patients.
        epochs: Lengths of fine-tuning in epochs.
        source: Data set to pretrain on; None for the one that was planned last, or that of the first checkpoint.
        plans_name: Name of the source's plan.
        seeds: Number of seeds; the seeds are 0, 1, ...
        modes: Modes of fine-tuning (``finetune``, ``linear``, ``mean_teacher``).
        iterations_per_epoch: Optimizer steps per epoch.
        batch_size: Patches per step of fine-tuning; None for the plan's.
        optimizer: Optimizer of fine-tuning; None for the default of mode and network.
        recipe: Recipe of pretrained weights (``FinetuneSettings``).
        scratch_recipe: Recipe of random weights.
        warmup: Length of the warm-up: a share of the run if below 1, else a number of steps.
        learning_rates: Highest learning rates of the modes that train the whole network; empty for the defaults. Of several,
            every arm is reported with the one that is best on the validation patients.
        head_learning_rate: Highest learning rate of layers that were not pretrained.
        trained: What is trained of pretrained weights.
        configuration: Configuration to fine-tune; None to choose one that fits all arms.
        test_cases: File that lists the cases to hold out; None to draw patients.
        test_patients: Number of patients to draw; None for a quarter of them.
        validation_patients: Number of patients to draw that are neither labelled, held out nor pretrained on. They choose
            between several learning rates.
        validation_cases: File that lists the cases of such patients, in place of ``validation_patients``.
        patients: Table of cases and patients; None to derive the patients from the names of the cases.
        subsets: Folder with ``seed0.txt``, ..., which list labelled cases in the order in which they are added; None to
            draw the order.
        choose: How the order is drawn without lists: ``random``, or ``select`` for that of ``select`` with the weights of the
            first arm.
        pretrain_overrides: Settings of every pretraining, as ``key=value``.
        mirroring: Whether held-out cases are predicted as the mean over all mirrored images, as in nnU-Net.
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
    recipe: Recipe | None = None
    scratch_recipe: Recipe = "nnunet"
    warmup: float | None = None
    learning_rates: tuple[float, ...] = ()
    head_learning_rate: float | None = None
    trained: Trained = "everything"
    configuration: str | None = None
    test_cases: Path | None = None
    test_patients: int | None = None
    validation_patients: int | None = None
    validation_cases: Path | None = None
    patients: Path | None = None
    subsets: Path | None = None
    choose: Choose = "random"
    pretrain_overrides: tuple[str, ...] = ()
    mirroring: bool = True
    tolerance_mm: float = 2.0

    def choices(self, mode: str, epochs: int, rate: float | None) -> Choices:
        """Return what the user chose for a cell; a linear probe has its own optimizer, rate and recipe."""
        if mode == "linear":
            return Choices(epochs, self.iterations_per_epoch, batch_size=self.batch_size)
        return Choices(
            epochs=epochs,
            iterations_per_epoch=self.iterations_per_epoch,
            recipe=self.recipe,
            scratch_recipe=self.scratch_recipe,
            warmup=self.warmup,
            learning_rate=rate,
            head_learning_rate=self.head_learning_rate,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            trained=self.trained,
        )

    @property
    def has_validation(self) -> bool:
        """Whether validation patients are set aside."""
        return self.validation_patients is not None or self.validation_cases is not None

    def rates(self, mode: str) -> tuple[float | None, ...]:
        """Return the learning rates that a mode is trained with; None stands for the default."""
        return (None,) if mode == "linear" else self.learning_rates or (None,)


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
    _check_choice(settings)
    rates = settings.learning_rates
    if len(set(rates)) != len(rates) or any(rate <= 0 for rate in rates):
        got = " ".join(f"{rate:g}" for rate in rates)
        raise ArgumentError(f"learning_rates must be different values above 0, got {got}", "learning_rates")
    if len(rates) > 1 and not settings.has_validation:
        raise ArgumentError(
            f"learning_rates needs patients to choose between {len(rates)} values; set validation_patients or validation_cases, "
            "because a rate that is chosen on the held-out cases flatters every arm",
            "learning_rates",
            "validation_patients",
            "validation_cases",
        )
    if settings.has_validation and (len(rates) < 2 or set(settings.modes) == {"linear"}):
        raise ArgumentError(
            "validation_patients and validation_cases are for choosing between several learning_rates, of which linear probes "
            "have none; give at least two rates and another mode, or leave them out",
            "validation_patients",
            "validation_cases",
            "learning_rates",
        )
    if settings.tolerance_mm <= 0:
        raise ArgumentError(f"tolerance_mm must be above 0, got {settings.tolerance_mm}", "tolerance_mm")


def _check_choice(settings: StudySettings) -> None:
    """Check how the patients to label are chosen."""
    if settings.choose not in get_args(Choose):
        raise ArgumentError(f"choose must be {' or '.join(get_args(Choose))}, got {settings.choose}", "choose")
    if settings.choose == "select" and settings.subsets is not None:
        raise ArgumentError(
            "subsets lists the patients to label, so choose=select has nothing to choose; omit one of them",
            "subsets",
            "choose",
        )
