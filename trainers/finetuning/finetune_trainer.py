"""FinetuneTrainer: nnU-Net's training on labelled cases, from given weights, by a recipe and with reproducible batches.

Loss, augmentation, network, prediction and evaluation are nnU-Net's. The differences from ``nnUNetTrainer`` are:

- The learning rate follows a recipe and changes at every step (``trainers.finetuning.schedule``); pretrained and new layers
  can have rates of their own, and parts can be frozen (``trainers.finetuning.optimisation``).
- A batch depends only on the seed and the step, not on worker processes or restarts, so that runs that are compared see
  the same batches.
- CPUs use mixed precision as well (``trainers.precision``).
- Held-out cases are used for the online validation curve only. There is no ``checkpoint_best``, which would be selected
  on them.
- Checkpoints are written atomically, hold plain values only, and name ``nnUNetTrainer``, so that stock nnU-Net predicts
  with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module  # noqa: N813 (a module)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnssl.checkpoint import to_plain
from nnssl.data.inline_pool import without_workers
from nnssl.distributed import average_over_ranks, mean_over_ranks, rank, world_size
from nnssl.draws import draw_seed
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.files import write_atomically
from nnssl.interrupts import pools_without_interrupts
from nnssl.log import logger
from nnssl.tables import points
from trainers.finetuning.arm_settings import ArmSettings
from trainers.finetuning.curves import class_names, curves_of
from trainers.finetuning.keyed_batches import KeyedBatches, fix_transforms, global_seed
from trainers.finetuning.optimisation import (
    GRADIENT_NORM,
    TRANSFORMER_GRADIENT_NORM,
    StepSchedule,
    choose_parameters,
    make_optimizer,
)
from trainers.finetuning.predictions import predictions_followed
from trainers.pace import RunProgress
from trainers.precision import FullPrecisionLoss, choose_precision, clip_and_step
from trainers.tracking import Tracking

STOCK_TRAINER = "nnUNetTrainer"
EPOCHS_PER_FIGURE = 20
"""``progress.png`` takes nnU-Net half a second, which is long beside a short epoch; it is also drawn after the last one."""
FIGURE_DPI = 50
"""Pixels per inch of ``progress.png``, which is 30 x 54 inches."""
SETTINGS_KEY = "nnssl_finetune"


class FinetuneTrainer(nnUNetTrainer):
    """Trainer of nnU-Net for a labelled data set, made by ``make_trainer``.

    Attributes:
        steps_done: Optimizer steps that were taken.
    """

    steps_done: int = 0
    inference_allowed_mirroring_axes: tuple[int, ...] | None
    device: torch.device

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ):
        # nnU-Net fixes this signature and creates the results folder in its constructor. The settings are therefore passed
        # within the plans, as nnU-Net does with "continue_training".
        if SETTINGS_KEY not in plans:
            raise UserError(
                "FinetuneTrainer needs settings that nnUNetv2_train does not have; start it with nnssl_finetune"
            )
        self.settings: ArmSettings = plans.pop(SETTINGS_KEY)
        super().__init__(plans, configuration, fold, dataset_json, device)
        # nnU-Net's own code for several processes needs GPUs and draws other batches than a single process
        self.is_ddp, self.local_rank = False, rank()
        self.device = device if world_size() > 1 else self.device
        self.num_epochs = self.settings.schedule.epochs
        self.num_iterations_per_epoch = self.settings.schedule.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.validation_iterations
        self.initial_lr = self.settings.schedule.learning_rate
        self.save_every = max(1, self.num_epochs // 50)
        self._best_ema = float("inf")  # no value exceeds this, so nnU-Net never writes checkpoint_best
        self.precision = choose_precision(self.device)
        if not self.precision.scaler:
            self.grad_scaler = None
        self.progress = RunProgress(logger.info, self.device, rank() == 0)
        self.tracking = Tracking(self.settings.track if rank() == 0 else (), Path(self.output_folder))

    @property
    def output_folder_base(self) -> str:
        """Model folder from the settings."""
        return str(self.settings.model_folder)

    @output_folder_base.setter
    def output_folder_base(self, derived: str) -> None:
        """Ignore the folder that nnU-Net derives from the name of the class."""

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Write to the log file only; messages for the user go through ``nnssl.log``."""
        super().print_to_log_file(*args, also_print_to_console=False, add_timestamp=add_timestamp)

    def initialize(self) -> None:
        """Build network, optimizer and loss. The random weights of the network depend on the seed only."""
        with global_seed(self.settings.seed, "finetune/weights"):
            super().initialize()
        self.precision.lay_out(self.network, len(self.configuration_manager.patch_size))
        self.print_to_log_file(f"Precision: {self.precision}")

    def _set_batch_size_and_oversample(self) -> None:
        """Set the size of the whole batch, of which every process gets an equal part.

        Raises:
            ArgumentError: If it cannot be divided.
        """
        self.batch_size: int = self.settings.schedule.batch_size or self.configuration_manager.batch_size
        if self.batch_size % world_size():
            raise ArgumentError(
                f"batch_size must be a multiple of num_gpus ({world_size()}), got {self.batch_size}; set batch_size, or fewer "
                "num_gpus",
                "batch_size",
                "num_gpus",
            )

    @property
    def rows(self) -> range:
        """Rows of the batch that this process trains on."""
        part = self.batch_size // world_size()
        return range(rank() * part, (rank() + 1) * part)

    def _build_loss(self) -> nn.Module:
        with np.errstate(invalid="ignore"):
            loss = super()._build_loss()
        if isinstance(loss, DeepSupervisionWrapper) and len(loss.weight_factors) == 1:
            loss.weight_factors = (1.0,)  # nnU-Net ignores the lowest resolution, even if it is the only one
        for part in loss.modules():
            if hasattr(part, "ddp"):  # the Dice over the batch counts the voxels of all processes
                part.ddp = world_size() > 1
        return FullPrecisionLoss(loss)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, StepSchedule]:
        """Freeze what is not trained; return the optimizer of the schedule and its learning rates."""
        schedule = self.settings.schedule
        parameters = choose_parameters(self.bare_network, self.settings.pretrained, schedule.trained)
        optimizer = make_optimizer(parameters, schedule, self.weight_decay)
        return optimizer, StepSchedule(optimizer, schedule)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the training cases and the held-out cases from the settings."""
        return list(self.settings.train_cases), list(self.settings.test_cases)

    def get_dataloaders(self) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        """Return nnU-Net's batches for training and for the validation curve, starting at the current epoch."""
        with variables(nnUNet_n_proc_DA="0"):  # nnU-Net then returns its loaders without its own processes
            train, validation = (augmenter.data_loader for augmenter in super().get_dataloaders())
        fix_transforms(train.transforms)
        processes = self.settings.augmentation_processes
        return (
            self.make_train_batches(train),
            self.iterate(
                validation,
                "finetune/validation",
                self.num_val_iterations_per_epoch,
                min(processes, 1),
                range(self.batch_size),  # every process has the whole curve
            ),
        )

    def make_train_batches(self, loader: nnUNetDataLoader) -> Iterator[dict[str, Any]]:
        """Return the training batches of nnU-Net's loader, starting at the current epoch."""
        processes = self.settings.augmentation_processes
        return self.iterate(loader, "finetune/train", self.num_iterations_per_epoch, processes, self.rows)

    def iterate(
        self, loader: nnUNetDataLoader, purpose: str, iterations: int, processes: int, rows: range
    ) -> Iterator[dict[str, Any]]:
        """Return the batches of a loader, starting at the current epoch.

        Args:
            loader: Loader of nnU-Net.
            purpose: Purpose of the batches, which determines the random draws together with the seed and the step.
            iterations: Number of batches per epoch.
            processes: Number of processes that make batches; 0 for the main process.
            rows: Rows of the batches that are needed.
        """
        batches = KeyedBatches(loader, self.settings.seed, purpose, rows)
        first, last = self.current_epoch * iterations, self.num_epochs * iterations
        return batches.iterate(first, last, processes, pin_memory=self.device.type == "cuda")

    def run_training(self) -> None:
        """Train from the current epoch to the last one, and show how long this still takes."""
        steps = self.num_iterations_per_epoch
        with self.progress.following("Fine-tuning", self.current_epoch * steps, self.num_epochs * steps):
            super().run_training()

    def on_train_start(self) -> None:
        """Start as nnU-Net does, and open the trackers."""
        super().on_train_start()
        self.start_tracking()

    def start_tracking(self) -> None:
        """Open the trackers, unless they are open."""
        schedule, settings = self.settings.schedule, self.settings
        described = {"configuration": self.configuration_name, "seed": settings.seed, **asdict(schedule)}
        cases = {"train_cases": ", ".join(settings.train_cases), "test_cases": ", ".join(settings.test_cases)}
        self.tracking.start({**described, **cases}, self.curves())

    def curves(self) -> dict[str, list[float]]:
        """Return one value per finished epoch for every curve of the training."""
        return curves_of(self.logger.get_checkpoint(), class_names(self.dataset_json["labels"], self.label_manager))

    def on_train_epoch_start(self) -> None:
        """Set the learning rate and seed the random draws of the network (dropout)."""
        own = (rank(),) if rank() else ()  # samples of different processes are not dropped together
        torch.manual_seed(draw_seed(self.settings.seed, "finetune/epoch", self.current_epoch, *own))
        self.steps_done = self.current_epoch * self.num_iterations_per_epoch
        super().on_train_epoch_start()

    def train_step(self, batch: dict) -> dict:
        """Take one optimizer step on a batch and return its loss."""
        largest = TRANSFORMER_GRADIENT_NORM if self.settings.schedule.optimizer == "adamw" else GRADIENT_NORM
        self.lr_scheduler.set_step(self.steps_done)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for loss in self.batch_losses(batch):
            # Each term frees its graph before the next one is computed, which saves memory.
            (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
            total += loss.detach()
        average_over_ranks([p.grad for p in self.network.parameters() if p.grad is not None])
        clip_and_step(self.network.parameters(), self.optimizer, self.grad_scaler, largest)
        self.steps_done += 1
        total = mean_over_ranks(total)
        self.progress.step(total)
        return {"loss": total.cpu().numpy()}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the mean loss of the epoch.

        Raises:
            ArgumentError: If the loss is not finite, because training cannot recover from that.
        """
        super().on_train_epoch_end(train_outputs)
        if not all(np.isfinite(output["loss"]).all() for output in train_outputs):
            raise ArgumentError(
                f"{self.output_folder}: the loss of epoch {self.current_epoch} is not finite; lower learning_rate and check the "
                "images for NaN",
                "learning_rate",
            )

    def batch_losses(self, batch: dict) -> Iterator[Tensor]:
        """Yield the terms of a batch's loss one by one. Their gradients are summed."""
        yield self.batch_loss(batch)

    def batch_loss(self, batch: dict) -> Tensor:
        """Return nnU-Net's loss for a batch of labelled patches."""
        volumes = batch["data"].to(self.device, non_blocking=True)
        volumes = self.precision.lay_out(volumes, volumes.ndim - 2)
        target = batch["target"]
        if isinstance(target, list):
            target = [entry.to(self.device, non_blocking=True) for entry in target]
        else:
            target = target.to(self.device, non_blocking=True)
        with self.precision.autocast(self.device):
            outputs = self.network(volumes)
        return self.loss(outputs, target)

    @property
    def bare_network(self) -> nn.Module:
        """Network without the wrapper of ``torch.compile``."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network

    def weights_to_save(self) -> dict[str, Any]:
        """Return the model's part of a checkpoint. nnU-Net predicts with ``network_weights``."""
        return {"network_weights": self.bare_network.state_dict()}

    def validation_step(self, batch: dict) -> dict:
        """Return the loss and the overlap counts of a held-out batch."""
        with self.precision.autocast(self.device):
            return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        """Log the epoch, draw the curve and save; log one line for the user whenever a checkpoint is due."""
        epoch = self.current_epoch + 1
        with figures_drawn(epoch == self.num_epochs or epoch % EPOCHS_PER_FIGURE == 0, self.logger):
            super().on_epoch_end()
        self.tracking.write(self.curves())
        if epoch % self.save_every == 0 or epoch == self.num_epochs:
            loss, dice = (self.logger.get_value(key, step=-1) for key in ("train_losses", "mean_fg_dice"))
            seconds = time() - self.logger.get_value("epoch_start_timestamps", step=-1)
            logger.info(
                f"  epoch {epoch}/{self.num_epochs}: loss {loss:.3f}, "
                f"Dice on held-out patches {points(dice)} points, {seconds:.1f} s{self.progress.left()}"
            )
            if epoch == self.num_epochs or epoch % EPOCHS_PER_FIGURE == 0:
                self.tracking.write_picture(Path(self.output_folder) / "progress.png")

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint atomically, with plain values only and the name of the stock trainer; rank 0 only."""
        if rank() > 0:
            return
        content = {
            **self.weights_to_save(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": STOCK_TRAINER,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }
        plain = to_plain(content)
        write_atomically(Path(filename), lambda file: torch.save(plain, file))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict and evaluate the held-out cases as nnU-Net does, with processes and mirroring from the settings.

        On a CPU, predictions are written and evaluated in this process.
        """
        # nnU-Net reads this number only once, at import.
        before, axes = nnunet_module.default_num_processes, self.inference_allowed_mirroring_axes
        nnunet_module.default_num_processes = self.settings.processes
        if not self.settings.mirroring:
            self.inference_allowed_mirroring_axes = None
        workers = without_workers(nnunet_module, evaluate_predictions) if self.device.type == "cpu" else nullcontext()
        planned = self.configuration_manager.configuration
        next_stage = planned.pop("next_stage", None)  # nnU-Net would look for the cascade's cases and predict them
        try:
            with workers, pools_without_interrupts(), predictions_followed(self, len(self.settings.test_cases)):
                super().perform_actual_validation(save_probabilities)
        finally:
            nnunet_module.default_num_processes = before
            self.inference_allowed_mirroring_axes = axes
            planned |= {} if next_stage is None else {"next_stage": next_stage}
            # nnU-Net switches deep supervision off and afterwards always on.
            self.set_deep_supervision_enabled(self.enable_deep_supervision)


@contextmanager
def figures_drawn(wanted: bool, logger: Any) -> Iterator[None]:
    """Let nnU-Net's logger draw ``progress.png`` only if it is wanted, and then with a quarter of its 16 million pixels."""
    if not wanted:
        logger.plot_progress_png = lambda output_folder: None
    try:
        with rc_context({"savefig.dpi": FIGURE_DPI}):
            yield
    finally:
        vars(logger).pop("plot_progress_png", None)


def make_trainer(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    device: torch.device,
    settings: ArmSettings,
    resume: bool = False,
    trainer_class: "type[FinetuneTrainer] | None" = None,
    fold: int | str = 0,
) -> FinetuneTrainer:
    """Make the trainer of one run and its folders. The network is not built yet.

    Args:
        plans: Content of the plans file; not changed.
        configuration: Name of a configuration in the plans.
        dataset_json: Content of the data set's ``dataset.json``.
        device: Device to train on.
        settings: Schedule, cases, seed and folder.
        resume: Whether a checkpoint will be loaded to resume from.
        trainer_class: Trainer of a mode; None for ``FinetuneTrainer``, which trains all weights.
        fold: Fold of the run, after which its folder is named.
    """
    content = {**plans, "continue_training": resume, SETTINGS_KEY: settings}
    return (trainer_class or FinetuneTrainer)(content, configuration, fold, dataset_json, device)
