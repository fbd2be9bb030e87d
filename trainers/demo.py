"""The whole workflow on generated phantoms, from images to a report on the Dice with and without pretraining."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

import torch

from nnssl.data.phantoms import write_phantom_dataset
from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.log import logger
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.plan import Plan
from planners.plan_and_preprocess import plan_and_preprocess
from planners.settings import PlanSettings
from trainers.finetuning.finetune import finetune
from trainers.finetuning.result import ArmResult, comparison
from trainers.finetuning.schedule import Recipe
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

UNLABELLED, LABELLED = "Dataset901_PhantomsUnlabelled", "Dataset902_PhantomsLabelled"
SHAPE, SPACING_MM = (32, 48, 40), (2.5, 1.5, 1.7)
CONFIGURATION = "3d_fullres_hybrid"
BATCH_SIZE = 8


@dataclass(frozen=True)
class DemoSize:
    """The size of a demo.

    Attributes:
        unlabelled: Number of phantoms without labels, to pretrain on.
        labels: Number of labelled phantoms to train on.
        held_out: Number of labelled phantoms to test on.
        epochs: Epochs of the contrastive stage, the generative stage and fine-tuning.
        iterations_per_epoch: Optimizer steps per epoch, in all three.
    """

    unlabelled: int = 16
    labels: int = 3
    held_out: int = 6
    epochs: tuple[int, int, int] = (4, 8, 5)
    iterations_per_epoch: int = 15


def run_demo(folder: Path, size: DemoSize, seed: int, device: torch.device, recipe: Recipe | None = None) -> Path:
    """Make phantoms, plan, preprocess, pretrain with RepRec, fine-tune with and without the weights, and write a report.

    Steps that an earlier demo of the same size has finished in the folder are skipped.

    Args:
        folder: Folder for all files, including nnU-Net's folders.
        size: Size of data sets and runs.
        seed: Random seed for phantoms, weights and views.
        device: Device to train on.
        recipe: Recipe of the pretrained arm's fine-tuning; None for the default.

    Returns:
        The pretrained weights; the report is ``report.md`` in the folder.

    Raises:
        UserError: If the folder cannot be written to, or if it contains a demo of another size.
    """
    started = time()
    root = make_writable(folder.absolute())
    with variables(**{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}):
        folders = resolve_folders()
        _make_phantoms(folders, size, seed)
        logger.info("2/5 Computing the fingerprint, planning and preprocessing")
        prepared = plan_and_preprocess(UNLABELLED, PlanSettings(configurations=[CONFIGURATION], preset="cpu"), folders)
        logger.info("3/5 Pretraining with RepRec in two stages")
        weights = _pretrain(folders, size, seed, device)
        logger.info(f"4/5 Fine-tuning on {size.labels} labelled phantoms, pretrained and from scratch")
        results = _finetune(weights, size, seed, device, recipe)
        logger.info("5/5 Writing the report")
        report = root / "report.md"
        report.write_text("\n".join(_report(prepared.plan, weights, results, time() - started)) + "\n")
        for line in comparison(results):
            logger.info(line)
        logger.info(f"Report: {report} ({(time() - started) / 60:.1f} minutes)")
    return weights


def _make_phantoms(folders: Folders, size: DemoSize, seed: int) -> None:
    labelled = size.labels + size.held_out
    logger.info(f"1/5 Generating phantoms in {folders.raw}: {size.unlabelled} without labels, {labelled} with labels")
    for name, count, first in ((UNLABELLED, size.unlabelled, 0), (LABELLED, labelled, size.unlabelled)):
        description = folders.raw / name / "dataset.json"
        if description.exists():
            present = read_json(description, "dataset.json")["numTraining"]
            if present != count:
                raise UserError(
                    f"{description.parent}: contains {present} phantoms of an earlier demo, but this one needs {count}; choose "
                    "another folder"
                )
            continue
        write_phantom_dataset(
            folders.raw, name, count, seed, SHAPE, SPACING_MM, labelled=name == LABELLED, first_case=first
        )


def _pretrain(folders: Folders, size: DemoSize, seed: int, device: torch.device) -> Path:
    contrastive, generative, _ = size.epochs
    settings = PretrainSettings(
        configuration=CONFIGURATION,
        epochs=(contrastive, generative),
        iterations_per_epoch=size.iterations_per_epoch,
        overrides=(f"batch_size={BATCH_SIZE}",),
        seed=seed,
        device=device,
    )
    return pretrain("reprec", UNLABELLED, settings, folders)


def _finetune(weights: Path, size: DemoSize, seed: int, device: torch.device, recipe: Recipe | None) -> list[ArmResult]:
    settings = FinetuneSettings(
        scratch=True,
        labels=size.labels,
        seed=seed,
        epochs=size.epochs[2],
        iterations_per_epoch=size.iterations_per_epoch,
        optimizer="adam",  # With nnU-Net's SGD the network predicts no foreground after so few steps.
        learning_rate=0.003,
        recipe=recipe,
        device=device,
    )
    return finetune(LABELLED, weights, settings)


def _report(plan: Plan, weights: Path, results: Sequence[ArmResult], seconds: float) -> list[str]:
    """Return the lines of a report in Markdown: the Dice, the files, and the plan with its reasons."""
    folder = weights.parent
    return [
        "# nnssl demo",
        "",
        f"RepRec was pretrained on {plan.pretext.num_cases} phantoms without labels and fine-tuned on "
        f"{len(results[0].train_cases)} phantoms with labels in {seconds / 60:.1f} minutes. The runs are far too short to show "
        "the benefit of pretraining; they show that every step works.",
        "",
        "```",
        *comparison(results),
        "```",
        "",
        "| Content | File or folder |",
        "|---|---|",
        f"| Pretrained weights, for `nnUNetv2_train -pretrained_weights` | {weights} |",
        f"| Settings of the pretraining with their origins | {folder / 'run.json'} |",
        f"| Metrics per epoch, as a table and as a figure | {folder / 'metrics.csv'}, {folder / 'progress.png'} |",
        *(f"| Fine-tuned model: {result.arm} | {result.model_folder} |" for result in results),
        "",
        "To predict with stock nnU-Net, run:",
        "",
        "```",
        *(result.predict_command for result in results),
        "```",
        "",
        "## Plan",
        "",
        "| Configuration | Decision | Value | Reason |",
        "|---|---|---|---|",
        *(f"| {d.configuration} | {d.what} | {d.value} | {d.reason} |" for d in plan.pretext.decisions),
    ]
