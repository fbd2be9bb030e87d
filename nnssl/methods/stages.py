"""Description of a pretext method and its stages, from which commands, planner and trainer take what they need to know.

This module must not import heavy packages, because the commands list the methods before they need torch.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal


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
        masks_tokens: Whether a transformer encoder receives only the visible tokens although a U-Net needs no token grid.
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
    masks_tokens: bool = False
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
