"""The whole workflow on generated phantoms, from images to a report on what the pretrained weights are worth."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import time

import torch

from nnssl.data.phantoms import describe_phantoms, write_phantom_dataset
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json
from nnssl.log import logger
from nnssl.methods import find_method
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.study.table import SCRATCH, StudyTable
from nnssl.study.words import count
from nnssl.tables import align, points, signed_points
from planners.plan_and_preprocess import plan_and_preprocess
from planners.settings import PlanSettings
from trainers.benchmark.benchmark import open_study
from trainers.benchmark.run import Part, run_study, study_folder
from trainers.benchmark.settings import StudySettings, check_settings
from trainers.finetuning.schedule import Recipe
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

UNLABELLED, LABELLED = "Dataset901_HeartsUnlabelled", "Dataset902_HeartsLabelled"
SHAPE, SPACING_MM = (10, 48, 48), (8.0, 4.0, 4.0)
CONFIGURATIONS = ("2d", "2d_hybrid", "3d_fullres")
"""Configurations that a method is pretrained with, the first that it supports."""
BATCH_SIZE = 8
"""Patches per step of every stage of pretraining."""
FINETUNING_BATCH_SIZE = 4


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a demo.

    Attributes:
        method: Pretext method.
        unlabelled: Number of phantoms without labels, to pretrain on.
        labels: Number of labelled phantoms to train on.
        draws: How many times they are drawn, from ``labels * draws`` phantoms. Both arms are trained on each draw, with other
            random weights and batches, because the Dice of single draws differs by up to 30 points.
        held_out: Number of labelled phantoms to test on.
        pretrain_epochs: Epochs of every stage of pretraining, whose steps are epochs times iterations.
        pretrain_iterations: Optimizer steps per epoch of pretraining.
        epochs: Lengths of fine-tuning in epochs.
        iterations_per_epoch: Optimizer steps per epoch of fine-tuning.
        recipe: Recipe of the pretrained arm's fine-tuning; None for the default.
        seed: Random seed for phantoms and pretraining; the seeds of fine-tuning are those of the draws, 0, 1, ...
    """

    method: str = "pix2rep_v2"
    unlabelled: int = 24
    labels: int = 6
    draws: int = 5
    held_out: int = 10
    pretrain_epochs: int = 10
    pretrain_iterations: int = 150
    epochs: tuple[int, ...] = (3,)
    iterations_per_epoch: int = 30
    recipe: Recipe | None = None
    seed: int = 0


def run_demo(folder: Path, settings: DemoSettings, device: torch.device, command: str) -> Path:
    """Make phantoms, plan, preprocess, pretrain, fine-tune with and without the weights, and write a report.

    Steps that an earlier demo with the same settings has finished in the folder are skipped.

    Args:
        folder: Folder for all files, including nnU-Net's folders.
        settings: Method, size of data sets and lengths of runs.
        device: Device to train on.
        command: Command that repeats the demo, printed in the report.

    Returns:
        The pretrained weights; the report is ``report.html`` in the folder.

    Raises:
        UserError: If a setting is wrong, if the folder cannot be written to, or if it contains another demo.
    """
    started = time()
    configuration = next(name for name in CONFIGURATIONS if name in find_method(settings.method).configurations)
    root = folder.absolute()
    check_settings(_study(root, None, settings))
    make_writable(root)
    with variables(**{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}):
        folders = resolve_folders()
        _make_phantoms(folders, settings)
        logger.info("2/4 Computing the fingerprint, planning and preprocessing")
        plan_and_preprocess(
            UNLABELLED, PlanSettings(configurations=[configuration], preset="cpu", methods=[settings.method]), folders
        )
        steps = settings.pretrain_epochs * settings.pretrain_iterations
        logger.info(
            f"3/4 Pretraining with {settings.method} on {count(settings.unlabelled, 'phantom')} without labels, {steps:,} steps"
        )
        weights = _pretrain(folders, settings, configuration, device)
        logger.info(
            f"4/4 Fine-tuning on {count(settings.labels, 'labelled phantom')}, pretrained and from scratch, "
            f"{count(settings.draws, 'time')}"
        )
        table = _compare(root, folders, weights, settings, device, command)
    report = root / "report.html"
    shutil.copyfile(folders.results / LABELLED / f"nnssl_benchmark_{settings.method}" / "report.html", report)
    for line in dice_by_structure(table):
        logger.info(line)
    logger.info(f"{(time() - started) / 60:.1f} minutes. To see the segmentations side by side, open {report}")
    return weights


