"""The weights that a pretext stage starts from: those of the previous stage, or a checkpoint that the user names."""

from pathlib import Path
from typing import Any

from torch import nn

from nnssl.checkpoint import FINAL, read_checkpoint
from nnssl.errors import ArgumentError
from nnssl.methods import Method, find_stage
from nnssl.networks.backbone import planned_configuration
from nnssl.networks.primus_positions import architecture_of_patch
from trainers.finetuning.adapted_weights import start_network
from trainers.pretraining.stage_run import RunOptions, StageRun, stage_folder


def load_initial_weights(
    network: nn.Module, run: StageRun, options: RunOptions, results: Path, dataset_json: dict[str, Any]
) -> str | None:
    """Load the weights that a stage starts from into its network.

    Args:
        network: Network of the plan, changed in place.
        run: The run that is about to start.
        options: Options of the run.
        results: nnU-Net's results folder.
        dataset_json: Content of the data set's ``dataset.json``.

    Returns:
        The checkpoint with the weights; None if the stage starts from random weights.

    Raises:
        UserError: If the checkpoint does not exist or belongs to another network.
    """
    method = find_stage(run.stage.name)[0]
    source = options.init
    if source is None and not options.alone:
        source = _previous_stage(method, run, results)
    if source is None:
        return None
    if not source.exists():
        raise ArgumentError(
            f"{source}: not found, but {run.stage.name} starts from these weights; run nnssl_pretrain -m {method.name}, or "
            "choose other weights with init",
            "init",
        )
    if options.init is None:
        _take_over(network, source, run)
    else:
        # Weights that the user names are always fitted: positions and channels may differ although all shapes agree.
        start_network(source, network, _plans_of_patch(run), run.configuration, dataset_json)
    return str(source)


def _previous_stage(method: Method, run: StageRun, results: Path) -> Path | None:
    """Return the checkpoint of the previous stage; None for a first stage and for one that takes over no weights."""
    index = method.stages.index(run.stage)
    if index == 0 or run.stage.fresh:
        return None
    return stage_folder(results, run.plan, method.stages[index - 1], run.configuration) / FINAL


def _plans_of_patch(run: StageRun) -> dict[str, Any]:
    """Return nnU-Net's part of the plan with the stage's patch, to which the positions of Primus belong."""
    plans, patch = run.plan.nnunet, run.own.patch_size
    planned = planned_configuration(plans, run.configuration)
    changed = {"patch_size": list(patch), "architecture": architecture_of_patch(planned["architecture"], patch)}
    configurations = plans["configurations"]
    own = {**configurations[run.configuration], **changed}
    return {**plans, "configurations": {**configurations, run.configuration: own}}


def _take_over(network: nn.Module, source: Path, run: StageRun) -> None:
    """Load the weights of the previous stage, except those of the segmentation layers."""
    found: dict[str, Any] = read_checkpoint(source)[0]["network_weights"]
    wanted = {name: value for name, value in network.state_dict().items() if ".seg_layers." not in name}
    if not all(name in found and found[name].shape == value.shape for name, value in wanted.items()):
        raise ArgumentError(
            f"{source}: the weights do not fit {run.configuration} of {run.plan.dataset_name}; use restart to pretrain the "
            "previous stage again",
            "restart",
        )
    # Only the segmentation layers are missing, as selected above.
    network.load_state_dict({name: found[name] for name in wanted}, strict=False)
