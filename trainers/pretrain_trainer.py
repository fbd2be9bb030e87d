"""THE pretraining loop, once, for all methods: a trainer of nnU-Net that takes nothing from labels.

Results folders, log files, the constructor and the multi-GPU start are nnU-Net's, so ``nnUNetv2_train DATASET CONFIG all
-p nnsslPlans -tr RepRecContrastiveTrainer`` runs the same training as ``nnssl_pretrain``. What nnU-Net's trainer takes
from labels (targets, Dice, splits, deep supervision, validation) is overridden in this file and nowhere else.

The loop owns device, precision, compilation, clipping, the moving average, logging, collapse monitors, checkpoints and
resume; the pretext stage declares the rest (``nnssl.methods.protocol``).
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nnssl
from nnssl.checkpoint import Provenance, read_checkpoint, to_plain, write_checkpoint
from nnssl.collapse import collapse_warning, effective_rank, feature_std
from nnssl.data.case_store import CaseStore
from nnssl.data.loader import PatchBatch, make_loader
from nnssl.data.patch_pairs import PairTable
from nnssl.distributed import is_distributed, mean_over_ranks, rank, world_size
from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.files import write_json
from nnssl.methods import SAM, Stage, find_stage
from nnssl.methods.protocol import PretextMethod, StepOutput
from nnssl.methods.settings import describe_settings, resolve_stage
from nnssl.momentum import update_teacher
from nnssl.networks.backbone import build_network, parts_to_compile, seeded
from planners.plan import plan_from_dict
from trainers.adapted_weights import start_network
from trainers.continuation import check_same_run, plain_settings
from trainers.optimisation import learning_rate_factor, make_optimizer, set_learning_rate
from trainers.pairing import EXAMINATION, pairs_of_run
from trainers.precision import choose_precision
from trainers.probe_run import BEST, KEY, ProbeOptions, ProbeRun
from trainers.progress import collect_metrics, plot_progress, write_metrics
from trainers.run_state import network_weights, read_state, run_state
from trainers.stopping import TERMINATED, StopRequest

LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
EMBEDDINGS_KEPT = 1024
"""Embeddings of an epoch's last steps that the collapse monitors look at."""
SAVING_SHARE = 0.05
"""Writing checkpoints may take this share of the time."""


@dataclass(frozen=True)
class RunOptions:
    """What the command line says of a run beyond the plan.

    Attributes:
        overrides: settings as ``key=value``.
        init: checkpoint whose network weights the first stage starts from.
        seed: of weights and of every draw.
        workers: processes that read patches; None to choose.
        alone: start a later stage from random weights, not from those of the stage before it.
        probe: labelled cases for the online probe; None for no probe. Changes nothing of the training.
    """

    overrides: tuple[str, ...] = ()
    init: Path | None = None
    seed: int = 0
    workers: int | None = None
    alone: bool = False
    probe: ProbeOptions | None = None