def _make_phantoms(folders: Folders, settings: DemoSettings) -> None:
    labelled = settings.labels * settings.draws + settings.held_out
    logger.info(
        f"1/4 Generating phantoms of the heart in {folders.raw}: {settings.unlabelled} without labels, {labelled} with labels"
    )
    for name, number, first in ((UNLABELLED, settings.unlabelled, 0), (LABELLED, labelled, settings.unlabelled)):
        description = folders.raw / name / "dataset.json"
        wanted = describe_phantoms("heart", settings.seed, first)
        if description.exists():
            present = read_json(description, "dataset.json")
            if (present["numTraining"], present["description"]) != (number, wanted):
                raise UserError(
                    f"{description.parent}: contains {present['numTraining']} phantoms of an earlier demo "
                    f"({present['description']}), but this one needs {number} ({wanted}); choose another folder"
                )
            continue
        write_phantom_dataset(
            folders.raw,
            name,
            number,
            settings.seed,
            SHAPE,
            SPACING_MM,
            labelled=name == LABELLED,
            first_case=first,
            anatomy="heart",
        )


def _pretrain(folders: Folders, settings: DemoSettings, configuration: str, device: torch.device) -> Path:
    chosen = PretrainSettings(
        configuration=configuration,
        epochs=settings.pretrain_epochs,
        iterations_per_epoch=settings.pretrain_iterations,
        overrides=(f"batch_size={BATCH_SIZE}",),
        seed=settings.seed,
        device=device,
    )
    try:
        return pretrain(settings.method, UNLABELLED, chosen, folders)
    except ArgumentError as error:
        if "restart" not in error.arguments:
            raise
        reason = str(error).partition("; use restart")[0]
        raise UserError(f"{folders.results.parent}: contains another demo ({reason}); choose another folder") from error


def _compare(
    root: Path, folders: Folders, weights: Path, settings: DemoSettings, device: torch.device, command: str
) -> StudyTable:
    """Fine-tune from the weights and from scratch, and write the report."""
    study = _study(root, weights, settings)
    first = settings.unlabelled + settings.labels * settings.draws
    assert study.test_cases is not None
    study.test_cases.write_text("".join(f"phantom_{first + number:04d}\n" for number in range(settings.held_out)))
    notes = [
        "The phantoms are generated, and the fine-tuning is short on purpose: it shows a head start, for which no gain is "
        "claimed below. nnssl_benchmark measures the gain on your own images."
    ]
    opened = open_study(study, device, None, folders)
    table = run_study(opened, study_folder(opened, settings.method), Part(), command, notes=notes)
    assert table is not None
    return table


def _study(root: Path, weights: Path | None, settings: DemoSettings) -> StudySettings:
    """Return the settings of the comparison; None for weights that do not exist yet, to check the settings."""
    return StudySettings(
        dataset=LABELLED,
        arms=(settings.method if weights is None else f"{settings.method}={weights}",),
        labels=(settings.labels,),
        epochs=settings.epochs,
        seeds=settings.draws,
        iterations_per_epoch=settings.iterations_per_epoch,
        batch_size=FINETUNING_BATCH_SIZE,
        optimizer="adam",  # With SGD, scratch needs about a thousand steps (documentation/results/demo.md).
        recipe=settings.recipe,
        scratch_recipe="nnunet",  # Better for scratch here than a warm-up (documentation/results/demo.md).
        test_cases=root / "held_out.txt",
        mirroring=False,
    )


def dice_by_structure(table: StudyTable) -> list[str]:
    """Return the Dice of every structure, from scratch and pretrained, as the lines of one table for each length."""
    lines = []
    for steps in sorted({row.steps for row in table.rows}):
        scratch, pretrained = (
            next(row for row in table.rows if row.steps == steps and (row.arm == SCRATCH) == is_scratch)
            for is_scratch in (True, False)
        )
        rows = [[f"Dice (points) after {steps} steps", scratch.arm, pretrained.arm, "gain"]]
        for name in scratch.class_dice:
            rows.append(_line(name, scratch.class_dice[name], pretrained.class_dice[name]))
        lines += [*align([*rows, _line("mean", scratch.dice.mean, pretrained.dice.mean)]), ""]
    ahead = pretrained.dice.mean > scratch.dice.mean
    return [
        *lines,
        f"Each number is the mean of {count(len(scratch.seeds), 'network')}, trained on "
        f"{count(scratch.labels, 'labelled phantom')} each, on {count(table.num_test_cases, 'held-out phantom')}."
        + (" A lead after a short fine-tuning may vanish in a longer one." if ahead else ""),
    ]


def _line(name: str, scratch: float | None, pretrained: float | None) -> list[str]:
    gain = None if scratch is None or pretrained is None else pretrained - scratch
    return [name, points(scratch), points(pretrained), signed_points(gain)]
