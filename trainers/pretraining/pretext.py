"""One trainer for each pretext stage: the name that nnU-Net users type after ``-tr``, and nothing else."""

from trainers.pretraining.pretrain_trainer import PretrainTrainer


class RepRecContrastiveTrainer(PretrainTrainer):
    """RepRec, stage 1: momentum contrast for the convolutional encoder."""

    stage = "reprec.contrastive"


class RepRecGenerativeTrainer(PretrainTrainer):
    """RepRec, stage 2: masked recovery of the encoder's features by the transformer."""

    stage = "reprec.generative"


class Pix2RepTrainer(PretrainTrainer):
    """Pix2Rep v1: contrast of points, for encoder and decoder."""

    stage = "pix2rep.dense"


class Pix2RepV2Trainer(PretrainTrainer):
    """Pix2Rep v2: redundancy reduction over points, for encoder and decoder."""

    stage = "pix2rep_v2.dense"


class PCRLTrainer(PretrainTrainer):
    """PCRL: contrast and reconstruction of diverse contexts, for encoder and decoder."""

    stage = "pcrl.contexts"


class PixelGlobalTrainer(PretrainTrainer):
    """Pixel-global: distillation of whole images and of shared voxels, for encoder and decoder."""

    stage = "pixelglobal.distillation"


class SAMTrainer(PretrainTrainer):
    """SAM: anatomical embeddings of every voxel."""

    stage = "sam.embedding"


class AliceTrainer(PretrainTrainer):
    """Alice: masked modelling, and the same anatomy in different patients."""

    stage = "alice.alignment"


class SimCLRTrainer(PretrainTrainer):
    """SimCLR: contrast of two views of a patch within the batch."""

    stage = "simclr.contrast"
