"""What ``nnUNet_extTrainer`` points at: nnU-Net imports this module by itself and finds nnssl's trainers in it."""

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
