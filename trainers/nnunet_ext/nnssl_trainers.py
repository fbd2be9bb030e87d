"""The module that ``nnUNet_extTrainer`` points to: nnU-Net imports it on its own and finds nnssl's trainers in it."""

from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.linear_probe import LinearProbeTrainer
from trainers.finetuning.mean_teacher import MeanTeacherTrainer
from trainers.pretraining.pretext import (
    AliceTrainer,
    PCRLTrainer,
    Pix2RepTrainer,
    Pix2RepV2Trainer,
    PixelGlobalTrainer,
    RepRecContrastiveTrainer,
    RepRecGenerativeTrainer,
    SAMTrainer,
    SimCLRTrainer,
)

__all__ = [
    "AliceTrainer",
    "FinetuneTrainer",
    "LinearProbeTrainer",
    "MeanTeacherTrainer",
    "PCRLTrainer",
    "Pix2RepTrainer",
    "Pix2RepV2Trainer",
    "PixelGlobalTrainer",
    "RepRecContrastiveTrainer",
    "RepRecGenerativeTrainer",
    "SAMTrainer",
    "SimCLRTrainer",
]
