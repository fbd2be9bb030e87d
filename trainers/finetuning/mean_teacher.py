"""MeanTeacherTrainer: fine-tuning with a consistency term on images whose labels are not used.

Source: Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017; numbers of Yu et al., UA-MT, MICCAI 2019
(momentum, noise, weight and its ramp), as used after pretraining by Seince et al., Pix2Rep, MIDL 2024.

A step sees a labelled and an unlabelled batch. The student's loss is that of fine-tuning on the first, and on the second the
mean squared difference of its probabilities from those of the teacher, the moving average of its weights; both see the same
patches, each with noise of its own. The teacher is what is saved and what predicts.

Deviations:
    * UA-MT masks voxels of which the teacher is not certain; here all voxels count, as in the original.
    * UA-MT predicts with the student, the original with the teacher; here the teacher.
    * UA-MT ramps the weight up over the whole run (40 times 150 of 6000 steps), in steps of 150; here over the first 40 %
      of the run, in every step.
    * UA-MT's code adds noise to what the teacher sees only; here to both, as in its paper and in the original.
    * UA-MT's student sees labelled and unlabelled patches as one batch, and half of its batch is labelled; here they are two
      batches of the plan's size, so that the labelled ones are exactly those of plain fine-tuning, without added noise.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor, nn

from nnssl.draws import draw_seed
from nnssl.momentum import make_teacher, update_teacher
from trainers.finetuning.finetune_trainer import FinetuneTrainer

STUDENT_KEY = "nnssl_student"


@dataclass(frozen=True)
class Consistency:
    """The numbers of UA-MT."""

    weight: float = 0.1
    """Of the consistency term after the ramp."""
    ramp_share: float = 0.4
    """Of the run, over which the weight rises."""
    momentum: float = 0.99
    """Largest share of the teacher that a step keeps."""
    noise_std: float = 0.1
    """In standard deviations of the image; clipped at twice that."""


def consistency_weight(step: int, total_steps: int, numbers: Consistency) -> float:
    """Return ``weight * exp(-5 (1 - t)^2)``, t the share of the ramp that is done.

    Source: UA-MT, section 3.1; Laine and Aila, Temporal ensembling, ICLR 2017.
    """
    done = min(1.0, step / max(1.0, numbers.ramp_share * total_steps))
    return numbers.weight * math.exp(-5 * (1 - done) ** 2)


def teacher_momentum(step: int, numbers: Consistency) -> float:
    """Return ``min(1 - 1 / (step + 1), momentum)``: a plain mean of the first students, then a moving one."""
    return min(1 - 1 / (step + 1), numbers.momentum)


class MeanTeacherTrainer(FinetuneTrainer):
    """Trains a student on labelled and unlabelled patches and saves its moving average; made by ``make_trainer``."""

    network: nn.Module
    consistency = Consistency()
    teacher: nn.Module | None = None
    steps_done = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_epochs * self.num_iterations_per_epoch

    def make_train_batches(self, loader: nnUNetDataLoader) -> Iterator[dict[str, Any]]:
        """Return fine-tuning's batches, each with an unlabelled one of the same size under ``unlabelled``."""
        unlabelled = copy.copy(loader)
        folder = str(self.settings.unlabelled_folder or self.preprocessed_dataset_folder)
        unlabelled._data = self.dataset_class(folder, list(self.settings.unlabelled_cases))
        unlabelled.indices = unlabelled._data.identifiers
        # both would look at labels to choose where patches lie
        unlabelled.oversample_foreground_percent = 0.0
        unlabelled.get_do_oversample = unlabelled._oversample_last_XX_percent  # the copied method is the other loader's
        unlabelled.has_ignore = False
        others = self.iterate(
            unlabelled, "finetune/unlabelled", self.num_iterations_per_epoch, self.settings.augmentation_processes
        )
        labelled = super().make_train_batches(loader)
        return ({**batch, "unlabelled": other["data"]} for batch, other in zip(labelled, others, strict=True))

    def on_train_start(self) -> None:
        """Make the teacher, a copy of the student, unless a checkpoint brought one."""
        super().on_train_start()
        self.steps_done = self.current_epoch * self.num_iterations_per_epoch
        if self.teacher is None:
            self._make_teacher()

    def _make_teacher(self) -> None:
        self.teacher = make_teacher(self.bare_network)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate; the teacher draws and normalises as the student does, as in both sources."""
        super().on_train_epoch_start()
        assert self.teacher is not None
        self.teacher.train()

    def train_step(self, batch: dict) -> dict:
        """Take one optimizer step on both batches, then move the teacher."""
        result = super().train_step(batch)
        assert self.teacher is not None
        update_teacher(self.bare_network, self.teacher, teacher_momentum(self.steps_done, self.consistency))
        self.steps_done += 1
        return result

    def on_validation_epoch_start(self) -> None:
        """Compute as in prediction."""
        super().on_validation_epoch_start()
        assert self.teacher is not None
        self.teacher.eval()

    def validation_step(self, batch: dict) -> dict:
        """Return loss and overlap counts of a held-out batch for the teacher, which is what will predict."""
        assert self.teacher is not None
        student, self.network = self.network, self.teacher
        try:
            return super().validation_step(batch)
        finally:
            self.network = student

    def batch_losses(self, batch: dict) -> Iterator[Tensor]:
        """Yield nnU-Net's loss of the labelled patches, then the weighted consistency of the unlabelled ones."""
        yield from super().batch_losses(batch)
        weight = consistency_weight(self.steps_done, self.total_steps, self.consistency)
        yield weight * self.consistency_loss(batch["unlabelled"])

    def consistency_loss(self, volumes: Tensor) -> Tensor:
        """Return the mean squared difference of probabilities of student and teacher.

        Args:
            volumes: (batch, channel, *shape), augmented.
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
        noise = torch.randn(volumes.shape, generator=generator, device=volumes.device) * self.consistency.noise_std
        limit = 2 * self.consistency.noise_std
        noisy: Any = self.precision.lay_out(volumes + noise.clamp(-limit, limit), volumes.ndim - 2)
        return noisy

    def _probabilities(self, outputs: Tensor | list[Tensor]) -> Tensor:
        """Return what nnU-Net makes of the logits of full resolution, in float32."""
        logits = (outputs if isinstance(outputs, Tensor) else outputs[0]).float()
        return logits.sigmoid() if self.label_manager.has_regions else logits.softmax(dim=1)

    def weights_to_save(self) -> dict[str, Any]:
        """Return the teacher as ``network_weights``, and the student, from which training goes on."""
        if self.teacher is None:
            return super().weights_to_save()
        return {"network_weights": self.teacher.state_dict(), STUDENT_KEY: self.bare_network.state_dict()}

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Go on from a checkpoint: the network is the student, if the checkpoint has one, else the finished teacher."""
        super().load_checkpoint(filename_or_checkpoint)
        content = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=True)
        if STUDENT_KEY in content:
            self._make_teacher()
            self.bare_network.load_state_dict(content[STUDENT_KEY])

    def on_train_end(self) -> None:
        """Let the teacher take the student's place, and save it."""
        assert self.teacher is not None
        self.bare_network.load_state_dict(self.teacher.state_dict())
        self.teacher = None
        super().on_train_end()
