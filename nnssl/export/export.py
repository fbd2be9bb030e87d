"""A checkpoint made into what somebody else loads: read, fitted to a network, written and tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nnssl.errors import UserError
from nnssl.export.fit import check_policy, fit_weights
from nnssl.export.fit_report import LEAST_SHARE, FitReport, refuse_below
from nnssl.export.formats import check_output, table_of, write_encoder, write_for_hub, write_for_nnunet
from nnssl.export.kernels import ChannelPolicy
from nnssl.export.source import SourceWeights, choose_configuration, open_source
from nnssl.export.target import TargetNetwork, build_target, open_target
from nnssl.log import logger
from nnssl.paths import Folders

Format = Literal["nnunet", "hub", "encoder"]
FORMATS: tuple[Format, ...] = get_args(Format)

ADVICE = ", or lower --least-share (0 lets everything through)"


@dataclass(frozen=True)
class Exported:
    """What an export left.

    Attributes:
        path: the file, or the folder.
        target: the network that the weights were made for.
        report: what became of every tensor.
    """

    path: Path
    target: TargetNetwork
    report: FitReport


def export(
    checkpoint: Path,
    folders: Folders,
    *,
    for_plans: str | None = None,
    plans_name: str | None = None,
    configuration: str | None = None,
    channels: Sequence[str] | None = None,
    policy: ChannelPolicy | None = None,
    trainer: str | None = None,
    form: Format = "nnunet",
    out: Path | None = None,
    least_share: float = LEAST_SHARE,
    licence: str = "unknown",
    results: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Exported:
    """Make pretrained weights fit a network and write them in a form that others load.

    Args:
        checkpoint: of nnssl, or of others in the adaptation-plan format.
        folders: nnU-Net's folders.
        for_plans: a plans file, or a data set whose plans are meant; None for the plan that the weights were pretrained with.
        plans_name: which plans of that data set.
        configuration: of the plans; None for the one that the weights were pretrained with, if the plans have it.
        channels: names of the target's channels, or one number; None for those of its ``dataset.json``.
        policy: for other channels than the source's (``fit_input_channels``); None to choose.
        trainer: one of nnU-Net's trainers with a network of its own, such as ``nnUNet_Primus_S_Trainer``.
        form: ``nnunet``, one file for ``-pretrained_weights``; ``hub``, a folder to upload; ``encoder``, the encoder alone.
        out: file or folder to write; None for one in the working folder.
        least_share: of the target encoder's parameters that have to come from the checkpoint.
        licence: of the weights, for hub and encoder.
        results: of fine-tuning, for the hub's card.
        seed: of what stays random.

    Raises:
        UserError: the file cannot be read, the target cannot be built, too little fits, or nothing can be written.
    """
    if not 0 <= least_share <= 1:
        raise UserError(f"--least-share {least_share}: is a share, 0 to 1")
    if form not in FORMATS:
        raise UserError(f"--format {form}: is not known; take {', '.join(FORMATS)}")
    if trainer is not None and form != "nnunet":
        raise UserError(f"--format {form}: describes the network of a plan, so --trainer has no place with it")
    check_policy(policy)
    source = open_source(checkpoint)
    logger.info(f"Weights: {checkpoint} ({source.label}), channels {_channel_text(source)}")
    target = _open(source, folders, for_plans, plans_name, configuration, channels, trainer, seed)
    names = f" ({', '.join(target.channel_names)})" if target.channel_names else ""
    logger.info(f"Target: {target.label}, {target.num_channels} channel(s){names}")
    path = (out or _default_output(target, form)).expanduser().absolute()
    if form == "nnunet":
        check_output(path, source)
    report = fit_weights(source, target, policy)
    refuse_below(report, least_share, str(checkpoint), ADVICE)
    remark = ""
    if form == "nnunet":
        remark = write_for_nnunet(path, source, target, report)
        logger.info(f"Written and read back by nnU-Net's own loader: {path} (table: {table_of(path).name})")
    elif form == "hub":
        remark = write_for_hub(path, source, target, report, licence, results)
        logger.info(f"Written, and its checkpoint read back by nnU-Net's own loader: {path}")
    else:
        count = write_encoder(path, source, target, report, licence)
        logger.info(f"Written: {path}, {count:,} parameters; python {path / 'load_encoder.py'} loads them")
    if remark:
        logger.info(f"Adaptation plan: {remark}")
    return Exported(path, target, report)


def own_target(source: SourceWeights, seed: int = 0, configuration: str | None = None) -> TargetNetwork:
    """Return the network that weights of nnssl were pretrained in.

    Raises:
        UserError: the weights were made elsewhere, without a plan; or the plan has no such configuration.
    """
    origin = source.provenance
    if origin is None:
        raise UserError(f"{source.path}: was made elsewhere and has no plans of nnU-Net; name some with --for-plans")
    chosen = choose_configuration(configuration, source.path, origin)
    label = f"{chosen} of {origin.plans_name}, the plan of the weights themselves"
    return build_target(origin.plans, chosen, origin.dataset_json, label, seed=seed)


def _open(
    source: SourceWeights,
    folders: Folders,
    for_plans: str | None,
    plans_name: str | None,
    configuration: str | None,
    channels: Sequence[str] | None,
    trainer: str | None,
    seed: int,
) -> TargetNetwork:
    if for_plans is None:
        given = {"-p": plans_name, "--channels": channels, "--trainer": trainer}
        wrong = next((flag for flag, value in given.items() if value is not None), None)
        if wrong:
            raise UserError(f"{wrong}: needs --for-plans, which says whose plans are meant")
        return own_target(source, seed, configuration)
    usual = source.provenance.configuration if source.provenance else "3d_fullres"
    return open_target(
        for_plans,
        folders,
        plans_name=plans_name,
        configuration=configuration,
        usual_configuration=usual,
        channels=channels,
        trainer=trainer,
        seed=seed,
    )


def _default_output(target: TargetNetwork, form: Format) -> Path:
    parts = (target.plans["dataset_name"], target.plans["plans_name"], target.configuration, target.trainer)
    name = "_".join(part for part in parts if part)
    return Path(f"for_{name}.pth" if form == "nnunet" else f"{form}_{name}")


def _channel_text(source: SourceWeights) -> str:
    return ", ".join(source.channel_names) if source.channel_names else str(source.num_channels)
