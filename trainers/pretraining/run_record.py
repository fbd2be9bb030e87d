"""What a run says of itself: in ``run.json``, at the head of its log, and as the provenance of its weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nnssl
from nnssl.checkpoint import Provenance, to_plain
from nnssl.distributed import world_size
from nnssl.files import write_json
from nnssl.methods import find_stage
from nnssl.methods.settings import describe_settings
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


def describe_run(run: StageRun, init: str | None, device: torch.device, precision: Precision) -> dict[str, Any]:
    """Return what ``run.json`` holds: everything that decides the run, with the origin of every setting.

    Args:
        run: that is about to start.
        init: checkpoint that it starts from, None for random weights.
        device: where it runs.
        precision: how forward passes are computed.
    """
    return to_plain(
        {
            "nnssl_version": nnssl.__version__,
            "stage": run.stage.name,
            "dataset": run.plan.dataset_name,
            "plan": run.plan.name,
            "configuration": run.configuration,
            "seed": run.seed,
            "init": init,
            "device": str(device),
            "precision": precision.name,
            "processes": world_size(),
            "settings": describe_settings(run.settings, run.origins),
        }
    )


def opening_lines(
    run: StageRun, method: nn.Module, step: int, device: torch.device, precision: Precision
) -> tuple[list[str], list[str]]:
    """Return the first lines of a log, and those that are for the log file alone: one for each setting.

    Args:
        run: that is about to start.
        method: the stage's.
        step: from which it goes on, 0 for a new run.
        device: where it runs.
        precision: how forward passes are computed.
    """
    training = run.settings.training
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    lines = [
        f"Pretext stage {run.stage.name} on {run.plan.dataset_name}, {run.configuration}",
        f"{training.epochs} epochs of {training.iterations_per_epoch} steps, batch {training.batch_size}, "
        f"{trained / 1e6:.2f} M trained parameters, {precision.name} on {device}",
    ]
    if step:
        lines.append(f"Going on at step {step} of {training.total_steps}")
    described = describe_settings(run.settings, run.origins)
    return lines, [f"  {key} = {entry['value']} ({entry['origin']})" for key, entry in described.items()]


def provenance_of(
    run: StageRun,
    dataset_json: dict[str, Any],
    init: str | None,
    step: int,
    pretrained: tuple[str, ...],
    cases: tuple[str, ...],
) -> Provenance:
    """Return where the weights of a run come from.

    Args:
        run: that made them.
        dataset_json: of the data set.
        init: checkpoint that it started from, None for random weights.
        step: optimizer steps so far.
        pretrained: prefixes of the parameters that the stage pretrains.
        cases: that it was shown.
    """
    total = run.settings.training.total_steps
    return Provenance(
        nnssl_version=nnssl.__version__,
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
    )
