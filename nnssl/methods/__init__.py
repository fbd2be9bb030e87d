"""Index of the pretext methods.

This module must not import heavy packages, because the commands list the methods before they need torch.
"""

from nnssl.errors import UserError
from nnssl.methods.stages import Method, Needs, Stage

__all__ = ["AUTO", "METHODS", "SAM", "Method", "Needs", "Stage", "find_method", "find_stage"]

AUTO = "auto"
"""Word for the method that a short probe of several methods chooses, in place of a name."""

SAM = "sam.embedding"
"""Name of the stage whose embeddings determine which places of different scans correspond."""
SAM_STAGE = Stage(
    name=SAM,
    trainer="SAMTrainer",
    implementation="nnssl.methods.sam:SAM",
    encoder_graphs=2,
    encoder_passes=0,
    decoder_graphs=1,
    needs=Needs(
        useful_batch=4,
        paper_batch=4,
        least_mm=(64.0, 64.0),
        crop_mm=(192.0, 128.0),
        contrasts_patches=False,
        source="3 to 6 pairs of crops of 96 x 96 x 32 voxels at 2 mm (authors' code), the volume of a cube of 133 mm",
    ),
    piece_values=52_000_000,  # four copies of the negatives of the fine queries, 2 x 100 x 500 x 128
    batch_values=26_000_000,  # the same for the coarse queries, 2 x 50 x 500 x 128
    configuration="3d_fullres",
    examination="nnssl.matching.anatomical_sanity:examine",
    least_steps=2000,  # a tenth of the authors' code; 500 found organs in eight coarse scans (documentation/results/matching.md)
)

PIX2REP_NEEDS = Needs(
    useful_batch=4,
    paper_batch=8,
    least_mm=(64.0, 48.0),
    crop_mm=(192.0, 96.0),
    contrasts_patches=False,
    source="8 cardiac slices of 128 pixels of about 1.5 mm (section 3); volumes: the body part in view, 96 mm",
)
"""Needs of both versions of Pix2Rep, which share their views."""

