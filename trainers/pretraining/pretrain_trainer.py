"""The pretraining loop of all methods: a trainer of nnU-Net that needs no labels.

Results folders, log files, the constructor and the multi-GPU start are nnU-Net's, so ``nnUNetv2_train DATASET CONFIG all
-p nnsslPlans -tr RepRecContrastiveTrainer`` runs the same training as ``nnssl_pretrain``. Everything that nnU-Net's
trainer takes from labels (targets, Dice, splits, deep supervision, validation) is overridden in this file and nowhere else.

The loop handles device, precision, compilation, clipping, the moving average, logging, collapse monitors, checkpoints and
resuming; the pretext stage declares everything else (``nnssl.methods.protocol``).
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, redirect_stdout
from io import StringIO
from pathlib import Path
from time import perf_counter, time
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnssl.checkpoint import FINAL, LATEST, read_checkpoint, to_plain, write_checkpoint
from nnssl.data.case_store import CaseStore
from nnssl.data.changed_cases import contents_of
from nnssl.data.loader import PatchBatch
from nnssl.distributed import average_gradients
from nnssl.draws import sample_generators
from nnssl.errors import ArgumentError, DivergedError
from nnssl.files import write_json
from nnssl.methods import find_stage
from nnssl.methods.protocol import PretextMethod, StepOutput
from nnssl.momentum import update_teacher
from nnssl.networks.backbone import build_network, compile_parts, seeded
from nnssl.networks.primus_positions import architecture_of_patch
from nnssl.plan import StageConfiguration, plan_from_dict
from trainers.pace import RunProgress
from trainers.precision import choose_precision
from trainers.pretraining.epoch import Epoch, mean_of_steps
from trainers.pretraining.initial_weights import load_initial_weights
from trainers.pretraining.measurements import Measurements
from trainers.pretraining.nnunet_state import nnunet_state, restore_nnunet_state
from trainers.pretraining.optimisation import (
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    step_optimizer,
    steps_at_full_rate,
)
from trainers.pretraining.pairing import EXAMINATION, pairs_of_run
from trainers.pretraining.patches import patches_of_run, reading, views_of_batch
from trainers.pretraining.probe_run import BEST, KEY
from trainers.pretraining.progress import (
    METRICS_CSV,
    collect_metrics,
    last_values,
    log_epoch,
    plot_progress,
    write_metrics,
)
from trainers.pretraining.retrieval_run import training_cases
from trainers.pretraining.run_log import RunLog
from trainers.pretraining.run_record import describe_run, opening_lines, provenance_of, write_model_folder
from trainers.pretraining.run_state import network_weights, read_state, run_state
from trainers.pretraining.saving import SavingCadence
from trainers.pretraining.stage_run import RunOptions, check_configuration, check_same_run, plain_settings, resolve_run
from trainers.pretraining.stopping import StopRequest
from trainers.tracking import Tracking


class PretrainTrainer(nnUNetTrainer):
    """Runs one pretext stage; subclasses in ``trainers.pretraining.pretext`` name the stage and change nothing else.

    Set ``options`` between construction and ``run_training`` (nnU-Net's constructor takes no further arguments).
    """

    stage: ClassVar[str]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net compares signatures
    ) -> None:
        if fold != "all":
            raise ArgumentError(f"fold must be 'all' because pretraining uses all images, got {fold}", "fold")
        with redirect_stdout(StringIO()) as printed:
            super().__init__(plans, configuration, fold, dataset_json, device)
        self.print_to_log_file(printed.getvalue().rstrip())
        self.run_log = RunLog(self.print_to_log_file, self.local_rank == 0)
        if device.type != "cuda" or device.index is not None:
            # nnU-Net assumes that several processes are several GPUs of one machine.
            self.device = device
        if device.type != "cuda":
            self.grad_scaler = None
        self.options = RunOptions()
        self.progress = RunProgress(self.run_log.tell, self.device, self.run_log.is_first)
        self.tracking = Tracking((), self.folder)
        self.plan = plan_from_dict(self.plans_manager.plans, f"plan {self.plans_manager.plans_name}")
        method, self.stage_entry = find_stage(self.stage)
        check_configuration(method, configuration)
        self.planned = self.plan.configuration(configuration)
        self.configuration: StageConfiguration
        self.was_initialized: bool = False
        self.method: PretextMethod
        self.dataloader_train: Iterator[PatchBatch] | None = None
        self.current_step = 0
        self.epoch = Epoch()
        self.cases, self.contents = tuple[str, ...](), dict[str, str]()
        self.measurements = Measurements()
        self._warning: str | None = None
        self._cadence = SavingCadence()

    @property
    def folder(self) -> Path:
        """Results folder of the stage."""
        return Path(self.output_folder)

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Write to the log file only; messages for the user go through ``run_log``."""
        super().print_to_log_file(*args, also_print_to_console=False, add_timestamp=add_timestamp)

    # ---------------------------------------------------------------- set-up

    def initialize(self) -> None:
        """Resolve the settings and build network, stage, optimizer and the wrapper for several processes."""
        if self.was_initialized:
            raise RuntimeError("the trainer is already initialized")
        seed = self.options.seed
        self.run = resolve_run(self.plan, self.stage_entry, self.configuration_name, self.options.overrides, seed)
        self.training = self.run.settings.training
        self.configuration = self.run.own
        manager, self.num_epochs = self.configuration_manager, self.training.epochs
        self.num_iterations_per_epoch = self.training.iterations_per_epoch
        self.num_input_channels = len(manager.normalization_schemes)
        self.run_log.tell(f"Building the network of {self.configuration_name} ...")
        architecture = architecture_of_patch(manager.configuration["architecture"], self.configuration.patch_size)
        classes = self.label_manager.num_segmentation_heads
        self.network = build_network(architecture, self.num_input_channels, classes, seed)
        with self.run_log.including_others():
            self.init = load_initial_weights(
                self.network, self.run, self.options, self.folder.parents[2], self.dataset_json
            )
        make = self.stage_entry.load()
        self.method = seeded(lambda: make(self.network, self.run.settings, self.configuration), seed, self.stage)
        self.precision = choose_precision(self.device)
        self.method, self.network = self.method.to(self.device), self.network.to(self.device)
        self.precision.lay_out(self.method, len(self.configuration.patch_size))
        self.optimizer = make_optimizer(self.method.parameter_groups(), self.training)
        if not self.precision.scaler:
            self.grad_scaler = None
        if self._do_i_compile():
            compile_parts(self.network)
        self.parallel = average_gradients(self.method, self.device)
        self.was_initialized = True

    def _autocast(self) -> AbstractContextManager:
        return self.precision.autocast(self.device)

    def get_dataloaders(self) -> tuple[Iterator[PatchBatch], None]:
        """Return the batches from the current step to the end of the stage; there are none for validation."""
        store = self._store()
        self.cases = tuple(sorted({*self.cases, *store.names}))
        self.contents |= contents_of(store.folder, store.names)
        with self.run_log.including_others():
            pairs = pairs_of_run(
                self.folder,
                store,
                self.method.partners(),
                self.run,
                recompute=self.current_step == 0,
                device=self.device,
                autocast=self._autocast,
            )
            workers = self.options.workers
            return patches_of_run(store, self.run, pairs, self.method, self.current_step, workers, self.device), None

    def _store(self) -> CaseStore:
        """Return the cases to train on, without those that features are measured on."""
        return training_cases(self._cases_folder())

    def _cases_folder(self) -> Path:
        return Path(self.preprocessed_dataset_folder_base) / self.planned.case_folder

    # ---------------------------------------------------------------- the loop

    def run_training(self) -> None:
        """Run the stage from the current step to its end.

        Raises:
            SystemExit: After SIGTERM, once a checkpoint is written.
            KeyboardInterrupt: After Ctrl-C, likewise.
        """
        self.tracking = Tracking(self.options.track if self.local_rank == 0 else (), self.folder)
        with closing(self.tracking):
            self.on_train_start()
            self.run_log.tell("Running the first steps ...")
            with self.progress.following(self.stage, self.current_step, self.training.total_steps):
                self._run_steps()
            self.on_train_end()

    def _run_steps(self) -> None:
        assert self.dataloader_train is not None
        steps = self.num_iterations_per_epoch
        with StopRequest() as stop, reading(self.dataloader_train) as batches:
            while self.current_step < self.training.total_steps:
                self.current_epoch = self.current_step // steps
                if self.current_step % steps == 0:
                    self.on_epoch_start()
                started = perf_counter()
                batch = next(batches)
                waited = perf_counter() - started
                record = self.train_step(batch)
                seconds = perf_counter() - started
                self.epoch.records.append({**record, "seconds_waiting": waited, "seconds": seconds})
                self.current_step += 1
                self.progress.step(record["loss"])
                if self.current_step % steps == 0:
                    self.on_train_epoch_end(self.epoch.records)
                    self.on_epoch_end()
                if stop.agreed(self.current_step, self.device):
                    self.save_checkpoint(str(self.folder / LATEST))
                    saved = f"saved at step {self.current_step}; run the same command again to resume"
                    self.run_log.tell(f"Received {stop.name}: {saved}")
                    stop.end()

    def train_step(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Run one step: views, losses, backward, optimizer, moving average, queue.

        Returns:
            Detached scalars by name, left on the device so that the step does not wait for them.
        """
        progress = batch.step / self.training.total_steps
        rate = self.training.learning_rate * learning_rate_factor(self.training, batch.step)
        set_learning_rate(self.optimizer, rate)
        volumes: Any = batch.volumes.to(self.device, non_blocking=True)
        volumes = self.precision.lay_out(volumes, len(self.configuration.patch_size))
        generators = sample_generators(self.options.seed, f"{self.stage}/views", batch.step, batch.samples)
        with torch.no_grad():
            views = views_of_batch(self.method, batch, volumes, generators)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output: StepOutput = self.parallel(views, progress)
        total = torch.stack([loss.float() for loss in output.losses.values()]).sum()
        norm = step_optimizer(total, self.optimizer, self.grad_scaler, self.training.gradient_clip)
        for student, teacher in self.method.momentum_pairs():
            update_teacher(student, teacher, self.method.momentum(progress))
        self.method.after_step(output.carry)
        if output.embeddings is not None:
            self.epoch.keep(output.embeddings)
        parts = {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        return {"loss": total.detach(), **parts, **output.monitors, "gradient_norm": norm}

    # ---------------------------------------------------------------- before, between and after the epochs

    def on_train_start(self) -> None:
        """Start the loader, describe the run in its folder and its log, and start the probe."""
        if not self.was_initialized:
            self.initialize()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.method.train()
        if self.local_rank != 0:
            return
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        write_model_folder(self.folder.parent, self.plans_manager.plans, self.dataset_json, preprocessed)
        described = describe_run(self.run, self.init, self.device, self.precision, self.options.chosen)
        write_json(self.folder / "run.json", described)
        self.run_log.tell_all(*opening_lines(self.run, self.method, self.current_step, self.device, self.precision))
        self.tracking.start(plain_settings(self.run.settings), self.metrics())
        architecture = self.configuration_manager.configuration["architecture"]
        exported, folder = self.method.exported(), self._cases_folder()
        self.measurements.start(
            self.options, self.run, architecture, folder, exported, self.device, starts_random=self.init is None
        )
        if self.current_step == 0:
            self._measure(0)

    def _measure(self, finished_epochs: int) -> dict[str, float]:
        """Measure what is due, and save the weights if the probe finds them the best so far."""
        values = self.measurements.run(self.network, finished_epochs, self.folder, self.run_log.tell, self._autocast)
        if KEY in values and self.measurements.are_best(finished_epochs):
            self.save_checkpoint(str(self.folder / BEST), leaves=True)
        return values

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the means of the epoch over steps and processes, and the collapse monitors."""
        values = mean_of_steps(train_outputs, self.training.batch_size, self.device)
        if not math.isfinite(values["loss"]):
            raise DivergedError(
                f"the loss of epoch {self.current_epoch} is {values['loss']}; the last checkpoint is intact"
            )
        monitors, self._warning = self.epoch.collapse(steps_at_full_rate(self.training, self.current_step))
        values = {**self._measure(self.current_epoch + 1), **values}
        log_epoch(self.logger, self.current_epoch, values | monitors, self.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self) -> None:
        """Print the epoch, write table, figure and, when due, a checkpoint."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        self.epoch = Epoch()
        metrics = self.metrics()
        self.run_log.tell(f"Epoch {self.current_epoch}: {last_values(metrics)}{self.progress.left()}")
        if self._warning:
            self.run_log.tell(self._warning, logging.WARNING)
        if self.local_rank == 0:
            write_metrics(self.folder / METRICS_CSV, metrics)
            self.tracking.write(metrics)
        if self._cadence.is_due() and self.current_step < self.training.total_steps:
            self._draw_progress()
            self.save_checkpoint(str(self.folder / LATEST))

    def metrics(self) -> dict[str, list[float]]:
        """Return one value per finished epoch for every metric that was logged."""
        return collect_metrics(self.logger.get_checkpoint())

    def _draw_progress(self) -> None:
        if self.local_rank == 0:
            title = f"{self.stage}, {self.plan.dataset_name}, {self.configuration_name}"
            plot_progress(self.folder / "progress.png", title, self.metrics())
            self.tracking.write_picture(self.folder / "progress.png")

    def on_train_end(self) -> None:
        """Examine the finished stage, if it has an examination, and write the final checkpoint."""
        self._draw_progress()
        self._examine()
        self.save_checkpoint(str(self.folder / FINAL))
        if self.local_rank == 0:
            (self.folder / LATEST).unlink(missing_ok=True)
        self.run_log.tell(f"Stage {self.stage} finished: {self.folder / FINAL}")

    def _examine(self) -> None:
        examine = self.stage_entry.load_examination()
        if examine is None or self.local_rank != 0:
            return
        self.save_checkpoint(str(self.folder / LATEST))  # so that no training is lost if the examination fails
        self.method.eval()
        content, lines = examine(self.method, self._store(), self.options.seed, self.device, self._autocast)
        write_json(self.folder / EXAMINATION, to_plain(content))
        for line in lines:
            self.run_log.tell(line)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str, leaves: bool = False) -> None:
        """Write a checkpoint of nnssl's schema atomically; only the first process writes.

        Args:
            filename: Path of the file.
            leaves: Whether to write the weights as a finished stage hands them on, even before its end.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        started = time()
        exported, patches = self.method.exported(), (self.configuration.patch_size, self.planned.patch_size)
        provenance = provenance_of(
            self.run, self.dataset_json, self.init, self.current_step, exported.pretrained, self.cases, self.contents
        )
        leaving = exported if provenance.finished or leaves else None
        content = nnunet_state(
            network_weights(self.network, leaving, patches),
            self.optimizer,
            self.grad_scaler,
            self.logger,
            self.current_step // self.num_iterations_per_epoch,
            self.configuration_name,
            None if leaving is None else self.run.plan.nnunet,
        )
        state = run_state(self.network, self.method, self.epoch, self.measurements.state(leaves))
        write_checkpoint(Path(filename), content, provenance, state)
        if not leaves:
            self._cadence.saved(started)

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """Resume from a checkpoint of the same stage, plan and settings.

        Raises:
            UserError: If the checkpoint belongs to another stage or plan, or to other settings.
        """
        if not self.was_initialized:
            self.initialize()
        path = Path(str(filename_or_checkpoint))
        content, provenance = read_checkpoint(path)
        check_same_run(path, provenance, self.run, self._cases_folder())
        self.epoch, measured = read_state(path, content, self.network, self.method, self.device)
        self.measurements = Measurements(measured)
        restore_nnunet_state(content, self.optimizer, self.grad_scaler, self.logger)
        self.current_step = provenance.step
        self.current_epoch = content["current_epoch"]
        self.cases, self.contents = provenance.cases or (), dict(provenance.case_contents or {})

    # ---------------------------------------------------------------- what needs labels in nnU-Net

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do nothing: without labels there is no Dice; ``nnssl_finetune`` evaluates the weights."""
        self.run_log.tell("Pretraining has no validation Dice; evaluate the weights with nnssl_finetune")

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: no pretext loss uses the segmentation layers."""
