"""Export of a checkpoint: fitted to a network, written for other programs, and read back as a check."""

from dataclasses import dataclass, field
from pathlib import Path

from nnssl.errors import ArgumentError
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.weights.download import is_address, local_weights
from nnssl.weights.export_settings import FORMATS, ExportSettings, Format
from nnssl.weights.fit import check_policy, fit_weights
from nnssl.weights.fit_report import FitReport, refuse_below
from nnssl.weights.formats import check_output, table_of, write_encoder, write_for_hub, write_for_nnunet
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.target import TargetNetwork, build_target, open_target

ADVICE = ", or lower least_share (0 accepts everything)"


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: The file or folder written.
        target: The network that the weights were fitted to.
        report: How every tensor was transferred.
    """

    path: Path
    target: TargetNetwork = field(repr=False)
    report: FitReport = field(repr=False)


def export(checkpoint: Path | str, settings: ExportSettings | None = None, folders: Folders | None = None) -> Exported:
    """Fit pretrained weights to a network and write them in a form that others load.

    Args:
        checkpoint: A checkpoint of nnssl or of nnU-Net's training, or one made elsewhere in the adaptation-plan format; as a
            path, or as an address from which it is downloaded.
        settings: The target and the form; None for the network that the weights were pretrained in, for nnU-Net.
        folders: nnU-Net's folders; None for those of the environment.

    Raises:
        UserError: If the file cannot be read, the target cannot be built, too few weights fit, or nothing can be written.

    Examples:
        >>> exported = nnssl.export(weights, nnssl.ExportSettings(out=Path("weights_for_nnunet.pth")))
        >>> exported.path.name
        'weights_for_nnunet.pth'
    """
    settings = settings or ExportSettings()
    folders = folders or resolve_folders()
    _check_settings(settings)
    checkpoint = local_weights(checkpoint, folders) if is_address(checkpoint) else Path(checkpoint)
    form = settings.form
    source = open_checkpoint(checkpoint)
    source.check_tensors()
    logger.info(f"Weights: {checkpoint} ({source.label}), channels {_channel_text(source)}")
    target = _open_target(source, settings, folders)
    names = f" ({', '.join(target.channel_names)})" if target.channel_names else ""
    logger.info(f"Target: {target.label}, {target.num_channels} channel(s){names}")
    path = (settings.out or _default_output(target, form)).expanduser().absolute()
    if form == "nnunet":
        check_output(path, source)
    report = fit_weights(source, target, settings.policy)
    refuse_below(report, settings.least_share, str(checkpoint), ADVICE)
    make_writable(path.parent)
    with only_process(path, "exporting"):
        _write(path, source, target, report, settings)
    return Exported(path, target, report)


def _write(
    path: Path, source: OpenedCheckpoint, target: TargetNetwork, report: FitReport, settings: ExportSettings
) -> None:
    form, remark = settings.form, ""
    if form == "nnunet":
        remark = write_for_nnunet(path, source, target, report)
        logger.info(f"Written and read back by nnU-Net's own loader: {path} (table: {table_of(path).name})")
    elif form == "hub":
        remark = write_for_hub(path, source, target, report, settings.licence, settings.results)
        logger.info(f"Written, and its checkpoint read back by nnU-Net's own loader: {path}")
    else:
        count = write_encoder(path, source, target, report, settings.licence)
        logger.info(f"Written: {path}, {count:,} parameters; python {path / 'load_encoder.py'} loads them")
    if remark:
        logger.info(f"Adaptation plan: {remark}")


def _check_settings(settings: ExportSettings) -> None:
    """Check the settings before any file is read.

    Raises:
        ArgumentError: If a setting is out of range or contradicts another.
    """
    if not 0 <= settings.least_share <= 1:
        raise ArgumentError(f"least_share must be between 0 and 1, got {settings.least_share}", "least_share")
    if settings.form not in FORMATS:
        raise ArgumentError(f"form must be one of {', '.join(FORMATS)}, got {settings.form}", "form")
    if settings.trainer is not None and settings.form != "nnunet":
        raise ArgumentError(
            f"trainer can only be given with form nnunet, because form {settings.form} describes the network of a plan",
            "trainer",
            "form",
        )
    check_policy(settings.policy)
    if settings.for_plans is None:
        given = {"plans_name": settings.plans_name, "channels": settings.channels, "trainer": settings.trainer}
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(f"{name} needs for_plans, which names the target's plans", name, "for_plans")


def own_target(source: OpenedCheckpoint, seed: int = 0, configuration: str | None = None) -> TargetNetwork:
    """Return the network that weights of nnssl were pretrained in.

    Raises:
        UserError: If the weights were made elsewhere, without a plan.
        ArgumentError: If the plan has no such configuration.
    """
    origin = source.provenance
    if origin is None:
        raise ArgumentError(
            f"{source.path}: was made elsewhere and has no plans of nnU-Net; name the target's plans with for_plans",
            "for_plans",
        )
    chosen = source.choose_configuration(configuration)
    label = f"{chosen} of {origin.plans_name}, the plan of the weights"
    return build_target(origin.plans, chosen, origin.dataset_json, label, seed=seed)


def _open_target(source: OpenedCheckpoint, settings: ExportSettings, folders: Folders) -> TargetNetwork:
    if settings.for_plans is None:
        return own_target(source, settings.seed, settings.configuration)
    usual = source.provenance.configuration if source.provenance else "3d_fullres"
    return open_target(
        settings.for_plans,
        folders,
        plans_name=settings.plans_name,
        configuration=settings.configuration,
        usual_configuration=usual,
        channels=settings.channels,
        trainer=settings.trainer,
        seed=settings.seed,
    )


def _default_output(target: TargetNetwork, form: Format) -> Path:
    parts = (target.plans["dataset_name"], target.plans["plans_name"], target.configuration, target.trainer)
    name = "_".join(part for part in parts if part)
    return Path(f"for_{name}.pth" if form == "nnunet" else f"{form}_{name}")


def _channel_text(source: OpenedCheckpoint) -> str:
    return ", ".join(source.channel_names) if source.channel_names else str(source.num_channels)
