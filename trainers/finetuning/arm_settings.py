"""Settings of one fine-tuning run, in addition to plan, data and weights."""

from dataclasses import dataclass
from pathlib import Path

from trainers.finetuning.schedule import FinetuneSchedule


@dataclass(frozen=True)
class ArmSettings:
    """Settings of a fine-tuning run in addition to plan, data and weights."""

    schedule: FinetuneSchedule
    seed: int
    train_cases: tuple[str, ...]
    test_cases: tuple[str, ...]
    model_folder: Path
    """Folder of the model, which nnU-Net's commands accept with ``-m``."""
    pretrained: tuple[str, ...] = ()
    """Prefixes of the names of pretrained parameters; empty for random weights."""
    unlabelled_cases: tuple[str, ...] = ()
    """Cases whose images the mean teacher sees besides those of the training cases; empty in other modes."""
    unlabelled_folder: Path | None = None
    """Folder of the preprocessed unlabelled cases; None for that of the labelled cases."""
    processes: int = 1
    """Number of processes that write and evaluate predictions."""
    mirroring: bool = True
    """Whether a prediction of the held-out cases is the mean over all mirrored images, as in nnU-Net."""
    augmentation_processes: int = 0
    """Number of processes that make batches; 0 for the main process. It does not affect the batches."""
    validation_iterations: int = 5
    """Number of held-out batches per epoch for the curve in ``progress.png``."""
    track: tuple[str, ...] = ()
    """Trackers that curves and pictures are written to; the training does not depend on them."""
