"""One trainer for each pretext stage. It only gives the stage the name that nnU-Net users type after ``-tr``."""

from trainers.pretraining.pretrain_trainer import PretrainTrainer


class RepRecContrastiveTrainer(PretrainTrainer):
    """RepRec, stage 1: momentum contrast that trains the convolutional encoder."""

    stage = "reprec.contrastive"


class RepRecGenerativeTrainer(PretrainTrainer):
    """RepRec, stage 2: masked recovery of the encoder's features, which trains the transformer."""

    stage = "reprec.generative"


class Pix2RepTrainer(PretrainTrainer):
    """Pix2Rep v1: contrast of points, which trains encoder and decoder."""

    stage = "pix2rep.dense"


class Pix2RepV2Trainer(PretrainTrainer):
    """Pix2Rep v2: redundancy reduction over points, which trains encoder and decoder."""

    stage = "pix2rep_v2.dense"


class PCRLTrainer(PretrainTrainer):
    """PCRL: contrast and reconstruction of diverse contexts, which train encoder and decoder."""

    stage = "pcrl.contexts"


class PixelGlobalTrainer(PretrainTrainer):
    """Pixel-global: distillation of whole images and of shared voxels, which trains encoder and decoder."""

    stage = "pixelglobal.distillation"


class SAMTrainer(PretrainTrainer):
    """SAM: anatomical embeddings of every voxel."""

    stage = "sam.embedding"


class AliceTrainer(PretrainTrainer):
    """Alice: masked modelling, and alignment of the same anatomy in different patients."""

    stage = "alice.alignment"


class SimCLRTrainer(PretrainTrainer):
    """SimCLR: contrast of two views of a patch with all other patches of the batch."""

    stage = "simclr.contrast"


class RegionsTrainer(PretrainTrainer):
    """Regions: points are assigned to supervoxels by prototypes, which trains encoder and decoder."""

    stage = "regions.prototypes"


class MAETrainer(PretrainTrainer):
    """MAE: recovery of masked voxels."""

    stage = "mae.recovery"


class ModelsGenesisTrainer(PretrainTrainer):
    """Models Genesis: restoration of corrupted patches, which trains encoder and decoder."""

    stage = "models_genesis.restoration"


class VolumeFusionTrainer(PretrainTrainer):
    """Volume Fusion: segmentation of fused patches, which trains encoder and decoder."""

    stage = "volume_fusion.segmentation"
