"""The index of pretext methods. Nothing heavy is imported here: the commands list the methods before torch is needed."""

import importlib
from dataclasses import dataclass
from typing import Any

from nnssl.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One pretext stage of a method.

    Attributes:
        name: ``method.stage``; names the schedule in the plan and the section in ``run.json``.
        trainer: class in ``trainers.pretraining.pretext``; names the results folder, as nnU-Net users expect.
        implementation: ``module:class`` of the method protocol's implementation.
        encoder_graphs: passes through the encoder per patch that keep a graph, for the planner's batch size.
        encoder_passes: passes through the encoder per patch without a graph.
        decoder_graphs: passes through the decoder per patch that keep a graph.
        useful_batch: batch size below which the planner warns; 1 where the batch does not matter.
        batch_multiple: the batch of every process is a multiple of this.
        reads_tokens: whether it needs a grid of tokens from the plan, of which an encoder that is a transformer sees the visible
            ones only.
        token_values: feature values for each token of a patch that stay in memory beside encoder and token decoder.
        configuration: where it runs, whatever the method's other stages run in; None for where they do.
        fresh: whether it starts from random weights, not from those of the stage before, which serves it in another way.
        examination: ``module:function`` that measures what a finished stage is good for; None for no such
            thing.
    """

    name: str
    trainer: str
    implementation: str
    encoder_graphs: int
    encoder_passes: int
    decoder_graphs: int
    useful_batch: int
    batch_multiple: int = 1
    reads_tokens: bool = False
    token_values: int = 0
    configuration: str | None = None
    fresh: bool = False
    examination: str | None = None

    def runs_in(self, configuration: str) -> str:
        """Return the configuration that the stage runs in when its method is asked to run in one."""
        return self.configuration or configuration

    def load(self) -> Any:
        """Import and return the class that implements the stage."""
        return _find(self.implementation)

    def load_examination(self) -> Any:
        """Import and return the function that examines the finished stage; None without one."""
        return self.examination and _find(self.examination)


def _find(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """A pretext method: its stages in order, and the configurations that have the backbone it needs.

    Attributes:
        name: as in ``nnssl_pretrain -m``.
        title: one line for lists.
        source: the paper.
        backbone: what it needs, in words.
        configurations: names of the plan's configurations that have it, the default first.
        stages: run in this order; each starts from the weights of the one before, unless it is ``fresh``.
    """

    name: str
    title: str
    source: str
    backbone: str
    configurations: tuple[str, ...]
    stages: tuple[Stage, ...]


SAM = "sam.embedding"
"""The stage whose embeddings say which places of different scans are the same."""
SAM_STAGE = Stage(
    name=SAM,
    trainer="SAMTrainer",
    implementation="nnssl.methods.sam:SAM",
    encoder_graphs=2,
    encoder_passes=0,
    decoder_graphs=1,
    useful_batch=2,
    configuration="3d_fullres",
    examination="nnssl.matching.anatomical_sanity:examine",
)

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
                useful_batch=8,
            ),
            Stage(
                name="reprec.generative",
                trainer="RepRecGenerativeTrainer",
                implementation="nnssl.methods.reprec:RepRecGenerative",
                encoder_graphs=0,
                encoder_passes=1,
                decoder_graphs=0,
                useful_batch=1,
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
                useful_batch=2,
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
                useful_batch=2,
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
                useful_batch=8,
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
        title="Alice: masked modelling, and the same anatomy in different patients",
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
                useful_batch=4,
                batch_multiple=2,
                reads_tokens=True,
                token_values=20_000,  # projection and CASA in float32, of student and teacher
                fresh=True,
            ),
        ),
    ),
    "simclr": Method(
        name="simclr",
        title="SimCLR: contrast of two views of a patch with all other patches of the batch, the baseline",
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
                useful_batch=8,
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
                useful_batch=8,
            ),
        ),
    ),
}


def find_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        UserError: there is no such method; names those there are.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; nnssl has {', '.join(sorted(METHODS))}")
    return METHODS[name]


def find_stage(name: str) -> tuple[Method, Stage]:
    """Return a stage and the method that it belongs to by the stage's name, ``method.stage``.

    Raises:
        UserError: there is no such stage.
    """
    for method in METHODS.values():
        for stage in method.stages:
            if stage.name == name:
                return method, stage
    raise UserError(f"there is no pretext stage {name!r}")
