"""Supervoxels of preprocessed cases, computed once and stored beside the voxels as ``<case>_supervoxels.b2nd``.

Source: Achanta et al., SLIC Superpixels Compared to State-of-the-Art Superpixel Methods, PAMI 2012, as implemented in
scikit-image.

A case has one partition for each edge length in mm. An edge length determines the number of supervoxels: the number of cubes of
this edge (in slices, squares) that would fill the volume. SLIC spaces its seeds equally in voxels, not in mm. Therefore it runs
on an isotropic grid with a spacing of a sixth of the edge, but no finer than the finest spacing of the case. Each voxel of the
case then takes the label of its nearest grid position. Where slices are thicker than half the edge, every slice is partitioned
on its own.

The file holds what it was computed from: the digest of the case, the edges, and the version of the rule.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float32, Int32
from scipy.ndimage import map_coordinates

from nnssl.data.case_store import COMPRESSION, ENDING_OF_SUPERVOXELS, CaseStore, StoredCase, layout
from nnssl.data.jobs import follow_jobs, run_list
from nnssl.files import write_atomically

VERSION = 1
GRID_SHARE = 1 / 6
"""Spacing of the grid that SLIC runs on, as a share of the edge."""
THICK_SHARE = 1 / 2
"""Spacing of slices, as a share of the edge, from which each slice is partitioned on its own."""
COMPACTNESS = 0.1
"""Weight of distances in space against those in intensity, which lie between 0 and 1."""
SMOOTHING = 1.0
"""Standard deviation of the Gaussian that smooths the grid, in its cells."""
ITERATIONS = 5
RANGE_SHARES = (1.0, 99.0)
"""Percentiles of a channel that become 0 and 1."""


def prepare_supervoxels(store: CaseStore, edges_mm: Sequence[float], processes: int = 1) -> int:
    """Compute the supervoxels of all cases that have none of these edges yet.

    Args:
        store: The preprocessed cases.
        edges_mm: Edges of the supervoxels in mm.
        processes: Number of worker processes; 1 for this process only.

    Returns:
        Number of cases that were partitioned.

    Raises:
        UserError: If a case cannot be read or a file cannot be written.
    """
    missing = [name for name in store.names if not are_current(store.case(name), edges_mm)]
    work = partial(write_supervoxels, folder=store.folder, edges_mm=tuple(edges_mm))
    for _ in follow_jobs(run_list(work, missing, processes), "partitioning", "partitioned", len(missing)):
        pass
    return len(missing)


def are_current(case: StoredCase, edges_mm: Sequence[float]) -> bool:
    """Return whether the supervoxels of a case exist and were computed from its present voxels with these edges."""
    path = case.folder / f"{case.name}{ENDING_OF_SUPERVOXELS}"
    if not path.exists():
        return False
    try:
        array = blosc2.open(str(path), mode="r")
        stored = dict(array.schunk.vlmeta[:])
    except (OSError, RuntimeError, ValueError):
        return False
    return stored == _origin(case, edges_mm)


def write_supervoxels(name: str, folder: Path, edges_mm: Sequence[float]) -> str:
    """Compute and store the supervoxels of a case, replacing earlier ones.

    Args:
        name: Name of the case.
        folder: Folder of the preprocessed cases.
        edges_mm: Edges of the supervoxels in mm.

    Returns:
        The name of the case.
    """
    case = StoredCase(folder, name)
    volume = case.read_box((0, 0, 0), case.shape)
    parts = np.stack([partition(volume, case.spacing_mm, edge) for edge in edges_mm])
    block, chunk = layout(case.shape, case.shape[1:])
    packed = blosc2.asarray(parts, chunks=(1, *chunk), blocks=(1, *block), cparams=COMPRESSION)
    for key, value in _origin(case, edges_mm).items():
        packed.schunk.vlmeta[key] = value
    write_atomically(folder / f"{name}{ENDING_OF_SUPERVOXELS}", lambda file: file.write(packed.to_cframe()))
    return name


def partition(
    volume: Float32[np.ndarray, "channel z y x"], spacing_mm: Sequence[float], edge_mm: float
) -> Int32[np.ndarray, "z y x"]:
    """Return the supervoxel of every voxel, counted from 1.

    Args:
        volume: Intensities.
        spacing_mm: Spacing (z, y, x) in mm.
        edge_mm: Edge of a supervoxel in mm.
    """
    scaled = _scaled(volume)
    if spacing_mm[0] <= THICK_SHARE * edge_mm and volume.shape[1] > 1:
        return _partition(scaled, spacing_mm, edge_mm)
    parts, found = [], 0
    for number in range(volume.shape[1]):
        part = _partition(scaled[:, number], spacing_mm[1:], edge_mm)
        parts.append(part + found)
        found += int(part.max())
    return np.stack(parts)


def _partition(scaled: Any, spacing_mm: Sequence[float], edge_mm: float) -> Any:
    """Partition a volume or a slice (channel, *shape) on a grid of equal spacing."""
    from skimage.segmentation import slic  # slow to import

    shape = scaled.shape[1:]
    grid_mm = max(min(spacing_mm), GRID_SHARE * edge_mm)
    size = [max(1, round(n * mm / grid_mm)) for n, mm in zip(shape, spacing_mm, strict=True)]
    places = np.meshgrid(*(_centres(n, wanted) for n, wanted in zip(shape, size, strict=True)), indexing="ij")
    grid = np.stack([map_coordinates(channel, places, order=1, mode="nearest") for channel in scaled], axis=-1)
    count = max(1, round(np.prod([n * mm / edge_mm for n, mm in zip(shape, spacing_mm, strict=True)])))
    parts = slic(
        grid,
        n_segments=count,
        compactness=COMPACTNESS,
        sigma=SMOOTHING,
        max_num_iter=ITERATIONS,
        start_label=1,
        channel_axis=-1,
    )
    back = [_nearest(wanted, n) for n, wanted in zip(shape, size, strict=True)]
    return parts[np.ix_(*back)].astype(np.int32)


def _centres(length: int, wanted: int) -> Any:
    """Return the positions of the centres of ``wanted`` cells along an axis of ``length`` voxels, in voxels."""
    return (np.arange(wanted) + 0.5) * length / wanted - 0.5


def _nearest(length: int, wanted: int) -> Any:
    """Return, for each of ``wanted`` voxels, the cell out of ``length`` that it lies in."""
    return np.minimum(((np.arange(wanted) + 0.5) * length / wanted).astype(int), length - 1)


def _scaled(volume: Any) -> Any:
    """Return intensities with two percentiles of each channel at 0 and 1, clipped there."""
    low, high = (
        np.array(bound).reshape(-1, 1, 1, 1)
        for bound in np.percentile(volume.reshape(len(volume), -1), RANGE_SHARES, axis=1)
    )
    return np.clip((volume - low) / np.maximum(high - low, 1e-6), 0, 1).astype(np.float32)


def _origin(case: StoredCase, edges_mm: Sequence[float]) -> dict[str, Any]:
    return {"version": VERSION, "digest": case.properties.digest, "edges_mm": [float(edge) for edge in edges_mm]}