METHODS = {
    "pix2rep_v2": Method(
        name="pix2rep_v2",
        title="Pix2Rep v2: Barlow Twins over points, for encoder and decoder",
        source="Seince et al., Dense Self-Supervised Learning for Medical Image Segmentation, MIDL 2024",
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="pix2rep_v2.dense",
                trainer="Pix2RepV2Trainer",
                implementation="nnssl.methods.pix2rep:Pix2RepV2",
                encoder_graphs=2,
                encoder_passes=0,
                decoder_graphs=2,
                needs=PIX2REP_NEEDS,
                points="correlation",
            ),
        ),
    ),
    "reprec": Method(
        name="reprec",
        title="Representation Recovering: momentum contrast, then masked recovery of features",
        source="Yan et al., Representation Recovering for Self-Supervised Pre-training on Medical Images, WACV 2023",
        backbone="a convolutional U-Net with a transformer (hybrid)",
        configurations=("3d_fullres_hybrid", "2d_hybrid"),
        stages=(
            Stage(
                name="reprec.contrastive",
                trainer="RepRecContrastiveTrainer",
                implementation="nnssl.methods.reprec:RepRecContrastive",
                encoder_graphs=1,
                encoder_passes=1,
                decoder_graphs=0,
                needs=Needs(
                    useful_batch=8,
                    paper_batch=256,
                    least_mm=(96.0, 64.0),
                    crop_mm=(224.0, 128.0),
                    contrasts_patches=True,
                    source="crops of 224 pixels at 1 mm (section 5.1); no batch stated, so MoCo's; volumes: 128 mm, as SAM",
                ),
            ),
            Stage(
                name="reprec.generative",
                trainer="RepRecGenerativeTrainer",
                implementation="nnssl.methods.reprec:RepRecGenerative",
                encoder_graphs=0,
                encoder_passes=1,
                decoder_graphs=0,
                needs=Needs(
                    useful_batch=8,
                    paper_batch=32,
                    least_mm=(96.0, 64.0),
                    crop_mm=(224.0, 128.0),
                    contrasts_patches=False,
                    source="slices of 224 pixels at 1 mm (section 5.1); no batch stated, 32 chosen; volumes: 128 mm, as SAM",
                ),
                reads_tokens=True,
            ),
        ),
    ),
    "pix2rep": Method(
        name="pix2rep",
        title="Pix2Rep: equivariant contrast of points, for encoder and decoder",
        source="Seince et al., Dense Self-Supervised Learning for Medical Image Segmentation, MIDL 2024",
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="pix2rep.dense",
                trainer="Pix2RepTrainer",
                implementation="nnssl.methods.pix2rep:Pix2Rep",
                encoder_graphs=2,
                encoder_passes=0,
                decoder_graphs=2,
                needs=PIX2REP_NEEDS,
                points="contrast",
            ),
        ),
    ),
    "pcrl": Method(
        name="pcrl",
        title="PCRL: momentum contrast, and reconstruction of transformed crops by a shared decoder",
        source=(
            "Zhou et al., Preservational Learning Improves Self-supervised Medical Image Models by Reconstructing Diverse "
            "Contexts, ICCV 2021"
        ),
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="pcrl.contexts",
                trainer="PCRLTrainer",
                implementation="nnssl.methods.pcrl:PCRL",
                encoder_graphs=1,
                encoder_passes=1,
                decoder_graphs=3,
                needs=Needs(
                    useful_batch=8,
                    paper_batch=16,
                    least_mm=(96.0, 48.0),
                    crop_mm=(224.0, 96.0),
                    contrasts_patches=True,
                    source="16 crops of 32 to 112 mm; in 2D, images of 224 pixels (authors' code)",
                    equal_sides=True,
                ),
            ),
        ),
    ),
    "sam": Method(
        name="sam",
        title="SAM: anatomical embeddings, which find the same place in other scans",
        source=(
            "Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in Radiological Images, TMI 2022"
        ),
        backbone="a convolutional U-Net for volumes",
        configurations=("3d_fullres",),
        stages=(SAM_STAGE,),
    ),
    "alice": Method(
        name="alice",
        title="Alice: masked modelling, and alignment of the same anatomy in different patients",
        source=(
            "Jiang et al., Anatomical Invariance Modeling and Semantic Alignment for Self-supervised Learning in 3D Medical "
            "Image Analysis, ICCV 2023"
        ),
        backbone="Primus, or a convolutional U-Net for volumes",
        configurations=("3d_fullres_primus", "3d_fullres"),
        stages=(
            SAM_STAGE,
            Stage(
                name="alice.alignment",
                trainer="AliceTrainer",
                implementation="nnssl.methods.alice:Alice",
                encoder_graphs=1,
                encoder_passes=1,
                decoder_graphs=0,
                needs=Needs(
                    useful_batch=8,
                    paper_batch=16,
                    least_mm=(64.0, 64.0),
                    crop_mm=(160.0, 128.0),
                    contrasts_patches=False,
                    source="8 pairs of crops of 192 x 192 x 64 voxels of abdominal CT, about 150 mm, per GPU (section 4.1)",
                ),
                batch_multiple=2,
                reads_tokens=True,
                token_values=8_000,  # projection and CASA of student and teacher, in float32
                fresh=True,
            ),
        ),
    ),
    "mae": Method(
        name="mae",
        title="MAE: recovery of masked voxels, for encoder and decoder, or for Primus",
        source=(
            "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022; Wald et al., Revisiting MAE Pre-training "
            "for 3D Medical Image Segmentation, CVPR 2025"
        ),
        backbone="a convolutional U-Net, or Primus",
        configurations=("3d_fullres", "2d", "3d_fullres_primus"),
        stages=(
            Stage(
                name="mae.recovery",
                trainer="MAETrainer",
                implementation="nnssl.methods.mae:MAE",
                encoder_graphs=1,
                encoder_passes=0,
                decoder_graphs=1,
                needs=Needs(
                    useful_batch=4,
                    paper_batch=6,
                    least_mm=(96.0, 64.0),
                    crop_mm=(224.0, 160.0),
                    contrasts_patches=False,
                    source="6 patches of 160 voxels at 1 mm (Wald et al.), in 2D images of 224 pixels (He et al.)",
                ),
                masks_tokens=True,
            ),
        ),
    ),
    "models_genesis": Method(
        name="models_genesis",
        title="Models Genesis: restoration of corrupted patches, for encoder and decoder",
        source="Zhou et al., Models Genesis, MICCAI 2019 and Medical Image Analysis 67, 2021",
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="models_genesis.restoration",
                trainer="ModelsGenesisTrainer",
                implementation="nnssl.methods.models_genesis:ModelsGenesis",
                encoder_graphs=1,
                encoder_passes=0,
                decoder_graphs=1,
                needs=Needs(
                    useful_batch=4,
                    paper_batch=6,
                    least_mm=(64.0, 48.0),
                    crop_mm=(224.0, 96.0),
                    contrasts_patches=False,
                    source="6 patches of 64 x 64 x 32 voxels of chest CT (authors' code), the body part in view",
                ),
            ),
        ),
    ),
    "volume_fusion": Method(
        name="volume_fusion",
        title="Volume Fusion: segmentation of two fused patches by their coefficient, for encoder and decoder",
        source=(
            "Wang et al., Volume Fusion-based Self-supervised Pretraining for 3D Medical Image Segmentation, TIP 2025 "
            "(MIS-FM, 2023)"
        ),
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="volume_fusion.segmentation",
                trainer="VolumeFusionTrainer",
                implementation="nnssl.methods.volume_fusion:VolumeFusion",
                encoder_graphs=1,
                encoder_passes=0,
                decoder_graphs=1,
                needs=Needs(
                    useful_batch=4,
                    paper_batch=4,
                    least_mm=(96.0, 64.0),
                    crop_mm=(224.0, 128.0),
                    contrasts_patches=False,
                    source="4 sub-volumes of 64 x 128 x 128 voxels (authors' configuration)",
                ),
                batch_multiple=2,
            ),
        ),
    ),
    "regions": Method(
        name="regions",
        title="Regions: points are assigned to supervoxels by prototypes, for encoder and decoder",
        source=(
            "after Gao et al., Learning Generalizable 3D Medical Image Representations from Mask-Guided Self-Supervision "
            "(MASS), CVPR 2026"
        ),
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="regions.prototypes",
                trainer="RegionsTrainer",
                implementation="nnssl.methods.regions:Regions",
                encoder_graphs=2,
                encoder_passes=0,
                decoder_graphs=2,
                needs=Needs(
                    useful_batch=4,
                    paper_batch=8,
                    least_mm=(64.0, 48.0),
                    crop_mm=(192.0, 128.0),
                    contrasts_patches=True,
                    source="volumes of 128 voxels (MASS); slices: as Pix2Rep, which compares points too",
                ),
                batch_values=2_000_000,  # features and embeddings of 1,536 points
            ),
        ),
    ),
    "simclr": Method(
        name="simclr",
        title="SimCLR, the baseline: contrast of two views of a patch with all other patches of the batch",
        source="Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020",
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="simclr.contrast",
                trainer="SimCLRTrainer",
                implementation="nnssl.methods.simclr:SimCLR",
                encoder_graphs=2,
                encoder_passes=0,
                decoder_graphs=0,
                needs=Needs(
                    useful_batch=16,
                    paper_batch=4096,
                    least_mm=(96.0, 64.0),
                    crop_mm=(224.0, 128.0),
                    contrasts_patches=True,
                    source="4,096 images of 224 pixels (section 2.2); 16 patches have 30 negatives; volumes: 128 mm, as SAM",
                ),
            ),
        ),
    ),
    "pixelglobal": Method(
        name="pixelglobal",
        title="Pixel-global: a teacher and a student agree on whole images and on every shared voxel",
        source="Pixel-global self-supervised learning with uncertainty-aware context stabilizer, 2022",
        backbone="a convolutional U-Net",
        configurations=("3d_fullres", "2d"),
        stages=(
            Stage(
                name="pixelglobal.distillation",
                trainer="PixelGlobalTrainer",
                implementation="nnssl.methods.pixelglobal:PixelGlobal",
                encoder_graphs=1,
                encoder_passes=1,
                decoder_graphs=1,
                needs=Needs(
                    useful_batch=8,
                    paper_batch=8,
                    least_mm=(96.0, 64.0),
                    crop_mm=(224.0, 128.0),
                    contrasts_patches=False,
                    source="8 crops of 224 pixels (section 4.1); volumes: 128 mm, as SAM",
                ),
            ),
        ),
    ),
}


def find_method(name: str) -> Method:
    """Return a method by its name.

    Raises:
        UserError: If the method is unknown; the message lists the available ones.
    """
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}. Available methods: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def find_stage(name: str) -> tuple[Method, Stage]:
    """Return the method and the stage that a name of the form ``method.stage`` denotes.

    Raises:
        UserError: If the stage is unknown; the message lists the available ones.
    """
    for method in METHODS.values():
        for stage in method.stages:
            if stage.name == name:
                return method, stage
    stages = sorted({stage.name for method in METHODS.values() for stage in method.stages})
    raise UserError(f"Unknown pretext stage {name!r}. Available stages: {', '.join(stages)}")
