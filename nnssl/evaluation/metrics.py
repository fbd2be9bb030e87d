"""How good a segmentation is, per case and class: Dice, normalised surface distance, 95th percentile distance, volume.

Source: Dice as in nnU-Net's evaluation. Normalised surface distance: Nikolov et al., Deep learning to achieve clinically
applicable segmentation of head and neck anatomy, JMIR 2021 (surface Dice at a tolerance); surfaces, areas and distances are
MONAI's, with surface elements between voxels.

Empty sides follow one rule: where neither side has the class, the pair is not counted (None, as nnU-Net's NaN). Where one
side has it, the Dice and the surface distance are 0, and the 95th percentile distance is the diagonal of the image, than
which no distance in it is larger. So a missed organ is never passed over.
"""

import csv
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Integer

from nnssl.errors import UserError
from nnssl.files import some, write_csv
from nnssl.schema import STRICT

Label = int | Sequence[int]
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".tiff", ".tif", ".png", ".bmp")
GEOMETRY_TOLERANCE = 1e-3
"""Difference of spacing (relative), origin (voxels) and direction that is put down to rounding."""
COLUMNS = ("case", "class", "dice", "nsd", "hd95_mm", "volume_ml", "reference_volume_ml")


@dataclass(frozen=True)
class CaseMetrics:
    """One class of one case."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    label: str
    """Class or region."""
    dice: float | None
    """0 to 1; None where neither side has the class."""
    nsd: float | None
    """Normalised surface distance, 0 to 1; None as above."""
    hd95_mm: float | None
    """95th percentile of the distance between the surfaces, the larger direction; None as above."""
    volume_ml: float
    """Predicted."""
    reference_volume_ml: float


@dataclass(frozen=True)
class _Segmentation:
    values: Integer[np.ndarray, "*shape"]
    spacing_mm: tuple[float, ...]
    """In the order of the array's axes."""
    origin: tuple[float, ...]
    direction: tuple[float, ...]


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
    """Return the classes and regions of a ``dataset.json`` that are evaluated: all but background and ignore label."""
    return {
        name: tuple(value) if isinstance(value, (list, tuple)) else int(value)
        for name, value in dataset_json["labels"].items()
        if name != "ignore" and value != 0
    }


def ignore_label(dataset_json: Mapping[str, Any]) -> int | None:
    """Return the value of a ``dataset.json`` that marks voxels which nobody labelled, None without one."""
    value = dataset_json["labels"].get("ignore")
    return None if value is None else int(value)


def evaluate_case(
    prediction: Path,
    reference: Path,
    labels: Mapping[str, Label],
    tolerance_mm: float,
    ignore: int | None = None,
) -> list[CaseMetrics]:
    """Evaluate one segmentation, one entry for each class.

    Args:
        prediction: image file.
        reference: image file of the same geometry.
        labels: value of every class, several for a region.
        tolerance_mm: of the normalised surface distance.
        ignore: value of the reference whose voxels are left out on both sides.

    Raises:
        UserError: a file cannot be read, the geometries differ, or a value is no label.
    """
    predicted, true = _read(prediction), _read(reference)
    _check_geometry(prediction, predicted, reference, true)
    known = {0} | {value for label in labels.values() for value in ((label,) if isinstance(label, int) else label)}
    for path, values, more in ((prediction, predicted.values, set()), (reference, true.values, {ignore})):
        unknown = sorted({int(value) for value in np.unique(values)} - known - more)
        if unknown:
            raise UserError(
                f"{path}: holds the value {unknown[0]}, which is none of the labels ({', '.join(map(str, sorted(known)))}); "
                "take the dataset.json that it was made with"
            )
    counted = np.ones(true.values.shape, bool) if ignore is None else true.values != ignore
    voxel_ml = float(np.prod(true.spacing_mm)) / 1000
    diagonal_mm = float(np.linalg.norm(np.multiply(true.values.shape, true.spacing_mm)))
    results = []
    for name, label in labels.items():
        ours, theirs = (np.isin(side.values, label) & counted for side in (predicted, true))
        dice, nsd, hd95_mm = compare_masks(ours, theirs, true.spacing_mm, tolerance_mm, diagonal_mm)
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
        prediction: 2D or 3D.
        reference: of the same shape.
        spacing_mm: in the order of the axes.
        tolerance_mm: of the normalised surface distance.
        diagonal_mm: of the image: the distance where one mask is empty.
    """
    if not prediction.any() and not reference.any():
        return None, None, None
    if not prediction.any() or not reference.any():
        return 0.0, 0.0, diagonal_mm
    dice = 2 * float((prediction & reference).sum()) / float(prediction.sum() + reference.sum())
    box = _common_box(prediction | reference)
    # a rim of background, so that what touches the border of the image has a surface there too
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
) -> list[CaseMetrics]:
    """Evaluate the segmentations of a folder, one entry for each case and class, sorted by case.

    Args:
        predictions: folder.
        references: folder.
        labels: as ``evaluate_case``.
        tolerance_mm: of the normalised surface distance.
        ignore: as ``evaluate_case``.
        processes: worker processes; 1 works in this one.
        cases: to evaluate; None for all that either folder has.

    Raises:
        UserError: a prediction or a reference is missing; or as ``evaluate_case``.
    """
    ours, theirs = find_segmentations(predictions), find_segmentations(references)
    names = sorted(cases if cases is not None else {*ours, *theirs})
    for found, folder, what in ((ours, predictions, "prediction"), (theirs, references, "reference")):
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(
                f"{folder}: has no {what} of {some(missing)}; put it there, or move the other file away if the case is not "
                "meant to be evaluated"
            )
    evaluate = partial(_evaluate_pair, labels=labels, tolerance_mm=tolerance_mm, ignore=ignore)
    pairs = [(ours[name], theirs[name]) for name in names]
    if processes <= 1 or len(pairs) == 1:
        results = [evaluate(pair) for pair in pairs]
    else:
        with ProcessPoolExecutor(min(processes, len(pairs)), mp_context=get_context("spawn")) as pool:
            results = list(pool.map(evaluate, pairs))
    return [entry for result in results for entry in result]


def find_segmentations(folder: Path) -> dict[str, Path]:
    """Return the segmentations of a folder by case; hidden files and files of other kinds are passed over.

    Raises:
        UserError: there is no such folder, it holds none, or a case has two files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(ENDINGS):
            continue
        name = case_name(path)
        if name in found:
            raise UserError(f"{folder}: has two files of {name}, {found[name].name} and {path.name}; keep one")
        found[name] = path
    if not found:
        raise UserError(f"{folder}: holds no segmentation ({', '.join(ENDINGS)})")
    return found


