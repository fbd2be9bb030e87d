"""Evaluates a folder of segmentations: metrics of each case and their means, printed and written."""

import math
from pathlib import Path
from typing import Any

from nnssl.data.jobs import default_processes
from nnssl.errors import ArgumentError
from nnssl.evaluation.labels import find_labels
from nnssl.evaluation.metrics import evaluate_folders, write_metrics_csv
from nnssl.evaluation.summary import format_summary, summarise
from nnssl.files import write_json
from nnssl.log import logger
from nnssl.paths import make_writable

METRICS_FILE, SUMMARY_FILE = "metrics.csv", "summary_nnssl.json"


def evaluate(
    predictions: Path | str,
    references: Path | str,
    labels_file: Path | None = None,
    tolerance_mm: float = 2.0,
    output: Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Compare the segmentations of a folder with references of the same names, and write metrics and means.

    Args:
        predictions: Folder with segmentations.
        references: Folder with reference segmentations of the same names.
        labels_file: ``dataset.json`` that names the classes; None for one beside either folder or, without any, numbers.
        tolerance_mm: Tolerance of the normalised surface distance in mm.
        output: Folder for ``metrics.csv`` and ``summary_nnssl.json``; None for that of the predictions.
        processes: Number of processes; None for one per core, at most 8.

    Returns:
        The content of ``summary_nnssl.json``.

    Raises:
        UserError: If folders, labels or the tolerance are unsuitable, or a file cannot be written.

    Examples:
        >>> references = nnssl.resolve_folders().raw / "Dataset004_MyTask" / "labelsTr"
        >>> summary = nnssl.evaluate("segmentations", references, processes=1)
        >>> summary["cases"]
        8
    """
    predictions, references = Path(predictions), Path(references)
    if not 0 < tolerance_mm < math.inf:
        raise ArgumentError(f"tolerance_mm must be above 0 and finite, got {tolerance_mm:g}", "tolerance_mm")
    labels, ignore = find_labels(labels_file, predictions, references)
    folder = make_writable(output or predictions)
    workers = default_processes() if processes is None else processes
    metrics = evaluate_folders(predictions, references, labels, tolerance_mm, ignore, workers)
    summary = summarise(metrics, list(labels), tolerance_mm)
    write_metrics_csv(folder / METRICS_FILE, metrics)
    write_json(folder / SUMMARY_FILE, summary)
    for line in format_summary(summary):
        logger.info(line)
    logger.info(f"Metrics per case and class: {folder / METRICS_FILE}; means: {folder / SUMMARY_FILE}")
    return summary
