"""What nnU-Net needs of a labelled data set before it trains: dataset.json, fingerprint, preprocessed cases."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nnssl.environment import quiet
from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.paths import Folders
from planners.finetune_planner import AdoptedPlan


def prepare_data(
    dataset_name: str,
    plan: AdoptedPlan,
    configuration: str,
    labelled: Sequence[str],
    folders: Folders,
    processes: int,
    say: Callable[[str], None],
) -> None:
    """Do what nnU-Net needs before it trains: dataset.json, fingerprint, preprocessed cases; what is there is kept.

    Args:
        dataset_name: name of the labelled data set.
        plan: its plan.
        configuration: the one configuration to preprocess.
        labelled: names of all its cases.
        folders: nnU-Net's folders.
        processes: processes to work in.
        say: called with a line for each thing done or skipped.

    Raises:
        UserError: nnU-Net cannot do it; names the log.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = folders.preprocessed / dataset_name
    labels_changed = _copy_dataset_json(folders.raw / dataset_name / "dataset.json", folder / "dataset.json")
    data = folder / PlansManager(plan.content).get_configuration(configuration).data_identifier
    log = folder / "nnssl_finetune_log.txt"
    try:
        if not (folder / "dataset_fingerprint.json").exists():
            say(f"Fingerprint of {dataset_name} ...")
            with quiet(log):
                extractor = DatasetFingerprintExtractor(dataset_name, processes)
                extractor.show_progress_bar = sys.stderr.isatty()
                extractor.run()
        if not labels_changed and is_preprocessed(data, folder / "gt_segmentations", labelled):
            say(f"Preprocessed cases: all {len(labelled)} there already ({data})")
        else:
            say(f"Preprocessing {len(labelled)} cases for {configuration} ...")
            with quiet(log):
                _preprocess(dataset_name, plan.name, configuration, processes)
    except RuntimeError as error:
        raise UserError(
            f"{dataset_name}: nnU-Net cannot prepare it ({str(error).splitlines()[0]}); see {log}, and take fewer "
            "--processes if memory ran out"
        ) from error


def is_preprocessed(data: Path, references: Path, cases: Sequence[str]) -> bool:
    """Whether a folder of preprocessed data holds every case complete, and the reference segmentations are there.

    Args:
        data: nnU-Net's folder of one configuration.
        references: its ``gt_segmentations``.
        cases: names of the cases.
    """
    if not data.is_dir() or not references.is_dir():
        return False
    files = {path.name for path in data.iterdir()}
    copied = {path.name for path in references.iterdir()}
    # the .pkl of a case is what nnU-Net writes last
    return all({f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.pkl"} <= files for case in cases) and all(
        any(name.startswith(f"{case}.") for name in copied) for case in cases
    )


def _preprocess(dataset_name: str, plans_name: str, configuration: str, processes: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    number = re.match(r"Dataset(\d+)", dataset_name)
    assert number is not None  # nnU-Net and find_dataset know no other names
    progress = sys.stderr.isatty()
    preprocess_dataset(int(number[1]), plans_name, (configuration,), (processes,), show_progress_bar=progress)


def _copy_dataset_json(raw: Path, copy: Path) -> bool:
    """Copy dataset.json as nnU-Net's planning does; whether preprocessed data of the old one are no longer right."""
    content = read_json(raw, "dataset.json of a labelled data set")
    before = read_json(copy, "dataset.json") if copy.exists() else None
    if content != before:
        write_json(copy, content)
    keys = ("labels", "channel_names", "regions_class_order")
    return before is not None and any(content.get(key) != before.get(key) for key in keys)
