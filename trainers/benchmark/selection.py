"""Order of the patients to label by features of pretrained weights, as ``select`` chooses them, for ``--choose select``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nnssl.errors import ArgumentError
from nnssl.files import some
from nnssl.log import logger, silence
from nnssl.paths import Folders
from nnssl.study.select import SelectSettings, choose_patients
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases
from trainers.benchmark.arms import Arm, Pretraining
from trainers.benchmark.settings import StudySettings


def weights_to_select_with(arms: Sequence[Arm], pretrainings: Mapping[str, Pretraining]) -> Path:
    """Return the weights of the first arm, whose features choose the patients.

    Raises:
        ArgumentError: If they do not exist yet.
    """
    first = arms[0]
    if first.checkpoint is not None:
        return first.checkpoint
    pretraining = pretrainings[first.name]
    if not pretraining.finished:
        raise ArgumentError(
            f"choose=select reads features of the first arm, {first.name}, whose weights must exist before the study; run "
            f"nnssl_pretrain -m {pretraining.method.name} first, or give a checkpoint as the first arm",
            "choose",
        )
    return pretraining.final


def select_orders(
    settings: StudySettings,
    weights: Path,
    dataset_name: str,
    pool: Sequence[str],
    patients: Mapping[str, str],
    folders: Folders,
    device: torch.device,
) -> tuple[tuple[str, ...], ...]:
    """Return the patients to label for every seed, in the order in which they are added.

    The order of a seed is that of ``nnssl_select --seed SEED`` with the largest number of labels, among the patients of the pool
    whose images are among the preprocessed cases of the pretraining data set under the same names.

    Args:
        settings: Settings of the study.
        weights: Checkpoint whose features are read.
        dataset_name: Data set that was pretrained on.
        pool: Patients that may be labelled.
        patients: Patient of every labelled case.
        folders: nnU-Net's folders.
        device: Device to compute on.

    Raises:
        UserError: If the cases cannot be read, or if too few patients of the pool are among them.
    """
    checkpoint = open_checkpoint(weights)
    store = open_cases(checkpoint.own_provenance, dataset_name, folders)
    found: dict[str, list[str]] = {}
    for case in store.names:
        if patients.get(case) in pool:
            found.setdefault(patients[case], []).append(case)
    cases_of = {patient: tuple(own) for patient, own in sorted(found.items())}
    number = max(settings.labels)
    if number > len(cases_of):
        missing = some([patient for patient in pool if patient not in cases_of])
        raise ArgumentError(
            f"choose=select needs the images of {number} patients of the pool among the preprocessed cases of {dataset_name}, "
            f"but finds {len(cases_of)} (missing: {missing}); preprocess their images there under the same names, or use "
            "choose=random",
            "choose",
        )
    logger.info(
        f"Patients to label are selected by features of {weights}, among {len(cases_of)} of {len(pool)} patients"
    )
    orders = []
    for seed in range(settings.seeds):
        with silence():
            chosen = choose_patients(checkpoint, store, cases_of, number, SelectSettings(seed=seed, device=device))
        orders.append(tuple(each.patient for each in chosen))
        logger.info(f"Seed {seed}: {', '.join(orders[-1])}")
    return tuple(orders)
