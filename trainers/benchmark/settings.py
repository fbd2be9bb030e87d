"""What a user asks of a study."""

from dataclasses import dataclass
from pathlib import Path

from nnssl.errors import UserError
from nnssl.plan import PLANS_NAME
from trainers.finetuning.schedule import Optimizer, check_mode


@dataclass(frozen=True)
class StudySettings:
    """What the user asks for.

    Attributes:
        dataset: labelled data set, number or name.
        source: data set for pretraining; None for the one that was planned last, or for that of the first checkpoint.
        plans_name: plan of the source.
        arms: as ``parse_arm`` reads them.
        labels: numbers of labelled patients.
        seeds: number of seeds; they are 0, 1, ...
        modes: keys of ``MODES``.
        epochs: lengths of fine-tuning.
        iterations_per_epoch: optimizer steps of an epoch.
        batch_size: of fine-tuning; None for the plan's.
        optimizer: of fine-tuning; None for the mode's.
        learning_rate: of the modes that train the whole network; None for the mode's.
        configuration: to fine-tune; None to choose.
        test_cases: list of cases to hold out; None to draw patients.
        test_patients: number of patients to draw; None for a quarter.
        patients: table of cases and patients; None to take them from the names.
        subsets: folder with ``seed0.txt``, ...: labelled cases in the order in which they are added; None to draw them.
        pretrain_overrides: settings of every pretraining, as ``key=value``.
        tolerance_mm: of the normalised surface distance.
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
    """Check numbers that can be wrong by themselves.

    Raises:
        UserError: one is.
    """
    for name, values in (("--labels", settings.labels), ("--epochs", settings.epochs), ("--mode", settings.modes)):
        if not values or len(set(values)) != len(values):
            raise UserError(f"{name} {' '.join(map(str, values))}: give one value or more, each once")
    if min(settings.labels) < 1 or settings.seeds < 1:
        raise UserError(f"--labels {min(settings.labels)}, --seeds {settings.seeds}: each is 1 or more")
    for mode in settings.modes:
        check_mode(mode)
    if settings.tolerance_mm <= 0:
        raise UserError(f"--tolerance-mm {settings.tolerance_mm}: is above 0")
