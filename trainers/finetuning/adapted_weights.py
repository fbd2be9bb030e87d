"""Weights made elsewhere or trained with other channels, adapted to a labelled data set or to a network before pretraining."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from nnssl.data.dataset_json import read_labelled_json
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.log import logger
from nnssl.paths import Folders
from nnssl.weights.fit import fit_weights
from nnssl.weights.fit_report import LEAST_SHARE, refuse_below
from nnssl.weights.formats import write_for_nnunet
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.target import build_target
from planners.foreign_planner import CONFIGURATION, plan_for_network
from trainers.finetuning.labelled_data import make_fingerprint


def adapt_if_made_elsewhere(
    source: OpenedCheckpoint, dataset_name: str, folders: Folders, processes: int
) -> OpenedCheckpoint:
    """Plan a labelled data set around weights that were made elsewhere, and write them for that plan.

    Weights of nnU-Net's training have a plan of their own and are used as they are, unless the data set has another number of
    channels; then they are treated alike.

    The plan and the weights are written to the data set's preprocessed folder; a second call reuses them.

    Args:
        source: A checkpoint; one of nnssl is returned as it is.
        dataset_name: Name of the labelled data set.
        folders: nnU-Net's folders.
        processes: Number of worker processes for the fingerprint.

    Returns:
        A checkpoint whose plan is for as many channels as the data set has.

    Raises:
        UserError: If the file cannot be read, the data set cannot be planned, or too few weights fit.
    """
    if not source.made_elsewhere and not source.by_nnunet:
        return source
    path = source.path
    raw = folders.raw / dataset_name / "dataset.json"
    dataset_json = read_labelled_json(raw)
    if source.by_nnunet and len(dataset_json["channel_names"]) == source.num_channels:
        return source
    source.check_tensors()
    name = f"nnsslPlansOf{re.sub(r'[^A-Za-z0-9]+', '', path.stem)[:24]}{source.digest[:6]}"
    folder = folders.preprocessed / dataset_name
    plans_file, out = folder / f"{name}.json", folder / f"{name}_weights.pth"
    why = f"for {source.num_channels} channel(s)" if source.by_nnunet else "made elsewhere"
    logger.info(f"{path}: {why}; {dataset_name} is planned around its network")
    make_fingerprint(dataset_name, folders, processes)
    described = source.adaptation
    patch = (described.recommended_patch_vox if described else None) or source.patch_vox
    spacing_mm = source.pretraining["spacing_mm"]
    batch = {} if described else {"batch_size": source.batch_size}
    plan = plan_for_network(source.architecture, patch, spacing_mm, dataset_name, name, folders, **batch)
    if plans_file.exists() and read_json(plans_file, "plan") != plan:
        raise UserError(
            f"{plans_file}: is not the plan that these weights need now; delete it and the cases that were preprocessed with it"
        )
    if plans_file.exists() and out.exists():
        logger.info(f"Plan and weights exist already: {out}")
        return open_checkpoint(out)
    target = build_target(plan, CONFIGURATION, dataset_json, f"{CONFIGURATION} of {name}")
    report = fit_weights(source, target)
    refuse_below(report, LEAST_SHARE, str(path))
    write_for_nnunet(out, source, target, report)
    write_json(plans_file, plan)
    logger.info(
        f"Plan {name} for {dataset_name}: patch {plan['configurations'][CONFIGURATION]['patch_size']} ({plans_file})"
    )
    return open_checkpoint(out)


def start_network(
    path: Path, network: nn.Module, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> None:
    """Initialise a network before pretraining with the weights of a checkpoint that fit, and log which these are.

    Args:
        path: A checkpoint of nnssl or of nnU-Net's training, or one in the adaptation-plan format.
        network: The network; changed in place.
        plans: Content of the network's plans file.
        configuration: Name of the network's configuration.
        dataset_json: Content of ``dataset.json``, which names the channels.

    Raises:
        UserError: If the file cannot be read, or less than half of the encoder comes from it.
    """
    label = f"{configuration} of {plans['plans_name']}"
    target = build_target(plans, configuration, dataset_json, label, network=network)
    report = fit_weights(open_checkpoint(path), target)
    refuse_below(report, LEAST_SHARE, str(path))
