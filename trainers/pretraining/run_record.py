"""The description of a run: in its folder, at the start of its log, and as the provenance of its weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnssl.checkpoint import Provenance, to_plain
from nnssl.distributed import world_size
from nnssl.files import write_json
from nnssl.methods import find_stage
from nnssl.methods.settings import describe_settings
from nnssl.sizes import in_voxels
from nnssl.version import __version__
from trainers.precision import Precision
from trainers.pretraining.stage_run import StageRun, plain_settings


def write_model_folder(folder: Path, plans: dict[str, Any], dataset_json: dict[str, Any], preprocessed: Path) -> None:
    """Write the files that nnU-Net expects in the folder of a trained model, above the fold.

    Args:
        folder: Folder to write to.
        plans: Content of the plans file.
        dataset_json: Content of ``dataset.json``.
        preprocessed: Preprocessed data set, from which the fingerprint is copied if there is one.
    """
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", dataset_json)
    fingerprint = preprocessed / "dataset_fingerprint.json"
    if fingerprint.exists():
        shutil.copyfile(fingerprint, folder / fingerprint.name)


def describe_run(
    run: StageRun,
    init: str | None,
    device: torch.device,
    precision: Precision,
    chosen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of ``run.json``: everything that determines the run, with the origin of every setting.

    Args:
        run: The run that is about to start.
        init: Checkpoint that it starts from; None for random weights.
        device: Device that it runs on.
        precision: Precision of forward passes.
        chosen: How the method was chosen; None if the user named it.
    """
    return to_plain(
        {
            "nnssl_version": __version__,
            "stage": run.stage.name,
            "dataset": run.plan.dataset_name,
            "plan": run.plan.name,
            "configuration": run.configuration,
            "seed": run.seed,
            "init": init,
            "device": str(device),
            "precision": precision.name,
            "processes": world_size(),
            "chosen": chosen,
            "settings": describe_settings(run.settings, run.origins),
        }
    )


def opening_lines(
    run: StageRun, method: nn.Module, step: int, device: torch.device, precision: Precision
) -> tuple[list[str], list[str]]:
    """Return the first lines of a log, and one line per setting that belongs in the log file only.

    Args:
        run: The run that is about to start.
        method: Module of the stage.
        step: Step that the run resumes from; 0 for a new run.
        device: Device that it runs on.
        precision: Precision of forward passes.
    """
    training = run.settings.training
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    lines = [
        f"Pretext stage {run.stage.name} on {run.plan.dataset_name}, {run.configuration}",
        f"{training.epochs} epochs of {training.iterations_per_epoch} steps, batch {training.batch_size} of "
        f"{in_voxels(training.patch_size)} voxels, "
        f"{trained / 1e6:.2f} M trained parameters, {precision.name} on {device}",
    ]
    if step:
        lines.append(f"Resuming at step {step} of {training.total_steps}")
    described = describe_settings(run.settings, run.origins)
    return lines, [f"  {key} = {entry['value']} ({entry['origin']})" for key, entry in described.items()]


def provenance_of(
    run: StageRun,
    dataset_json: dict[str, Any],
    init: str | None,
    step: int,
    pretrained: tuple[str, ...],
    cases: tuple[str, ...],
    contents: dict[str, str],
) -> Provenance:
    """Return the provenance of a run's weights.

    Args:
        run: The run that made them.
        dataset_json: Content of the data set's ``dataset.json``.
        init: Checkpoint that the run started from; None for random weights.
        step: Optimizer steps so far.
        pretrained: Prefixes of the parameters that the stage pretrains.
        cases: Names of the cases that the run was shown.
        contents: Digests of the images and masks that these were preprocessed from.
    """
    total = run.settings.training.total_steps
    return Provenance(
        nnssl_version=__version__,
        method=find_stage(run.stage.name)[0].name,
        stage=run.stage.name,
        dataset_name=run.plan.dataset_name,
        plans_name=run.plan.name,
        configuration=run.configuration,
        plans=run.plan.nnunet,
        dataset_json=dataset_json,
        settings=plain_settings(run.settings),
        seed=run.seed,
        step=step,
        total_steps=total,
        finished=step == total,
        pretrained=pretrained,
        init=init,
        cases=cases,
        case_contents=contents,
    )
