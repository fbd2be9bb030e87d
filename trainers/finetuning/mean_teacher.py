"""MeanTeacherTrainer: fine-tuning with a consistency term on images whose labels are not used.

Source: Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017. Momentum, noise, weight and its ramp are
from Yu et al., UA-MT, MICCAI 2019, as used after pretraining by Seince et al., Pix2Rep, MIDL 2024.

Each step sees a labelled and an unlabelled batch. The unlabelled batch is drawn from the training cases, without their labels,
and from the unlabelled cases alike, as Pix2Rep takes all slices. On the labelled batch the student has the loss of fine-tuning.
On the unlabelled batch its loss is the mean squared difference between its probabilities and those of the teacher, which is the
moving average of its weights. Both see the same patches, each with its own noise. The teacher is saved and used to predict.

Deviations:
    * UA-MT masks voxels for which the teacher is uncertain; here all voxels count, as in the original.
    * UA-MT predicts with the student, the original with the teacher; here the teacher predicts.
    * UA-MT ramps the weight up over the whole run (40 times 150 of 6000 steps), every 150 steps; here it rises over the
      first 40 % of the run, at every step.
    * UA-MT's code adds noise to the input of the teacher only; here both inputs get noise, as in its paper and in the
      original.
    * UA-MT's student sees labelled and unlabelled patches in one batch, half of which is labelled; here they are two batches
      of the plan's size, so that the labelled batches are exactly those of plain fine-tuning, without added noise.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor, nn

from nnssl.draws import draw_seed
from nnssl.momentum import make_teacher, update_teacher
from trainers.finetuning.finetune_trainer import FinetuneTrainer

STUDENT_KEY = "nnssl_student"


@dataclass(frozen=True)
class Consistency:
    """Hyper-parameters of the consistency term, with the values of UA-MT."""

    weight: float = 0.1
    """Weight of the consistency term after the ramp."""
    ramp_share: float = 0.4
    """Share of the run over which the weight rises."""
    momentum: float = 0.99
    """Largest share of the teacher that a step keeps, between 0 and 1."""
    noise_std: float = 0.1
    """Standard deviation of the noise, in standard deviations of the image. Noise is clipped at twice this value."""


def consistency_weight(step: int, total_steps: int, numbers: Consistency) -> float:
    """Return ``weight * exp(-5 (1 - t)^2)``, where t is the completed share of the ramp.

    Source: UA-MT, section 3.1; Laine and Aila, Temporal ensembling, ICLR 2017.
    """
    done = min(1.0, step / max(1.0, numbers.ramp_share * total_steps))
    return numbers.weight * math.exp(-5 * (1 - done) ** 2)


def teacher_momentum(step: int, numbers: Consistency) -> float:
    """Return ``min(1 - 1 / (step + 1), momentum)``: a plain mean of the first students, then a moving average."""
    return min(1 - 1 / (step + 1), numbers.momentum)


class JoinedCases:
    """Preprocessed cases of several folders as one data set for nnU-Net's loader, also where two cases have the same name.

    Args:
        *parts: Data sets of nnU-Net.
    """

    def __init__(self, *parts: nnUNetBaseDataset) -> None:
        self.places = {
            f"{number}/{name}": (part, name) for number, part in enumerate(parts) for name in part.identifiers
        }
        self.identifiers = list(self.places)

    def load_case(self, identifier: str) -> Any:
        """Return what nnU-Net's data set returns for a case."""
        part, name = self.places[identifier]
        return part.load_case(name)


