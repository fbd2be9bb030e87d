"""What ``nnUNet_extTrainer`` points at: nnU-Net imports this module by itself and finds nnssl's trainers in it."""

from trainers.finetune import FinetuneTrainer
from trainers.linear_probe import LinearProbeTrainer
from trainers.mean_teacher import MeanTeacherTrainer
from trainers.pretext import (
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
