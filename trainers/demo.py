"""The main job on generated phantoms, from images to a Dice for scratch and for pretrained, with a report."""

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
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

UNLABELLED, LABELLED = "Dataset901_PhantomsUnlabelled", "Dataset902_PhantomsLabelled"
SHAPE, SPACING_MM = (32, 48, 40), (2.5, 1.5, 1.7)
CONFIGURATION = "3d_fullres_hybrid"
BATCH_SIZE = 8


@dataclass(frozen=True)
class DemoSize:
    """How much a demo does.

    Attributes:
        unlabelled: phantoms without labels, to pretrain on.
        labels: labelled phantoms to train on.
        held_out: labelled phantoms to test on.
        epochs: of the contrastive stage, the generative stage and fine-tuning.
        iterations_per_epoch: steps of an epoch, in all three.
    """

    unlabelled: int = 16
    labels: int = 3
    held_out: int = 6
    epochs: tuple[int, int, int] = (4, 8, 5)
    iterations_per_epoch: int = 15


def run_demo(folder: Path, size: DemoSize, seed: int, device: torch.device) -> Path:
    """Make phantoms, plan, preprocess, pretrain with RepRec, fine-tune with and without the weights, and write a report.

    What a demo of this size has done before in the folder is recognised and skipped.

    Args:
        folder: for everything that is written, nnU-Net's folders among it.
        size: of the data sets and runs.
        seed: of phantoms, weights and views.
        device: where to train.

    Returns:
        The pretrained weights; the report is ``report.md`` in the folder.

    Raises:
        UserError: the folder cannot be written to, or holds a demo of another size.
    """
    started = time()
    root = make_writable(folder.absolute())
    with variables(**{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}):
        folders = resolve_folders()
        _make_phantoms(folders, size, seed)
        logger.info("2/5 fingerprint, plan and preprocessing")
        prepared = plan_and_preprocess(UNLABELLED, PlanSettings(configurations=[CONFIGURATION], preset="cpu"), folders)
        logger.info("3/5 pretraining: RepRec, two stages")
        weights = _pretrain(folders, size, seed, device)
        logger.info(f"4/5 fine-tuning on {size.labels} labelled phantoms, pretrained and from scratch")
        results = _finetune(weights, size, seed, device)
        logger.info("5/5 report")
        report = root / "report.md"
        report.write_text("\n".join(_report(prepared.plan, weights, results, time() - started)) + "\n")
        for line in comparison(results):
            logger.info(line)
        logger.info(f"report: {report} ({(time() - started) / 60:.1f} minutes)")
    return weights


def _make_phantoms(folders: Folders, size: DemoSize, seed: int) -> None:
    labelled = size.labels + size.held_out
    logger.info(f"1/5 phantoms: {size.unlabelled} without labels, {labelled} with labels, in {folders.raw}")
    for name, count, first in ((UNLABELLED, size.unlabelled, 0), (LABELLED, labelled, size.unlabelled)):
        description = folders.raw / name / "dataset.json"
        if description.exists():
            present = read_json(description, "dataset.json")["numTraining"]
            if present != count:
                raise UserError(
                    f"{description.parent}: holds {present} phantoms of an earlier demo, {count} are wanted; take another "
                    "--folder"
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


def _finetune(weights: Path, size: DemoSize, seed: int, device: torch.device) -> list[ArmResult]:
    settings = FinetuneSettings(
        scratch=True,
        labels=size.labels,
        seed=seed,
        epochs=size.epochs[2],
        iterations_per_epoch=size.iterations_per_epoch,
        optimizer="adam",  # nnU-Net's SGD predicts no foreground yet after so few steps
        learning_rate=0.003,
        device=device,
    )
    return finetune(LABELLED, weights, settings)


def _report(plan: Plan, weights: Path, results: Sequence[ArmResult], seconds: float) -> list[str]:
    """Return the lines of a report in Markdown: the Dice, where each file is, and the plan with its reasons."""
    folder = weights.parent
    return [
        "# nnssl demo",
        "",
        f"RepRec on {plan.pretext.num_cases} phantoms without labels, fine-tuned on "
        f"{len(results[0].train_cases)} with labels, in {seconds / 60:.1f} minutes. The runs are far too short to show what "
        "pretraining is worth; they show that every step works.",
        "",
        "```",
        *comparison(results),
        "```",
        "",
        "| what | where |",
        "|---|---|",
        f"| pretrained weights, for `nnUNetv2_train -pretrained_weights` | {weights} |",
        f"| settings of the run with their origin | {folder / 'run.json'} |",
        f"| metrics per epoch, figure | {folder / 'metrics.csv'}, {folder / 'progress.png'} |",
        *(f"| fine-tuned model: {result.arm} | {result.model_folder} |" for result in results),
        "",
        "Predict with stock nnU-Net:",
        "",
        "```",
        *(result.predict_command for result in results),
        "```",
        "",
        "## Plan",
        "",
        "| configuration | what | value | reason |",
        "|---|---|---|---|",
        *(f"| {d.configuration} | {d.what} | {d.value} | {d.reason} |" for d in plan.pretext.decisions),
    ]
