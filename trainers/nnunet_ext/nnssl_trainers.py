"""The module that ``nnUNet_extTrainer`` points to: nnU-Net imports it on its own and finds nnssl's trainers in it."""

from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.linear_probe import LinearProbeTrainer
from trainers.finetuning.mean_teacher import MeanTeacherTrainer
from trainers.pretraining.pretext import (
    AliceTrainer,
    MAETrainer,
    ModelsGenesisTrainer,
    PCRLTrainer,
    Pix2RepTrainer,
    Pix2RepV2Trainer,
    PixelGlobalTrainer,
    RegionsTrainer,
    RepRecContrastiveTrainer,
    RepRecGenerativeTrainer,
    SAMTrainer,
    SimCLRTrainer,
    VolumeFusionTrainer,
)

__all__ = [
    "AliceTrainer",
    "FinetuneTrainer",
    "LinearProbeTrainer",
    "MAETrainer",
    "MeanTeacherTrainer",
    "ModelsGenesisTrainer",
    "PCRLTrainer",
    "Pix2RepTrainer",
    "Pix2RepV2Trainer",
    "PixelGlobalTrainer",
    "RegionsTrainer",
    "RepRecContrastiveTrainer",
    "RepRecGenerativeTrainer",
    "SAMTrainer",
    "SimCLRTrainer",
    "VolumeFusionTrainer",
]