class PretrainTrainer(nnUNetTrainer):
    """Runs one pretext stage; subclasses in ``trainers.pretext`` name the stage and change nothing else.

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
            raise UserError(f"fold {fold}: pretraining uses all images, so its only fold is 'all'")
        super().__init__(plans, configuration, fold, dataset_json, device)
        if device.type != "cuda" or device.index is not None:
            # nnU-Net takes several processes for several GPUs of one machine
            self.device = device
        if device.type != "cuda":
            self.grad_scaler = None
        self.options = RunOptions()
        self.plan = plan_from_dict(self.plans_manager.plans, f"plan {self.plans_manager.plans_name}")
        self.method_entry, self.stage_entry = find_stage(self.stage)
        if configuration not in self.method_entry.configurations:
            raise UserError(
                f"{self.method_entry.name} needs {self.method_entry.backbone}, which configuration {configuration} does not "
                f"have; take -c {' or '.join(self.method_entry.configurations)}"
            )
        self.configuration = self.plan.configuration(configuration)
        self.was_initialized: bool = False
        self.method: PretextMethod
        self.dataloader_train: Iterator[PatchBatch] | None = None
        self.current_step = 0
        self.cases: tuple[str, ...] = ()
        self.probe: ProbeRun | None = None
        self._probe_state: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self.embeddings: list[Tensor] = []
        self._last_save = time()
        self._collapse: str | None = None
        self._save_seconds = 0.0

    # ---------------------------------------------------------------- set-up

    def initialize(self) -> None:
        """Resolve settings, build network, stage, optimizer and the wrapper for several processes."""
        if self.was_initialized:
            raise RuntimeError("the trainer was initialized before")
        implementation = self.stage_entry.load()
        self.settings, self.origins = resolve_stage(
            implementation, self.configuration, self.stage, self.options.overrides
        )
        self.training = self.settings.training
        self.num_epochs = self.training.epochs
        self.num_iterations_per_epoch = self.training.iterations_per_epoch
        self.num_input_channels = len(self.configuration_manager.normalization_schemes)
        architecture = self.configuration_manager.configuration["architecture"]
        heads = self.label_manager.num_segmentation_heads
        self.network = build_network(architecture, self.num_input_channels, heads, self.options.seed)
        self.init_from = self._load_initial_weights()
        self.method = seeded(
            lambda: implementation(self.network, self.settings, self.configuration), self.options.seed, self.stage
        )
        self.precision = choose_precision(self.device)
        self.method.to(self.device)
        self.network.to(self.device)
        self.precision.lay_out(self.method, len(self.configuration.patch_size))
        self.optimizer = make_optimizer(self.method.parameter_groups(), self.training)
        if not self.precision.scaler:
            self.grad_scaler = None
        if self._do_i_compile():
            self._compile()
        self.parallel = self._wrap_for_processes()
        self.was_initialized = True

    def previous_stage_checkpoint(self) -> Path | None:
        """Return where the stage before this one left its weights; None for the first stage, and for one that runs alone."""
        stages = self.method_entry.stages
        index = stages.index(self.stage_entry)
        if index == 0 or self.options.alone or self.stage_entry.fresh:
            return None
        return self.checkpoint_of(stages[index - 1])

    def checkpoint_of(self, stage: Stage) -> Path:
        """Return where another stage of this plan leaves its weights."""
        name = f"{stage.trainer}__{self.plans_manager.plans_name}__{stage.runs_in(self.configuration_name)}"
        return Path(self.output_folder_base).parent / name / "fold_all" / FINAL

    def _load_initial_weights(self) -> str | None:
        source = self.options.init or self.previous_stage_checkpoint()
        if source is None:
            return None
        if not source.exists():
            raise UserError(
                f"{source}: {self.stage} starts from these weights; run nnssl_pretrain -m {self.method_entry.name}, or name "
                "other weights with --init"
            )
        if self.options.init is not None:
            # positions and channels may differ where all shapes agree, so these are always fitted
            start_network(
                source,
                self.network,
                self.plans_manager.plans,
                self.configuration_name,
                self.dataset_json,
                self.print_to_log_file,
            )
            return str(source)
        found = read_checkpoint(source)[0]["network_weights"]
        wanted = {name: value for name, value in self.network.state_dict().items() if ".seg_layers." not in name}
        if not all(name in found and found[name].shape == value.shape for name, value in wanted.items()):
            raise UserError(
                f"{source}: does not fit {self.configuration_name} of {self.plan.dataset_name}; --restart pretrains the stage "
                "before again"
            )
        missing = self.network.load_state_dict({name: found[name] for name in wanted}, strict=False)
        assert not missing.unexpected_keys
        return str(source)

    def _compile(self) -> None:
        # a graph that cannot be compiled runs as it is, and torch says so once
        torch._dynamo.config.suppress_errors = True
        for part in parts_to_compile(self.network):
            part.compile()

    def _wrap_for_processes(self) -> torch.nn.Module:
        if not is_distributed():
            return self.method
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.method, device_ids=devices, broadcast_buffers=False)

    def get_dataloaders(self) -> tuple[Iterator[PatchBatch], None]:
        """Return the patches from the current step to the end of the stage; there is no validation part."""
        store = self._store()
        self.cases = tuple(sorted({*self.cases, *store.names}))
        workers = self.options.workers
        if workers is None:
            workers = _default_workers(self.device)
        return iter(
            make_loader(
                store,
                self.configuration.patch_size,
                self.training.batch_size,
                seed=self.options.seed,
                stage=self.stage,
                first_step=self.current_step,
                last_step=self.training.total_steps,
                rank=rank(),
                world_size=world_size(),
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                pairs=self._pairs(store),
            )
        ), None

    def _pairs(self, store: CaseStore) -> PairTable | None:
        partners = self.method.partners()
        if partners is None:
            return None
        return pairs_of_run(
            Path(self.output_folder),
            store,
            None if partners == "body_box" else self.checkpoint_of(find_stage(SAM)[1]),
            self.plan,
            self.options.seed,
            anew=self.current_step == 0,
            device=self.device,
            autocast=lambda: self.precision.autocast(self.device),
            say=self.print_to_log_file,
        )

    def _store(self) -> CaseStore:
        return CaseStore(Path(self.preprocessed_dataset_folder_base) / self.configuration.case_folder)

    # ---------------------------------------------------------------- the loop

    def run_training(self) -> None:
        """Run the stage from the current step to its end.

        Raises:
            SystemExit: after SIGTERM, once a checkpoint is written.
        """
        self.on_train_start()
        try:
            self._run_steps()
        finally:
            self._end_readers()
        self.on_train_end()

    def _run_steps(self) -> None:
        assert self.dataloader_train is not None
        steps = self.num_iterations_per_epoch
        with StopRequest() as stop:
            while self.current_step < self.training.total_steps:
                self.current_epoch = self.current_step // steps
                if self.current_step % steps == 0:
                    self.on_epoch_start()
                    self.on_train_epoch_start()
                started = perf_counter()
                batch = next(self.dataloader_train)
                waited = perf_counter() - started
                record = self.train_step(batch)
                self.records.append({**record, "seconds_waiting": waited, "seconds": perf_counter() - started})
                self.current_step += 1
                if self.current_step % steps == 0:
                    self.on_train_epoch_end(self.records)
                    self.on_epoch_end()
                if stop.agreed(self.current_step, self.device):
                    self._save_and_exit()

    def _end_readers(self) -> None:
        # after an error the traceback keeps the iterator alive, and with it readers that the interpreter waits for
        shut_down = getattr(self.dataloader_train, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self.dataloader_train = None

    def on_train_start(self) -> None:
        """Start the loader, and write what says what is about to run."""
        if not self.was_initialized:
            self.initialize()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.method.train()
        if self.local_rank == 0:
            base = Path(self.output_folder_base)
            write_json(base / "plans.json", self.plans_manager.plans)
            write_json(base / "dataset.json", self.dataset_json)
            fingerprint = Path(self.preprocessed_dataset_folder_base) / "dataset_fingerprint.json"
            if fingerprint.exists():
                shutil.copyfile(fingerprint, base / fingerprint.name)
            write_json(Path(self.output_folder) / "run.json", self.describe())
            self._log_start()
            self._start_probe()

    def _start_probe(self) -> None:
        if self.options.probe is None:
            return
        with_decoder = any("decoder.stages.".startswith(prefix) for prefix in self.method.exported().pretrained)
        patch, epochs = self.configuration.patch_size, self.training.epochs
        self.probe = ProbeRun(self.options.probe, patch, epochs, with_decoder, self.device)
        self.probe.take_up(self._probe_state)
        if self.current_step == 0:
            self._run_probe(0)

    def _run_probe(self, finished_epochs: int) -> float:
        """Probe after so many epochs if it is due, and keep the best weights; NaN if it is not."""
        if self.probe is None or not self.probe.is_due(finished_epochs):
            return math.nan
        with self.precision.autocast(self.device):
            dice = self.probe.measure(self.network, finished_epochs)
        self.print_to_log_file(self.probe.describe())
        write_json(Path(self.output_folder) / "probe.json", self.probe.state())
        if finished_epochs and self.probe.best["epochs"] == finished_epochs:
            self.save_checkpoint(str(Path(self.output_folder) / BEST), leaves=True)
        return dice

    def describe(self) -> dict[str, Any]:
        """Return what ``run.json`` holds: everything that decides the run, with the origin of every setting."""
        return to_plain(
            {
                "nnssl_version": nnssl.__version__,
                "stage": self.stage,
                "dataset": self.plan.dataset_name,
                "plan": self.plan.name,
                "configuration": self.configuration_name,
                "seed": self.options.seed,
                "init": self.init_from,
                "device": str(self.device),
                "precision": self.precision.name,
                "processes": world_size(),
                "settings": describe_settings(self.settings, self.origins),
            }
        )

    def _log_start(self) -> None:
        trained = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        self.print_to_log_file(f"Pretext stage {self.stage} on {self.plan.dataset_name}, {self.configuration_name}")
        self.print_to_log_file(
            f"{self.training.epochs} epochs of {self.training.iterations_per_epoch} steps, batch {self.training.batch_size}, "
            f"{trained / 1e6:.2f} M trained parameters, {self.precision.name} on {self.device}"
        )
        if self.current_step:
            self.print_to_log_file(f"Going on at step {self.current_step} of {self.training.total_steps}")
        for key, entry in describe_settings(self.settings, self.origins).items():
            self.print_to_log_file(f"  {key} = {entry['value']} ({entry['origin']})", also_print_to_console=False)

    def on_train_epoch_start(self) -> None:
        """Begin the records of an epoch."""
        self.records, self.embeddings = [], []

    def train_step(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Run one step: views, losses, backward, optimizer, moving average, queue.

        Returns:
            Detached scalars by name, left on the device so that the step does not wait for them.
        """
        progress = self.current_step / self.training.total_steps
        rate = self.training.learning_rate * learning_rate_factor(self.training, self.current_step)
        set_learning_rate(self.optimizer, rate)
        volumes: Any = batch.volumes.to(self.device, non_blocking=True)
        volumes = self.precision.lay_out(volumes, len(self.configuration.patch_size))
        generators = sample_generators(self.options.seed, f"{self.stage}/views", self.current_step, batch.samples)
        with torch.no_grad():
            views = self.method.make_views(volumes, generators)
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast(self.device):
            output: StepOutput = self.parallel(views, progress)
        total = torch.stack([loss.float() for loss in output.losses.values()]).sum()
        norm = self._backward(total)
        for student, teacher in self.method.momentum_pairs():
            update_teacher(student, teacher, self.method.momentum(progress))
        self.method.after_step(output.carry)
        if output.embeddings is not None:
            self._keep_embeddings(output.embeddings.detach().float())
        parts = {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        return {"loss": total.detach(), **parts, **output.monitors, "gradient_norm": norm}

    def _backward(self, total: Tensor) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.grad_scaler is None:
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.training.gradient_clip)
            self.optimizer.step()
            return norm
        self.grad_scaler.scale(total).backward()
        self.grad_scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.training.gradient_clip)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return norm

    def _keep_embeddings(self, embeddings: Tensor) -> None:
        self.embeddings.append(embeddings)
        while sum(map(len, self.embeddings[1:])) >= EMBEDDINGS_KEPT:
            self.embeddings.pop(0)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the means of the epoch over steps and processes, and the collapse monitors."""
        means = {
            key: torch.stack([torch.as_tensor(r[key]).float().cpu() for r in train_outputs]).mean()
            for key in train_outputs[0]
        }
        values = {key: float(mean_over_ranks(value.to(self.device))) for key, value in means.items()}
        if not torch.isfinite(torch.tensor(values["loss"])):
            raise RuntimeError(
                f"the loss of epoch {self.current_epoch} is {values['loss']}; the last checkpoint is intact"
            )
        seconds = values.pop("seconds")
        values["data_wait_share"] = values.pop("seconds_waiting") / seconds
        values["patches_per_second"] = self.training.batch_size / seconds
        if self.embeddings:
            embeddings = torch.cat(self.embeddings)
            values["feature_std"] = float(feature_std(embeddings))
            values["effective_rank"] = float(effective_rank(embeddings))
            self._collapse = collapse_warning(values["feature_std"], values["effective_rank"], embeddings.shape[1])
        logged = self.logger.local_logger.my_fantastic_logging
        if self.options.probe is not None or KEY in logged:
            logged.setdefault(KEY, [math.nan] * self.current_epoch)
            values[KEY] = self._run_probe(self.current_epoch + 1)
        self.logger.log("train_losses", values["loss"], self.current_epoch)
        self.logger.log("lrs", float(self.optimizer.param_groups[0]["lr"]), self.current_epoch)
        for key, value in values.items():
            logged.setdefault(key, [])
            self.logger.log(key, value, self.current_epoch)

    def on_epoch_end(self) -> None:
        """Print the epoch, write table, figure and, when due, a checkpoint."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        self.records, self.embeddings = [], []
        metrics = self.metrics()
        last = {key: values[-1] for key, values in metrics.items()}
        shown = ", ".join(f"{key} {last[key]:.4g}" for key in last if key != "loss")
        self.print_to_log_file(f"Epoch {self.current_epoch}: loss {last['loss']:.4f} ({shown})")
        if self._collapse:
            self.print_to_log_file(self._collapse)
        if self.local_rank == 0:
            write_metrics(Path(self.output_folder) / "metrics.csv", metrics)
        due = time() - self._last_save > self._save_seconds / SAVING_SHARE
        if due and self.current_step < self.training.total_steps:
            self._draw_progress()
            self.save_checkpoint(str(Path(self.output_folder) / LATEST))

    def metrics(self) -> dict[str, list[float]]:
        """Return one value per finished epoch for every metric that was logged."""
        return collect_metrics(self.logger.get_checkpoint())

    def _draw_progress(self) -> None:
        if self.local_rank == 0:
            title = f"{self.stage}, {self.plan.dataset_name}, {self.configuration_name}"
            plot_progress(Path(self.output_folder) / "progress.png", title, self.metrics())

    def on_train_end(self) -> None:
        """Write the final checkpoint, from which the weights leave, after what the stage says of itself."""
        self._draw_progress()
        self._examine()
        self.save_checkpoint(str(Path(self.output_folder) / FINAL))
        if self.local_rank == 0:
            (Path(self.output_folder) / LATEST).unlink(missing_ok=True)
        self.print_to_log_file(f"Stage {self.stage} done: {Path(self.output_folder) / FINAL}")

    def _examine(self) -> None:
        examine = self.stage_entry.load_examination()
        if examine is None or self.local_rank != 0:
            return
        self.save_checkpoint(str(Path(self.output_folder) / LATEST))  # nothing of the training is lost if this fails
        self.method.eval()
        autocast = lambda: self.precision.autocast(self.device)  # noqa: E731
        content, lines = examine(self.method, self._store(), self.options.seed, self.device, autocast)
        write_json(Path(self.output_folder) / EXAMINATION, to_plain(content))
        for line in lines:
            self.print_to_log_file(line)

    def _save_and_exit(self) -> None:
        self.save_checkpoint(str(Path(self.output_folder) / LATEST))
        self.print_to_log_file(f"Asked to stop: saved at step {self.current_step}; run the same command again to go on")
        raise SystemExit(TERMINATED)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str, leaves: bool = False) -> None:
        """Write a checkpoint of nnssl's schema atomically; only the first process writes.

        Args:
            filename: its path.
            leaves: write the weights as they leave a finished stage, also before its end.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        started = time()
        finished = self.current_step == self.training.total_steps
        content = {
            "network_weights": network_weights(self.network, self.method.exported() if finished or leaves else None),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": None,
            "current_epoch": self.current_step // self.num_iterations_per_epoch,
            "init_args": {"configuration": self.configuration_name, "fold": self.fold},
            # stock nnU-Net looks this name up when it predicts
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": None,
        }
        state = run_state(self.network, self.method, self.records, self.embeddings)
        state["probe"] = self.probe.state(chose_weights=leaves) if self.probe else self._probe_state
        write_checkpoint(Path(filename), content, self._provenance(finished), state)
        if not leaves:
            self._last_save, self._save_seconds = time(), time() - started

    def _provenance(self, finished: bool) -> Provenance:
        return Provenance(
            nnssl_version=nnssl.__version__,
            method=self.method_entry.name,
            stage=self.stage,
            dataset_name=self.plan.dataset_name,
            plans_name=self.plan.name,
            configuration=self.configuration_name,
            plans=self.plans_manager.plans,
            dataset_json=self.dataset_json,
            settings=plain_settings(self.settings, self.origins),
            seed=self.options.seed,
            step=self.current_step,
            total_steps=self.training.total_steps,
            finished=finished,
            pretrained=self.method.exported().pretrained,
            init=self.init_from,
            cases=self.cases,
        )

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """Go on from a checkpoint of the same stage, plan and settings.

        Raises:
            UserError: the checkpoint belongs to another stage, plan or to other settings.
        """
        if not self.was_initialized:
            self.initialize()
        path = Path(str(filename_or_checkpoint))
        content, provenance = read_checkpoint(path)
        check_same_run(
            path,
            provenance,
            self.plan,
            self.configuration_name,
            self.stage,
            plain_settings(self.settings, self.origins),
            self.options.seed,
        )

        self.records, self.embeddings = read_state(path, content, self.network, self.method, self.device)
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.logger.load_checkpoint(content["logging"])
        self.current_step = provenance.step
        self.cases = provenance.cases or ()
        self._probe_state = content["nnssl"]["state"].get("probe")  # earlier versions had none
        self.current_epoch = content["current_epoch"]

    # ---------------------------------------------------------------- what needs labels in nnU-Net

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do nothing: without labels there is no Dice; ``nnssl_finetune`` evaluates the weights."""
        self.print_to_log_file("Pretraining has no validation Dice; evaluate the weights with nnssl_finetune")

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: no pretext loss looks at the segmentation layers."""


def _default_workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # a CPU that trains has no core to spare for more than one reader
    return 1 if device.type == "cpu" else max(1, min(8, cores - 1))
