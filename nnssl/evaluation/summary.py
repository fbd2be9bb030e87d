"""Means of metrics by class, as ``nnssl_evaluate`` prints and writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.evaluation.metrics import CaseMetrics
from nnssl.tables import align, number


def summarise(metrics: Sequence[CaseMetrics], labels: Sequence[str], tolerance_mm: float) -> dict[str, Any]:
    """Return the means by class over the cases that count, and their means over the classes.

    Args:
        metrics: Metrics of all cases and classes.
        labels: Names of the classes.
        tolerance_mm: Tolerance of the normalised surface distance in mm.
    """
    names = ("dice", "nsd", "hd95_mm")
    classes = {}
    for label in labels:
        own = [entry for entry in metrics if entry.label == label]
        counted = [entry for entry in own if entry.dice is not None]
        classes[label] = {
            "cases": len(counted),
            **{name: _mean([getattr(entry, name) for entry in counted]) for name in names},
            "volume_ml": _mean([entry.volume_ml for entry in own]),
            "reference_volume_ml": _mean([entry.reference_volume_ml for entry in own]),
        }
    mean = {name: _mean([entry[name] for entry in classes.values()]) for name in names}
    return {"tolerance_mm": tolerance_mm, "cases": len({e.case for e in metrics}), "classes": classes, "mean": mean}


def format_summary(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with one line per class and one for the means."""
    head = ["class", "cases", "Dice", f"NSD at {summary['tolerance_mm']:g} mm", "HD95 mm", "volume ml", "reference ml"]
    columns = ("dice", "nsd", "hd95_mm", "volume_ml", "reference_volume_ml")
    digits = (4, 4, 2, 2, 2)
    rows = [head]
    for label, entry in summary["classes"].items():
        values = [number(entry[name], digit) for name, digit in zip(columns, digits, strict=True)]
        rows.append([label, str(entry["cases"]), *values])
    means = [number(summary["mean"][name], digit) for name, digit in zip(columns[:3], digits[:3], strict=True)]
    rows.append(["mean", str(summary["cases"]), *means, "", ""])
    return align(rows)


def _mean(values: Sequence[float | None]) -> float | None:
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None
