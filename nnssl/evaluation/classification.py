"""The result of a classification of whole cases: its file and its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from nnssl import schema
from nnssl.evaluation.cross_validation import AucSamples, interval
from nnssl.schema import STRICT
from nnssl.tables import align

SCHEMA_VERSION = 1
FILE_NAME = "classification.json"
ALL = "all"
MACRO = "macro average"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    __pydantic_config__: ClassVar = STRICT

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """AUC with the weights and with random weights of the same network."""

    __pydantic_config__: ClassVar = STRICT

    weights: Estimate
    random: Estimate
    difference: Estimate
    """AUC with the weights minus AUC with random weights, in the same bootstrap samples."""


@dataclass(frozen=True)
class ClassResult:
    """A class, and how well it is separated from the rest."""

    __pydantic_config__: ClassVar = STRICT

    label: str
    cases: int
    patients: int
    auc: Comparison | None
    """None if there are two classes, whose AUC is that of the whole."""


@dataclass(frozen=True)
class Classification:
    """Content of ``classification.json``."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    nnssl_version: str
    checkpoint: str
    """Path of the checkpoint."""
    weights_digest: str
    """Digest of the checkpoint's bytes."""
    stage: str
    """Pretext stage of the weights, ``method.stage``."""
    configuration: str
    dataset_name: str
    """Data set of the cases."""
    labels: str
    """Path of the table of labels."""
    cases: int
    patients: int
    cases_seen: int
    """Number of these cases that the stage was trained on, without their labels."""
    classes: tuple[ClassResult, ...]
    auc: Comparison
    """AUC of the second class; with more than two classes, the mean over all classes of each against the rest."""
    patch_vox: tuple[int, ...]
    patches: int
    """Number of patches of a case."""
    encoder_stages: tuple[int, ...]
    """Encoder stages whose maps were pooled; empty for Primus."""
    features: int
    """Number of features of a case."""
    folds: int
    repeats: int
    seed: int


def read_classification(path: Path) -> Classification:
    """Read a ``classification.json``.

    Raises:
        UserError: If the file is missing, damaged or of another version.
    """
    return schema.read(Classification, path, "result of a classification", "run nnssl_evaluate --classify again")


def compare(weights: AucSamples, random: AucSamples, classes: Sequence[int]) -> Comparison:
    """Return the mean AUC of some classes with both networks, and the difference.

    Args:
        weights: AUC with the weights.
        random: AUC with random weights, in the same bootstrap samples.
        classes: Columns of the classes.
    """
    columns = list(classes)
    arms = [(each.estimate[columns].mean(), each.samples[:, columns].mean(axis=1)) for each in (weights, random)]
    (value, samples), (base, of_base) = arms
    return Comparison(*(_estimate(*each) for each in (*arms, (value - base, samples - of_base))))


def _estimate(value: float, samples: np.ndarray) -> Estimate:
    low, high = interval(samples)
    return Estimate(float(value), low, high)


def format_classification(result: Classification) -> list[str]:
    """Return the lines of a table with one line for each class and one for all."""
    head = ["class", "cases", "patients", "AUC, weights", "AUC, random weights", "difference"]
    rows = [head]
    for each in result.classes:
        rows.append([each.label, str(each.cases), str(each.patients), *_cells(each.auc)])
    name = ALL if len(result.classes) == 2 else MACRO
    rows.append([name, str(result.cases), str(result.patients), *_cells(result.auc)])
    return align(rows)


def _cells(auc: Comparison | None) -> list[str]:
    if auc is None:
        return ["-"] * 3
    plain = [f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in (auc.weights, auc.random)]
    apart = auc.difference
    return [*plain, f"{apart.value:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})"]
