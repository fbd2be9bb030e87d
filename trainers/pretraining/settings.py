"""The user's settings of a pretraining."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nnssl.errors import ArgumentError
from nnssl.methods import Method
from nnssl.plan import PLANS_NAME
from trainers.pretraining.probe_run import CASES

BUDGET_MINUTES = 30.0
"""Default of ``budget_minutes``: three minutes for each of about ten candidates, or some hundreds of steps on two CPU cores."""


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of ``pretrain``.

    Attributes:
        configuration: Configuration of the plan; None for the first one that the method can use.
        plans_name: Name of the plan.
        epochs: Epochs of every stage, or one number per stage; None for the plan's.
        iterations_per_epoch: Optimizer steps per epoch; None for the plan's.
        overrides: Method settings as ``key=value``, or ``stage.key=value`` for one stage.
        init: Checkpoint whose weights the first stage that hands on its weights starts from: a path, or an address from which
            it is downloaded.
        seed: Random seed for weights and views.
        workers: Processes that read patches; None to choose automatically.
        device: Device to train on; None for a GPU if one is available, else the CPU.
        num_gpus: Number of training processes, one per GPU; the global batch stays that of the plan.
        restart: Whether to delete earlier results of the method's stages first.
        stages: Names of the stages to run; None for all. A stage whose predecessor is not run starts from random weights.
        probe: Labelled data set (number or name) for a linear probe during training; None for no probe.
        probe_cases: Number of labelled cases that the probe learns from; it is scored on as many others.
        probe_every: Epochs between two probes; None for about twenty probes per stage.
        retrieval_every: Epochs between two measurements of how well the exported network finds the other view of a patch; None
            for about ten per stage, 0 for none.
        budget_minutes: For the method ``auto``: wall time of the short runs of all candidates together, by which it is chosen.
        candidates: For the method ``auto``: names of the methods to choose among; empty for all that the plan allows.
        track: Where curves and pictures are written besides ``metrics.csv`` and ``progress.png``: ``"tensorboard"``,
            ``"wandb"`` (offline) or both. Each needs the extra of the same name. The training does not depend on it.
    """

    configuration: str | None = None
    plans_name: str = PLANS_NAME
    epochs: int | Sequence[int] | None = None
    iterations_per_epoch: int | None = None
    overrides: Sequence[str] = ()
    init: Path | str | None = None
    seed: int = 0
    workers: int | None = None
    device: torch.device | str | None = None
    num_gpus: int = 1
    restart: bool = False
    stages: Sequence[str] | None = None
    probe: str | int | None = None
    probe_cases: int = CASES
    probe_every: int | None = None
    retrieval_every: int | None = None
    budget_minutes: float = BUDGET_MINUTES
    candidates: Sequence[str] = ()
    track: Sequence[str] = ()

    def all_overrides(self, method: Method) -> tuple[str, ...]:
        """Return ``overrides`` with the lengths of the stages added as ``key=value``.

        Raises:
            ArgumentError: If ``epochs`` has neither one number nor one per stage.
        """
        overrides = list(self.overrides)
        if self.epochs is not None:
            counts = [self.epochs] if isinstance(self.epochs, int) else list(self.epochs)
            if len(counts) not in (1, len(method.stages)):
                raise ArgumentError(
                    f"epochs must be one number or one for each of the {len(method.stages)} stages of {method.name}, "
                    f"got {len(counts)} numbers",
                    "epochs",
                )
            counts = counts * len(method.stages) if len(counts) == 1 else counts
            overrides += [f"{stage.name}.epochs={count}" for stage, count in zip(method.stages, counts, strict=True)]
        if self.iterations_per_epoch is not None:
            overrides.append(f"iterations_per_epoch={self.iterations_per_epoch}")
        return tuple(overrides)
