"""Segmentation metrics per case and class: Dice, normalised surface distance, 95th percentile distance, volume.

Source: Dice as in nnU-Net's evaluation. Normalised surface distance: Nikolov et al., Deep learning to achieve clinically
applicable segmentation of head and neck anatomy, JMIR 2021 (surface Dice at a tolerance); surfaces, areas and distances are
MONAI's, with surface elements between voxels.

Empty masks follow one rule. If neither side has the class, the pair does not count (None, as nnU-Net's NaN). If only one side
has the class, the Dice and the normalised surface distance are 0, and the 95th percentile distance is the diagonal of the
image, the largest possible distance. A missed organ therefore always counts.
"""

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Bool

from nnssl.data.bounding_box import find_box
from nnssl.data.jobs import follow_jobs, run_list
from nnssl.errors import UserError
from nnssl.evaluation.segmentation_files import case_name, check_same_geometry, find_segmentations, read_segmentation
from nnssl.files import some, write_csv
from nnssl.schema import STRICT

Label = int | Sequence[int]
ROUNDING = 1e-6
"""Relative excess over the tolerance that is attributed to rounding, because spacings are often stored in float32."""
COLUMNS = ("case", "class", "dice", "nsd", "hd95_mm", "volume_ml", "reference_volume_ml")
"""Columns of a table of ``CaseMetrics``."""


@dataclass(frozen=True)
class CaseMetrics:
    """Metrics of one class in one case."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    label: str
    """Name of the class or region."""
    dice: float | None
    """Dice, 0 to 1; None if neither side has the class."""
    nsd: float | None
    """Normalised surface distance, 0 to 1; None if neither side has the class, or if surfaces were not compared."""
    hd95_mm: float | None
    """95th percentile of the surface distance in mm, the larger of both directions; None as for ``nsd``."""
    volume_ml: float
    """Volume of the prediction."""
    reference_volume_ml: float
    """Volume of the reference."""


def evaluate_case(
    prediction: Path,
    reference: Path,
    labels: Mapping[str, Label],
    tolerance_mm: float,
    ignore: int | None = None,
    surfaces: bool = True,
) -> list[CaseMetrics]:
    """Compute the metrics of every class in one segmentation.

    Args:
        prediction: Image file of the prediction.
        reference: Image file of the reference, with the same geometry.
        labels: Value of each class, or several values for a region.
        tolerance_mm: Tolerance of the normalised surface distance in mm.
        ignore: Value of the reference that excludes voxels on both sides; None for no exclusion.
        surfaces: Whether surfaces are compared too, which takes most of the time.

    Raises:
        UserError: If a file cannot be read, the geometries differ, or a value is not a label.
    """
    predicted, true = read_segmentation(prediction), read_segmentation(reference)
    check_same_geometry(prediction, predicted, reference, true)
    known = {0} | {value for label in labels.values() for value in ((label,) if isinstance(label, int) else label)}
    for path, values, more in ((prediction, predicted.values, set()), (reference, true.values, {ignore})):
        unknown = sorted({int(value) for value in np.unique(values)} - known - more)
        if unknown:
            raise UserError(
                f"{path}: contains the value {unknown[0]}, which is not a label ({', '.join(map(str, sorted(known)))}); "
                "use the dataset.json that belongs to it"
            )
    counted = np.ones(true.values.shape, bool) if ignore is None else true.values != ignore
    voxel_ml = float(np.prod(true.spacing_mm)) / 1000
    diagonal_mm = float(np.linalg.norm(np.multiply(true.values.shape, true.spacing_mm)))
    results = []
    for name, label in labels.items():
        ours, theirs = (np.isin(side.values, label) & counted for side in (predicted, true))
        if surfaces:
            dice, nsd, hd95_mm = compare_masks(ours, theirs, true.spacing_mm, tolerance_mm, diagonal_mm)
        else:
            dice, nsd, hd95_mm = _dice(ours, theirs), None, None
        volumes = float(ours.sum()) * voxel_ml, float(theirs.sum()) * voxel_ml
        results.append(CaseMetrics(case_name(reference), name, dice, nsd, hd95_mm, *volumes))
    return results


def compare_masks(
    prediction: Bool[np.ndarray, "*shape"],
    reference: Bool[np.ndarray, "*shape"],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    diagonal_mm: float,
) -> tuple[float | None, float | None, float | None]:
    """Return Dice, normalised surface distance and the 95th percentile distance in mm of two masks.

    Args:
        prediction: Predicted mask, 2D or 3D.
        reference: Reference mask of the same shape.
        spacing_mm: Spacing in mm in the order of the axes.
        tolerance_mm: Tolerance of the normalised surface distance in mm.
        diagonal_mm: Diagonal of the image in mm, which is the distance if one mask is empty.

    Returns:
        Two shares from 0 to 1 and a distance, or the values for empty masks. A 3D image of one slice is treated as 2D,
        because as a volume it would consist of surface only.
    """
    if prediction.ndim == 3 and 1 in prediction.shape:
        flat = prediction.shape.index(1)
        prediction, reference = prediction.squeeze(flat), reference.squeeze(flat)
        spacing_mm = [mm for axis, mm in enumerate(spacing_mm) if axis != flat]
    if not prediction.any() and not reference.any():
        return None, None, None
    if not prediction.any() or not reference.any():
        return 0.0, 0.0, diagonal_mm
    dice = _dice(prediction, reference)
    box = find_box(prediction | reference)
    # With a rim of background, objects at the border of the image have a surface there too.
    ours, theirs = (np.pad(mask[box], 1) for mask in (prediction, reference))
    nsd, hd95_mm = _surface_metrics(ours, theirs, spacing_mm, tolerance_mm)
    return dice, nsd, hd95_mm


def evaluate_folders(
    predictions: Path,
    references: Path,
    labels: Mapping[str, Label],
    tolerance_mm: float,
    ignore: int | None = None,
    processes: int = 1,
    cases: Sequence[str] | None = None,
    surfaces: bool = True,
) -> list[CaseMetrics]:
    """Compute the metrics of every case and class of a folder, sorted by case.

    Args:
        predictions: Folder of the predictions.
        references: Folder of the references.
        labels: Value of each class, or several values for a region.
        tolerance_mm: Tolerance of the normalised surface distance in mm.
        ignore: Value of the references that excludes voxels on both sides; None for no exclusion.
        processes: Number of worker processes; 1 for this process only.
        cases: Cases to evaluate; None for all cases of either folder.
        surfaces: Whether surfaces are compared too, which takes most of the time.

    Raises:
        UserError: If a prediction or a reference is missing, a process was killed, or ``evaluate_case`` rejects a file.
    """
    ours, theirs = find_segmentations(predictions), find_segmentations(references)
    names = sorted(cases if cases is not None else {*ours, *theirs})
    for found, folder, what in ((ours, predictions, "prediction"), (theirs, references, "reference")):
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(
                f"{folder}: has no {what} of {some(missing)}; add it, or remove the other file if the case is not to be "
                "evaluated"
            )
    evaluate = partial(_evaluate_pair, labels=labels, tolerance_mm=tolerance_mm, ignore=ignore, surfaces=surfaces)
    pairs = [(name, ours[name], theirs[name]) for name in names]
    outcomes = run_list(evaluate, pairs, processes)
    results = dict(follow_jobs(outcomes, "evaluating", "evaluated", len(pairs)))
    return [entry for name in names for entry in results[name]]


def write_metrics_csv(path: Path, metrics: Sequence[CaseMetrics]) -> None:
    """Write one line for each case and class, with an empty field for each metric that does not count."""
    write_csv(path, COLUMNS, [astuple(entry) for entry in metrics])


def read_metrics_csv(path: Path) -> list[CaseMetrics]:
    """Read a file of ``write_metrics_csv``.

    Raises:
        UserError: If the file is not such a table.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        if tuple(rows[0]) != COLUMNS:
            raise ValueError(f"columns {', '.join(rows[0])}")
        return [_parse_row(*row) for row in rows[1:]]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: is not a table of metrics ({error}); delete it and evaluate again") from error


