"""Confidence of a propagated segmentation, from its own probabilities.

The expected Dice of a label is computed as if its probabilities were right: with ``p`` the probability of the label in each voxel
and ``y`` the mask of the voxels that are assigned to it, ``2 sum(p y) / (sum p + sum y)``. The confidence of a case is the mean
over the labels. A label that is found nowhere counts as 0.

Source: none; the soft Dice of segmentation losses (Milletari et al., V-Net, 3DV 2016), with the prediction in place of the
reference.
"""

import numpy as np
from jaxtyping import Float, Integer


def expected_dice(
    probabilities: Float[np.ndarray, "label z y x"], assigned: Integer[np.ndarray, "z y x"]
) -> Float[np.ndarray, " foreground"]:
    """Return the expected Dice of every label except the first, the background.

    Args:
        probabilities: Probabilities of the labels, which sum to 1 in each voxel.
        assigned: Index of the label that each voxel is assigned to.
    """
    found = []
    for label in range(1, len(probabilities)):
        mask = assigned == label
        total = float(probabilities[label].sum(dtype=np.float64)) + float(mask.sum())
        found.append(2 * float(probabilities[label][mask].sum(dtype=np.float64)) / total if mask.any() else 0.0)
    return np.array(found)