class MeanTeacherTrainer(FinetuneTrainer):
    """Trainer of a student on labelled and unlabelled patches, whose moving average it saves. Made by ``make_trainer``."""

    network: nn.Module
    consistency = Consistency()
    teacher: nn.Module | None = None

    def make_train_batches(self, loader: nnUNetDataLoader) -> Iterator[dict[str, Any]]:
        """Return the batches of fine-tuning, each with a batch of the same size, used without labels, under ``unlabelled``."""
        unlabelled = copy.copy(loader)
        own = self.preprocessed_dataset_folder
        folder = str(self.settings.unlabelled_folder or own)
        unlabelled._data = JoinedCases(
            self.dataset_class(own, list(self.settings.train_cases)),
            self.dataset_class(folder, list(self.settings.unlabelled_cases)),
        )
        unlabelled.indices = unlabelled._data.identifiers
        # Both settings would use labels to place the patches.
        unlabelled.oversample_foreground_percent = 0.0
        unlabelled.get_do_oversample = (
            unlabelled._oversample_last_XX_percent
        )  # the copied method is bound to the other loader
        unlabelled.has_ignore = False
        others = self.iterate(
            unlabelled,
            "finetune/unlabelled",
            self.num_iterations_per_epoch,
            self.settings.augmentation_processes,
            self.rows,
        )
        labelled = super().make_train_batches(loader)
        return ({**batch, "unlabelled": other["data"]} for batch, other in zip(labelled, others, strict=True))

    def on_train_start(self) -> None:
        """Make the teacher, a copy of the student, unless it was loaded from a checkpoint."""
        super().on_train_start()
        if self.teacher is None:
            self._make_teacher()

    def _make_teacher(self) -> None:
        self.teacher = make_teacher(self.bare_network)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate. The teacher is in training mode like the student, as in both sources."""
        super().on_train_epoch_start()
        assert self.teacher is not None
        self.teacher.train()

    def train_step(self, batch: dict) -> dict:
        """Take one optimizer step on both batches, then update the teacher."""
        momentum = teacher_momentum(self.steps_done, self.consistency)
        result = super().train_step(batch)
        assert self.teacher is not None
        update_teacher(self.bare_network, self.teacher, momentum)
        return result

    def on_validation_epoch_start(self) -> None:
        """Set student and teacher to evaluation mode, as in prediction."""
        super().on_validation_epoch_start()
        assert self.teacher is not None
        self.teacher.eval()

    def validation_step(self, batch: dict) -> dict:
        """Return the loss and the overlap counts of a held-out batch for the teacher, which will predict."""
        assert self.teacher is not None
        student, self.network = self.network, self.teacher
        try:
            return super().validation_step(batch)
        finally:
            self.network = student

    def batch_losses(self, batch: dict) -> Iterator[Tensor]:
        """Yield nnU-Net's loss of the labelled patches, then the weighted consistency term of the unlabelled patches."""
        yield from super().batch_losses(batch)
        weight = consistency_weight(self.steps_done, self.settings.schedule.total_steps, self.consistency)
        yield weight * self.consistency_loss(batch["unlabelled"])

    def consistency_loss(self, volumes: Tensor) -> Tensor:
        """Return the mean squared difference between the probabilities of student and teacher.

        Args:
            volumes: Augmented patches, (batch, channel, *shape).
        """
        assert self.teacher is not None
        volumes = volumes.to(self.device, non_blocking=True)
        with torch.no_grad(), self.precision.autocast(self.device):
            expected = self._probabilities(self.teacher(self._with_noise(volumes, "teacher")))
        with self.precision.autocast(self.device):
            found = self._probabilities(self.network(self._with_noise(volumes, "student")))
        return nn.functional.mse_loss(found, expected)

    def _with_noise(self, volumes: Tensor, who: str) -> Tensor:
        seed = draw_seed(self.settings.seed, f"finetune/noise/{who}", self.steps_done)
        generator = torch.Generator(volumes.device).manual_seed(seed)
        whole = (self.batch_size, *volumes.shape[1:])  # every process draws the noise of the batch and takes its rows
        noise = torch.randn(whole, generator=generator, device=volumes.device)[self.rows] * self.consistency.noise_std
        limit = 2 * self.consistency.noise_std
        noisy: Any = self.precision.lay_out(volumes + noise.clamp(-limit, limit), volumes.ndim - 2)
        return noisy

    def _probabilities(self, outputs: Tensor | list[Tensor]) -> Tensor:
        """Return the probabilities at full resolution in float32, computed from the logits as nnU-Net does."""
        logits = (outputs if isinstance(outputs, Tensor) else outputs[0]).float()
        return logits.sigmoid() if self.label_manager.has_regions else logits.softmax(dim=1)

    def weights_to_save(self) -> dict[str, Any]:
        """Return the teacher as ``network_weights``, and the student, from which training resumes."""
        if self.teacher is None:
            return super().weights_to_save()
        return {"network_weights": self.teacher.state_dict(), STUDENT_KEY: self.bare_network.state_dict()}

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Resume from a checkpoint. The network is the student if the checkpoint has one, else the finished teacher."""
        super().load_checkpoint(filename_or_checkpoint)
        content = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=True)
        if STUDENT_KEY in content:
            self._make_teacher()
            self.bare_network.load_state_dict(content[STUDENT_KEY])

    def on_train_end(self) -> None:
        """Replace the student by the teacher and save it."""
        assert self.teacher is not None
        self.bare_network.load_state_dict(self.teacher.state_dict())
        self.teacher = None
        super().on_train_end()
