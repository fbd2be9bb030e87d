"""Means of metrics by class, as ``nnssl_evaluate`` prints and writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.evaluation.metrics import CaseMetrics
from nnssl.tables import align, number, points


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
    """Return the lines of a table with one line per class and one for the means; Dice and surface distance in points."""
    nsd = f"NSD (points) at {summary['tolerance_mm']:g} mm"
    rows = [["class", "cases", "Dice (points)", nsd, "HD95 mm", "volume ml", "reference ml"]]
    for label, entry in summary["classes"].items():
        volumes = [number(entry[name], 2) for name in ("volume_ml", "reference_volume_ml")]
        rows.append([label, str(entry["cases"]), *_distances(entry), *volumes])
    rows.append(["mean", str(summary["cases"]), *_distances(summary["mean"]), "", ""])
    return align(rows)


def _distances(entry: Mapping[str, Any]) -> list[str]:
    return [points(entry["dice"]), points(entry["nsd"]), number(entry["hd95_mm"], 2)]


def _mean(values: Sequence[float | None]) -> float | None:
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None
