"""Fingerprints of data sets of many kinds, without images, on which the planner is tried."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl.data.raw import RawCase, RawDataset
from planners.case_record import CaseRecord, IntensityStatistics
from planners.fingerprint import Fingerprint

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Kind:
    """A kind of data set.

    Attributes:
        shapes: Voxels (z, y, x) of its cases, which take turns.
        spacings_mm: Spacing of these cases in mm.
        channels: Names of the channels.
        cases: Number of cases.
    """

    shapes: tuple[Shape, ...]
    spacings_mm: tuple[Spacing, ...]
    channels: tuple[str, ...]
    cases: int


KINDS = {
    "hippocampus": Kind(((36, 50, 35), (40, 52, 33)), ((1.0, 1.0, 1.0),), ("MRI",), 200),
    "ACDC": Kind(((9, 256, 216), (10, 232, 200)), ((10.0, 1.5, 1.5),), ("MRI",), 160),
    "BTCV": Kind(((149, 257, 257), (90, 257, 257)), ((3.0, 1.3, 1.3), (5.0, 1.0, 1.0)), ("CT",), 12),
    "phantoms": Kind(((32, 56, 48),), ((2.5, 1.5, 1.7),), ("MRI",), 16),
    "whole-body CT": Kind(((800, 512, 512), (640, 512, 512)), ((1.5, 0.98, 0.98), (2.0, 1.17, 1.17)), ("CT",), 300),
    "brain MR, 4 channels": Kind(((140, 172, 138),), ((1.0, 1.0, 1.0),), ("FLAIR", "T1", "T1c", "T2"), 400),
    "thick cardiac MR": Kind(((12, 320, 280), (9, 288, 288)), ((8.0, 1.2, 1.2), (10.0, 1.4, 1.4)), ("MRI",), 60),
    "x-ray": Kind(((1, 3000, 2500), (1, 2048, 2048)), ((1.0, 0.14, 0.14), (1.0, 0.17, 0.17)), ("XR",), 1000),
    "mixed MR": Kind(
        ((24, 512, 512), (180, 256, 256), (40, 64, 64), (480, 480, 30)),
        ((6.0, 0.45, 0.45), (1.0, 1.0, 1.0), (4.0, 4.0, 4.0), (0.5, 0.5, 9.0)),
        ("MRI",),
        80,
    ),
}


def synthetic_inputs(kind: Kind, number: int = 501, cases: int | None = None) -> tuple[RawDataset, Fingerprint]:
    """Return a data set of a kind and its fingerprint, as measured without images.

    Args:
        kind: Kind of the data set.
        number: Number of the data set.
        cases: Number of cases in place of the kind's.
    """
    name = f"Dataset{number}_Synthetic"
    wide = any("CT" in channel for channel in kind.channels)
    statistics = (
        IntensityStatistics(60.0, 60.0, 70.0, -900.0, 1500.0, -150.0, 300.0)
        if wide
        else IntensityStatistics(300.0, 290.0, 120.0, 0.0, 900.0, 10.0, 800.0)
    )
    channels = len(kind.channels)
    ending = ".nii.gz"
    records, raw_cases = [], []
    for index in range(cases or kind.cases):
        turn = index % np.lcm(len(kind.shapes), len(kind.spacings_mm))
        shape = kind.shapes[turn % len(kind.shapes)]
        spacing = kind.spacings_mm[turn % len(kind.spacings_mm)]
        records.append(
            CaseRecord(f"case_{index:06}", shape, spacing, "LPS", channels, shape, 1.0, 0.5, (statistics,) * channels,
                       (0.0,) * channels, str(index))
        )  # fmt: skip
        raw_cases.append(
            RawCase(f"case_{index:06}", tuple(Path(f"/x/{index}_{c:04}{ending}") for c in range(channels)))
        )
    dataset_json = {
        "channel_names": {str(c): n for c, n in enumerate(kind.channels)},
        "labels": {"background": 0, "foreground": 1},
        "numTraining": len(records),
        "file_ending": ending,
    }
    dataset = RawDataset(name, Path("/x"), ending, kind.channels, tuple(raw_cases), "SimpleITKIO", dataset_json, ())
    fingerprint = Fingerprint(
        1,
        name,
        "digest",
        kind.channels,
        kind.channels,
        tuple(records),
        (),
        (),
        {str(c): statistics for c in range(channels)},
    )
    return dataset, fingerprint
