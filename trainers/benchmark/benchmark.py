"""A label-efficiency study in one call: does pretraining help on a labelled data set?"""

from typing import TYPE_CHECKING

from nnssl.data.cluster import check_cluster
from nnssl.data.jobs import default_processes
from nnssl.devices import find_device
from nnssl.errors import ArgumentError
from nnssl.log import logger
from nnssl.paths import Folders, resolve_folders, use_folders
from nnssl.study.table import StudyTable
from trainers.benchmark.auto_arm import choose, describe_open
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.estimate import describe_estimate
from trainers.benchmark.run import describe_matrix, parse_part, prepare_source, run_study, study_folder
from trainers.benchmark.settings import StudySettings
from trainers.benchmark.study import Study, prepare_study
from trainers.finetuning.label_checks import check_labels_of

if TYPE_CHECKING:
    import torch


def benchmark(
    settings: StudySettings,
    *,
    name: str = "study",
    part: str = "1/1",
    dask_address: str | None = None,
    device: "torch.device | str | None" = None,
    processes: int | None = None,
    folders: Folders | None = None,
    command: str | None = None,
) -> StudyTable | None:
    """Compare pretrained weights with a start from scratch on few labels, and write the table and the report.

    Finished cells are recognised and skipped, so an interrupted study continues where it stopped.

    Args:
        settings: What to compare on which data.
        name: Name of the study's folder.
        part: ``"i/n"`` to run only the i-th of n parts, for example on a cluster.
        dask_address: Address of a Dask scheduler whose workers pretrain the arms and fill the cells; None for this process.
        device: Device to train on; None for a GPU if one is available, else the CPU. On a Dask cluster, the device of its
            workers, by default a GPU if a worker declares one.
        processes: Worker processes for preprocessing and evaluation; None for one per core, at most 8.
        folders: nnU-Net's folders; None for those of the environment.
        command: Command that repeats the study, printed in the report; None for the call of this function.

    Returns:
        The table; None if cells of other parts are missing.

    Raises:
        UserError: If settings, data, weights or plan do not fit one another, if a held-out case was seen in pretraining, or if
            the cluster cannot be used.

    Examples:
        >>> table = nnssl.benchmark(settings, processes=1)
        >>> [row.arm for row in table.rows]
        ['scratch', 'mine']
    """
    share = parse_part(part)
    if dask_address is not None:
        if share.count > 1:
            raise ArgumentError(
                f"part must not be given together with dask_address, whose workers do all parts, got {part}",
                "part",
                "dask_address",
            )
        device = _device_of_workers(device, check_cluster(dask_address))
    with use_folders(folders) as used:
        study = open_study(settings, device, processes, used)
        if prepare_source(study):
            study = open_study(settings, device, processes, used)
        reader = study.adopted.content["image_reader_writer"]
        check_labels_of(study.used, study.dataset.name, reader, used, study.processes)  # before any arm is pretrained
        for arm in study.undecided:
            assert study.source is not None
            choose(arm, study.source)
        if study.undecided:
            study = open_study(settings, device, processes, used)
        return run_study(
            study, study_folder(study, name), share, command or f"nnssl.benchmark({settings!r})", dask_address
        )


def preview(
    settings: StudySettings,
    *,
    device: "torch.device | str | None" = None,
    processes: int | None = None,
    folders: Folders | None = None,
) -> None:
    """Print the cells of a study, which of them are finished, and how long the others take; train and write nothing.

    Raises:
        UserError: As ``benchmark``.

    Examples:
        >>> settings = nnssl.StudySettings(
        ...     dataset=4, source=501, arms=(f"mine={weights}",), labels=(1,), seeds=1, epochs=(1,), iterations_per_epoch=2
        ... )
        >>> nnssl.preview(settings, processes=1)
    """
    study = open_study(settings, device, processes, folders)
    cells = StudyCells(study)
    for arm in study.undecided:
        assert study.source is not None
        logger.info(describe_open(arm, study.source))
    for line in [*describe_matrix(cells), *describe_estimate(cells)]:
        logger.info(line)


def open_study(
    settings: StudySettings, device: "torch.device | str | None", processes: int | None, folders: Folders | None
) -> Study:
    """Find and check everything that a study needs; the arguments are those of ``benchmark``."""
    import torch

    folders = folders or resolve_folders()
    found = device if isinstance(device, torch.device) else find_device(device)
    return prepare_study(settings, folders, found, processes or default_processes())


def _device_of_workers(device: "torch.device | str | None", gpus: bool) -> "torch.device":
    """Return the device that the workers of a cluster train on, which this machine need not have.

    Raises:
        ArgumentError: If PyTorch does not know the device.
    """
    import torch

    if device is None:
        logger.info(f"Device: {'cuda (workers declare GPUs)' if gpus else 'cpu (no worker declares a GPU)'}")
    try:
        return torch.device(device or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise ArgumentError(f"device must be cpu, cuda or mps, got {device}", "device") from error