def _parse_row(case: str, label: str, *numbers: str) -> CaseMetrics:
    dice, nsd, hd95_mm, volume_ml, reference_volume_ml = (float(text) if text else None for text in numbers)
    if volume_ml is None or reference_volume_ml is None:
        raise ValueError(f"no volume of {case}")
    return CaseMetrics(case, label, dice, nsd, hd95_mm, volume_ml, reference_volume_ml)


def _evaluate_pair(
    pair: tuple[str, Path, Path], labels: Mapping[str, Label], tolerance_mm: float, ignore: int | None, surfaces: bool
) -> tuple[str, list[CaseMetrics]]:
    case, prediction, reference = pair
    return case, evaluate_case(prediction, reference, labels, tolerance_mm, ignore, surfaces)


def _dice(prediction: Bool[np.ndarray, "*shape"], reference: Bool[np.ndarray, "*shape"]) -> float | None:
    """Return the Dice of two masks; None if both are empty."""
    total = float(prediction.sum() + reference.sum())
    return 2 * float((prediction & reference).sum()) / total if total else None


def _surface_metrics(
    prediction: Bool[np.ndarray, "*shape"],
    reference: Bool[np.ndarray, "*shape"],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> tuple[float, float]:
    import torch  # slow to import, like MONAI
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    ours, theirs = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
    spacing = tuple(map(float, spacing_mm))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai")
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*")
        nsd = compute_surface_dice(
            ours,
            theirs,
            class_thresholds=[tolerance_mm * (1 + ROUNDING)],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        )
        hd95_mm = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95, spacing=spacing)
    return float(nsd), float(hd95_mm)
