"""nnU-Net's own keys of a pretraining checkpoint: weights, optimizer, loss scaler and log."""

from typing import Any

import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from torch import Tensor

from nnssl.networks.backbone import planned_configuration
from nnssl.weights.adaptation_plan import KEY, write_adaptation_plan


def nnunet_state(
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    logger: MetaLogger,
    finished_epochs: int,
    configuration: str,
    plans: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the keys that stock nnU-Net expects in a checkpoint.

    Args:
        weights: State of the plan's network.
        optimizer: Optimizer of the stage.
        scaler: Loss scaler of float16; None for other formats.
        logger: nnU-Net's logger.
        finished_epochs: Number of complete epochs.
        configuration: Configuration of the plan that is pretrained.
        plans: Content of the plans file, if the weights are those that leave the pretraining; the state then has an adaptation
            plan too, which nnU-Net's newer commands and MIC-DKFZ's package read. None for other weights.
    """
    adaptation = {} if plans is None else {KEY: _adaptation_plan(plans, configuration)}
    return {
        "network_weights": weights,
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None if scaler is None else scaler.state_dict(),
        "logging": logger.get_checkpoint(),
        "_best_ema": None,
        "current_epoch": finished_epochs,
        "init_args": {"configuration": configuration, "fold": "all"},
        # Stock nnU-Net looks this name up when it predicts.
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
        **adaptation,
    }


def _adaptation_plan(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    planned = planned_configuration(plans, configuration)
    channels = len(planned["normalization_schemes"])
    architecture, patch = planned["architecture"], planned["patch_size"]
    return write_adaptation_plan(architecture, configuration, patch, planned["spacing"], channels, plans, planned)[0]


def restore_nnunet_state(
    content: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    logger: MetaLogger,
) -> None:
    """Restore optimizer, loss scaler and log in place; ``read_state`` restores the weights.

    Args:
        content: Content of a checkpoint.
        optimizer: Optimizer of the stage.
        scaler: Loss scaler of float16; None for other formats.
        logger: nnU-Net's logger.
    """
    optimizer.load_state_dict(content["optimizer_state"])
    if scaler is not None and content["grad_scaler_state"] is not None:
        scaler.load_state_dict(content["grad_scaler_state"])
    logger.load_checkpoint(content["logging"])
