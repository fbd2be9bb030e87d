"""Index of the pretext methods.

This module must not import heavy packages, because the commands list the methods before they need torch.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from nnssl.errors import UserError


@dataclass(frozen=True)
class Needs:
    """What a stage needs of a step to learn, from which the planner chooses patch and batch together.

    Extents are edges of a cube in mm (a square in 2D); the planner gives a patch of the same volume the aspect of the data.

    Attributes:
        useful_batch: Smallest batch with which the stage learns.
        paper_batch: Batch of the paper.
        least_mm: Least extent in 2D and in 3D at which patches still show different anatomy.
        crop_mm: Extent of the paper's crops in 2D and in 3D.
        contrasts_patches: Whether the other patches of a batch are negatives, so that two patches of one place harm.
        source: Source of the paper's batch and crop, and the reason for the other two.
        equal_sides: Whether the patch has two sides of equal voxels, so that quarter turns in their plane keep the voxel grid.
    """

    useful_batch: int
    paper_batch: int
    least_mm: tuple[float, float]
    crop_mm: tuple[float, float]
    contrasts_patches: bool
    source: str
    equal_sides: bool = False


@dataclass(frozen=True)
class Stage:
    """One pretext stage of a method.

    Attributes:
        name: Name of the form ``method.stage``, which also names the schedule in the plan and the section in ``run.json``.
        trainer: Class in ``trainers.pretraining.pretext``, which also names the results folder, as in nnU-Net.
        implementation: Subclass of ``PretextMethod`` that implements the stage, as ``module:class``.
        encoder_graphs: Number of encoder passes per patch that keep a graph, from which the planner derives the batch size.
        encoder_passes: Number of encoder passes per patch without a graph.
        decoder_graphs: Number of decoder passes per patch that keep a graph.
        needs: Batch and extent of the patches that the stage needs to learn.
        batch_multiple: Number of which the batch size of every process must be a multiple.
        reads_tokens: Whether the stage needs the plan's token grid; a transformer encoder receives only the visible tokens.
        token_values: Number of feature values that each token of a patch keeps in memory, in addition to the encoder and the
            token decoder.
        piece_values: Number of float32 values that the loss keeps for each patch of a piece, whatever its size.
        batch_values: Number of float32 values that the loss keeps for each patch of the whole batch.
        points: ``contrast`` if every point is compared with every other, ``correlation`` if only dimensions are correlated;
            None if the stage compares no points.
        configuration: Configuration in which the stage always runs; None for the configuration of the method's other stages.
        fresh: Whether the stage starts from random weights instead of the weights of the stage before it.
        examination: Function that measures what a finished stage is good for, as ``module:function``; None if there is none.
        least_steps: Smallest number of steps of a stage whose length is planned in steps, whatever the number of patches; None
            for a stage that is planned in passes over the patches.
    """

    name: str
    trainer: str
    implementation: str
    encoder_graphs: int
    encoder_passes: int
    decoder_graphs: int
    needs: Needs
    batch_multiple: int = 1
    reads_tokens: bool = False
    token_values: int = 0
    piece_values: int = 0
    batch_values: int = 0
    points: Literal["contrast", "correlation"] | None = None
    configuration: str | None = None
    fresh: bool = False
    examination: str | None = None
    least_steps: int | None = None

    def runs_in(self, configuration: str) -> str:
        """Return the configuration in which the stage runs if its method is run in ``configuration``."""
        return self.configuration or configuration

    def load(self) -> Any:
        """Import and return the class that implements the stage."""
        return _find(self.implementation)

    def load_examination(self) -> Any:
        """Import and return the function that examines the finished stage; None if there is none."""
        return self.examination and _find(self.examination)


def _find(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """A pretext method: its stages in order, and the configurations that have the backbone that it needs.

    Attributes:
        name: Name of the method, as in ``nnssl_pretrain -m``.
        title: Description of one line, for lists.
        source: Citation of the paper.
        backbone: Description of the required backbone.
        configurations: Names of the plan's configurations that have the required backbone, the default first.
        stages: Stages in the order in which they run. Each starts from the weights of the stage before it, unless it is
            ``fresh``.
    """

    name: str
    title: str
    source: str
    backbone: str
    configurations: tuple[str, ...]
    stages: tuple[Stage, ...]


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