def case_name(path: Path) -> str:
    """Return the name of a file without its ending."""
    ending = next((each for each in ENDINGS if path.name.lower().endswith(each)), "")
    return path.name[: len(path.name) - len(ending)]


def write_metrics_csv(path: Path, metrics: Sequence[CaseMetrics]) -> None:
    """Write one line for each case and class; what is not counted is an empty field."""
    write_csv(path, COLUMNS, [["" if value is None else value for value in astuple(entry)] for entry in metrics])


def read_metrics_csv(path: Path) -> list[CaseMetrics]:
    """Read what ``write_metrics_csv`` wrote.

    Raises:
        UserError: it is no such file.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        if tuple(rows[0]) != COLUMNS:
            raise ValueError(f"columns {', '.join(rows[0])}")
        return [_parse_row(*row) for row in rows[1:]]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: is no table of metrics ({error}); delete it to have it made again") from error


def _parse_row(case: str, label: str, *numbers: str) -> CaseMetrics:
    dice, nsd, hd95_mm, volume_ml, reference_volume_ml = (float(text) if text else None for text in numbers)
    if volume_ml is None or reference_volume_ml is None:
        raise ValueError(f"no volume of {case}")
    return CaseMetrics(case, label, dice, nsd, hd95_mm, volume_ml, reference_volume_ml)


def _evaluate_pair(
    pair: tuple[Path, Path], labels: Mapping[str, Label], tolerance_mm: float, ignore: int | None
) -> list[CaseMetrics]:
    return evaluate_case(*pair, labels, tolerance_mm, ignore)


def _surface_metrics(
    prediction: Bool[np.ndarray, "*shape"],
    reference: Bool[np.ndarray, "*shape"],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> tuple[float, float]:
    import torch  # slow to import, as is MONAI
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    ours, theirs = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
    spacing = tuple(map(float, spacing_mm))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai")
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*")
        nsd = compute_surface_dice(
            ours, theirs, class_thresholds=[tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
        )
        hd95_mm = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95, spacing=spacing)
    return float(nsd), float(hd95_mm)


def _common_box(mask: Bool[np.ndarray, "*shape"]) -> tuple[slice, ...]:
    """Return the box around all that is true."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)


def _read(path: Path) -> _Segmentation:
    """Read a segmentation; a natural image has a spacing of 1."""
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: cannot be read ({reason}); mend it or predict again") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: has {image.GetNumberOfComponentsPerPixel()} values per voxel; give one, the class")
    values = sitk.GetArrayFromImage(image)
    if values.dtype.kind == "f":
        if not np.array_equal(values, np.rint(values)):
            raise UserError(f"{path}: holds fractions, so it is no segmentation; give whole numbers, the classes")
        values = values.astype(np.int64)
    return _Segmentation(values, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


def _check_geometry(prediction: Path, predicted: _Segmentation, reference: Path, true: _Segmentation) -> None:
    """Check that two images show the same voxels of the world.

    Raises:
        UserError: they do not.
    """
    if predicted.values.shape != true.values.shape:
        raise UserError(
            f"{prediction}: has {predicted.values.shape} voxels (z, y, x), its reference {reference} has "
            f"{true.values.shape}; resample one to the other"
        )
    spacing = np.array(true.spacing_mm)
    shift_vox = np.abs(np.subtract(predicted.origin, true.origin)) / spacing[::-1]
    wrong = [
        name
        for name, differs in (
            ("spacing", not np.allclose(predicted.spacing_mm, spacing, rtol=GEOMETRY_TOLERANCE)),
            ("origin", bool((shift_vox > GEOMETRY_TOLERANCE).any())),
            ("direction", not np.allclose(predicted.direction, true.direction, atol=GEOMETRY_TOLERANCE)),
        )
        if differs
    ]
    if wrong:
        raise UserError(
            f"{prediction}: differs in {' and '.join(wrong)} from its reference {reference}; resample one to the other"
        )
