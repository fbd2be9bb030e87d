"""Classifies whole cases by frozen features: what weights know about a label of a patient or scan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import follow_jobs
from nnssl.data.raw import find_dataset
from nnssl.devices import find_device
from nnssl.errors import ArgumentError
from nnssl.evaluation.case_features import CaseReading, case_features, reading_of
from nnssl.evaluation.case_labels import CaseLabels, read_case_labels
from nnssl.evaluation.classification import (
    FILE_NAME,
    SCHEMA_VERSION,
    Classification,
    ClassResult,
    Comparison,
    compare,
    format_classification,
)
from nnssl.evaluation.cross_validation import LabelledFeatures, bootstrap_auc, cross_validate, repeats_of
from nnssl.log import logger
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.schema import write
from nnssl.version import __version__
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases

LEAST_FOLDS = 3
"""With fewer folds, a training part could have a single patient of a class, and no strength of the regularisation to choose."""


@dataclass(frozen=True)
class ClassifySettings:
    """Settings of ``classify``.

    Attributes:
        patches: Number of patches from which the features of a case are averaged.
        folds: Number of folds of the cross-validation, at most the number of patients of the rarest class.
        seed: Random seed of patches, random weights, folds and bootstrap.
        device: Device to compute on; None for a GPU if one is available, else the CPU.
        output: Folder for ``classification.json``; None for that of the table of labels.
    """

    patches: int = 16
    folds: int = 5
    seed: int = 0
    device: torch.device | str | None = None
    output: Path | None = None

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ArgumentError: If a number is too small.
        """
        for name, least in (("patches", 1), ("folds", LEAST_FOLDS), ("seed", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name} must be at least {least}, got {getattr(self, name)}", name)


def classify(
    labels: Path | str,
    weights: Path | str,
    dataset: str | int | None = None,
    settings: ClassifySettings | None = None,
    folders: Folders | None = None,
) -> Classification:
    """Measure how well whole cases can be classified by features of frozen weights, and by those of random weights.

    The features of a case are averaged over patches inside the body. Cross-validated logistic regression, in which the cases
    of a patient stay together, gives the AUC with an interval over patients. The result is printed and written.

    Args:
        labels: CSV file with the columns ``case`` and ``label``, and optionally ``patient``; without it, patients are taken
            from the names of the cases.
        weights: Checkpoint of pretraining.
        dataset: Number or name of the data set whose preprocessed cases are read; None for the one that the weights were
            pretrained on. Its plan must have the name and the configuration of the weights' plan.
        settings: How to classify; None for the defaults.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        The content of ``classification.json``.

    Raises:
        UserError: If the table, the checkpoint, the data set or a setting is unsuitable, or the result cannot be written.

    Examples:
        >>> rows = ["case,label"] + [f"scan_{number},{'low' if number < 3 else 'high'}" for number in range(6)]
        >>> _ = Path("labels.csv").write_text(chr(10).join(rows))
        >>> settings = nnssl.ClassifySettings(patches=2, folds=3)
        >>> found = nnssl.classify("labels.csv", weights, settings=settings)
        >>> found.cases, 0 <= found.auc.weights.value <= 1
        (6, True)
    """
    settings, folders = settings or ClassifySettings(), folders or resolve_folders()
    settings.check()
    table = read_case_labels(Path(labels))
    table.check_folds(settings.folds)
    checkpoint = open_checkpoint(Path(weights))
    provenance = checkpoint.own_provenance
    name = provenance.dataset_name if dataset is None else find_dataset(dataset, folders)
    store = open_cases(provenance, name, folders)
    table.check_cases(store.names, store.folder)
    output = make_writable(settings.output or table.path.absolute().parent)
    logger.info(f"Weights: {checkpoint.path} ({checkpoint.label}); cases of {name}")
    reading, features = _read_features(checkpoint, store, table, settings)
    whole, of_classes = _compare(table, features, settings)
    seen = set(provenance.cases or ()) & set(table.cases) if name == provenance.dataset_name else set()
    result = Classification(
        schema_version=SCHEMA_VERSION,
        nnssl_version=__version__,
        checkpoint=str(checkpoint.path),
        weights_digest=checkpoint.digest,
        stage=provenance.stage,
        configuration=provenance.configuration,
        dataset_name=name,
        labels=str(table.path),
        cases=len(table.cases),
        patients=len(set(table.patients)),
        cases_seen=len(seen),
        classes=of_classes,
        auc=whole,
        patch_vox=reading.patch_vox,
        patches=reading.patches,
        encoder_stages=reading.stages,
        features=features.shape[2],
        folds=settings.folds,
        repeats=repeats_of(len(table.cases)),
        seed=settings.seed,
    )
    write(output / FILE_NAME, result)
    for line in format_classification(result):
        logger.info(line)
    if seen:
        logger.info(f"The pretraining has seen {len(seen)} of these cases, without their labels")
    logger.info(f"Result: {output / FILE_NAME}")
    return result


def _read_features(
    checkpoint: OpenedCheckpoint, store: CaseStore, table: CaseLabels, settings: ClassifySettings
) -> tuple[CaseReading, np.ndarray]:
    """Return how the cases were read, and features (case, network, feature): of the weights, then of random weights."""
    device = find_device(settings.device)
    networks: list[Any] = []
    for trained in (True, False):
        network = checkpoint.build_network(settings.seed)
        if trained:
            checkpoint.load_into(network)
        networks.append(network.eval().requires_grad_(False).to(device))
    reading = reading_of(checkpoint, networks[0], settings.patches, settings.seed)
    found = (case_features(networks, store.case(case), reading, device) for case in table.cases)
    return reading, np.stack(list(follow_jobs(found, "reading", "read", len(table.cases))))


def _compare(
    table: CaseLabels, features: np.ndarray, settings: ClassifySettings
) -> tuple[Comparison, tuple[ClassResult, ...]]:
    """Return the AUC of all classes and that of each class."""
    times = repeats_of(len(table.cases))
    logger.info(f"Fitting logistic regression: {settings.folds} folds, {times} division(s) of {len(table.cases)} cases")
    classes, patients = (np.unique(each, return_inverse=True)[1] for each in (table.labels, table.patients))
    arms: list[LabelledFeatures] = [
        LabelledFeatures(features[:, network], classes, patients) for network in range(features.shape[1])
    ]
    scores = [cross_validate(arm, settings.folds, settings.seed) for arm in arms]
    trained, random = bootstrap_auc(scores, arms[0], settings.seed)
    several = len(table.classes) > 2
    whole = compare(trained, random, range(len(table.classes)) if several else (0,))
    return whole, tuple(
        ClassResult(label, *table.counts(label), compare(trained, random, (number,)) if several else None)
        for number, label in enumerate(table.classes)
    )
