"""LinearProbeTrainer: trains only the segmentation layer, on features that stay as they were pretrained.

Source: Seince et al., Pix2Rep, MIDL 2024 (linear probing): a 1 x 1 layer on the last feature map, Adam, learning rate 1e-2.

The layer reads what was pretrained: the last decoder stage, or all decoder stages and the bottleneck for weights whose
pretraining described a point by them. The plan then names a class of ``nnssl.networks.pyramid``.

Deviations: the paper has only the last stage, which is 1,024 channels wide there. Loss, augmentation and learning-rate schedule
are those of ``FinetuneTrainer``, so that a probe differs from a fine-tuned network only in the trained layers and the optimizer.
There is no deep supervision, whose other layers would be trained on features that no prediction uses.
"""

from typing import Any

import torch

from nnssl.networks.pyramid import PyramidSegmentation
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.optimisation import StepSchedule, TrainedParameters, make_optimizer


class LinearProbeTrainer(FinetuneTrainer):
    """Trainer of the segmentation layer of full resolution, with all other weights frozen. Made by ``make_trainer``."""

    def initialize(self) -> None:
        """Build network, optimizer and loss without deep supervision, because its other layers are not trained."""
        self.enable_deep_supervision = False
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, StepSchedule]:
        """Freeze all layers but the segmentation layer; return Adam for that layer and the schedule of fine-tuning."""
        self.network.requires_grad_(False)
        network: Any = self.bare_network
        if isinstance(network, PyramidSegmentation):
            layer = network.linear_layer()
        else:
            layer = list(network.decoder.seg_layers[-1].parameters())
        for parameter in layer:
            parameter.requires_grad_(True)
        optimizer = make_optimizer(TrainedParameters((), tuple(layer)), self.settings.schedule, self.weight_decay)
        return optimizer, StepSchedule(optimizer, self.settings.schedule)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate and compute features as in prediction: without dropout and with stored statistics."""
        super().on_train_epoch_start()
        self.network.eval()
