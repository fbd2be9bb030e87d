"""The labels of annotated cases carried to another case: prototypes of the labels, and probabilities of its voxels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

from nnssl.data.case_store import StoredCase
from nnssl.pictures.dense_network import DenseNetwork
from nnssl.propagation.features import label_logits, read_points
from nnssl.propagation.prototypes import LabelPrototypes, fit_prototypes

POINTS_PER_LABEL = 1500
"""Largest number of voxels of a label that are drawn from an annotated case."""
BACKGROUND_FACTOR = 4
"""Number of voxels and of prototypes of the background, relative to those of a label."""
TEMPERATURE = 0.1
"""Divisor of squared distances, whose mean over all pairs of points is near 2."""


class AnnotatedCase(NamedTuple):
    """An annotated case: its preprocessed voxels, and its label values on their grid."""

    case: StoredCase
    labels: Int[np.ndarray, "z y x"]


def fit_to_cases(
    network: DenseNetwork,
    annotated: Sequence[AnnotatedCase],
    values: Sequence[int],
    prototypes: int,
    position_weight: float,
    seed: int,
) -> LabelPrototypes:
    """Fit the prototypes of all labels to annotated cases.

    Args:
        network: Network that computes the features.
        annotated: The annotated cases; together they contain every value.
        values: Value of each label, the background first.
        prototypes: Number of prototypes of a label; the background has ``BACKGROUND_FACTOR`` times as many.
        position_weight: Weight of the relative position in the body's box.
        seed: Random seed.
    """
    factors = [BACKGROUND_FACTOR] + [1] * (len(values) - 1)
    most = [factor * POINTS_PER_LABEL for factor in factors]
    points = [read_points(network, each.case, each.labels, values, most, seed) for each in annotated]
    fitted = fit_prototypes(
        features=torch.cat([each.features for each in points]),
        positions=torch.cat([each.positions for each in points]),
        labels=torch.cat([each.labels for each in points]),
        widths=points[0].widths,
        counts=[factor * prototypes for factor in factors],
        position_weight=position_weight,
        temperature=TEMPERATURE,
        seed=seed,
    )
    return fitted.to(network.device)


def probabilities_of(
    network: DenseNetwork, case: StoredCase, prototypes: LabelPrototypes, smoothing_mm: float
) -> Float32[np.ndarray, "label z y x"]:
    """Return the probabilities of the labels in every voxel of a case.

    Args:
        network: Network that computes the features.
        case: The case.
        prototypes: Prototypes of the labels.
        smoothing_mm: Standard deviation of the Gaussian that smooths the probabilities, in mm; 0 for none.
    """
    found = softmax(label_logits(network, case, prototypes), axis=0)
    if smoothing_mm:
        sigma_vox = [smoothing_mm / mm for mm in case.spacing_mm]
        found = np.stack([gaussian_filter(each, sigma_vox, truncate=3.0) for each in found])
    return found
