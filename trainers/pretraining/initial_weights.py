"""The weights that a pretext stage starts from: those of the stage before it, or others that the user names."""

from pathlib import Path
from typing import Any

from torch import nn

from nnssl.checkpoint import FINAL, read_checkpoint
from nnssl.errors import UserError
from nnssl.methods import Method, find_stage
from trainers.finetuning.adapted_weights import start_network
from trainers.pretraining.stage_run import RunOptions, StageRun, stage_folder


def load_initial_weights(
    network: nn.Module, run: StageRun, options: RunOptions, results: Path, dataset_json: dict[str, Any]
) -> str | None:
    """Load the weights that a stage starts from into its network.

    Args:
        network: changed in place.
        run: that is about to start.
        options: of the run.
        results: nnU-Net's folder of results.
        dataset_json: of the data set.

    Returns:
        The checkpoint that they come from; None where the stage starts from random weights.

    Raises:
        UserError: the checkpoint is not there, or is of another network.
    """
    method = find_stage(run.stage.name)[0]
    source = options.init
    if source is None and not options.alone:
        source = _previous_stage(method, run, results)
    if source is None:
        return None
    if not source.exists():
        raise UserError(
            f"{source}: {run.stage.name} starts from these weights; run nnssl_pretrain -m {method.name}, or name other weights "
            "with --init"
        )
    if options.init is None:
        _take_over(network, source, run)
    else:
        # positions and channels may differ where all shapes agree, so these are always fitted
        start_network(source, network, run.plan.nnunet, run.configuration, dataset_json)
    return str(source)


def _previous_stage(method: Method, run: StageRun, results: Path) -> Path | None:
    """Return where the stage before leaves its weights; None for a first stage, and for one that takes none over."""
    index = method.stages.index(run.stage)
    if index == 0 or run.stage.fresh:
        return None
    return stage_folder(results, run.plan, method.stages[index - 1], run.configuration) / FINAL


def _take_over(network: nn.Module, source: Path, run: StageRun) -> None:
    """Load the weights of the stage before, all but the segmentation layers."""
    found: dict[str, Any] = read_checkpoint(source)[0]["network_weights"]
    wanted = {name: value for name, value in network.state_dict().items() if ".seg_layers." not in name}
    if not all(name in found and found[name].shape == value.shape for name, value in wanted.items()):
        raise UserError(
            f"{source}: does not fit {run.configuration} of {run.plan.dataset_name}; --restart pretrains the stage before "
            "again"
        )
    # what is missing are the segmentation layers, as chosen above
    network.load_state_dict({name: found[name] for name in wanted}, strict=False)
