"""Supervoxels of preprocessed cases, computed once and stored in ``supervoxels/<edge>mm_v<version>/<case>.b2nd``.

Source: Achanta et al., SLIC Superpixels Compared to State-of-the-Art Superpixel Methods, PAMI 2012, as implemented in
scikit-image.

A case has one partition for each edge length in mm. An edge length determines the number of supervoxels: the number of cubes of
this edge (in slices, squares) that would fill the volume. SLIC spaces its seeds equally in voxels, not in mm. Therefore it runs
on an isotropic grid with a spacing of a sixth of the edge, but no finer than the finest spacing of the case. Each voxel of the
case then takes the label of its nearest grid position. Where slices are thicker than half the edge, every slice is partitioned
on its own.

Every edge has a folder of its own, so that runs with different edges do not disturb one another. A file also holds the digest of
the case that it was computed from.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import numpy as np
from jaxtyping import Float32, Int32
from scipy.ndimage import map_coordinates

from nnssl.data.case_store import SUPERVOXELS, CaseStore, StoredCase
from nnssl.data.jobs import follow_jobs, run_list
from nnssl.data.packed_arrays import COMPRESSION, layout, open_array
from nnssl.files import write_atomically

VERSION = 1
GRID_SHARE = 1 / 6
"""Spacing of the grid that SLIC runs on, as a share of the edge."""
THICK_SHARE = 1 / 2
"""Spacing of slices, as a share of the edge, from which each slice is partitioned on its own."""
COMPACTNESS = 0.1
"""Weight of distances in space against those in intensity, which lie between 0 and 1."""
LEAST_RANGE = 1e-3
"""Smallest range of intensities that the weight is adapted to; below it, space alone decides."""
SMOOTHING = 1.0
"""Standard deviation of the Gaussian that smooths the grid, in its cells."""
ITERATIONS = 5
RANGE_SHARES = (1.0, 99.0)
"""Percentiles of a channel that become 0 and 1."""


def folder_of(cases: Path, edge_mm: float) -> Path:
    """Return the folder of the partitions with an edge, below the folder of the cases."""
    return cases / SUPERVOXELS / f"{edge_mm:g}mm_v{VERSION}"


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
    missing = missing_supervoxels(store, edges_mm)
    for edge in edges_mm:
        folder_of(store.folder, edge).mkdir(parents=True, exist_ok=True)
    work = partial(write_supervoxels, folder=store.folder, edges_mm=tuple(edges_mm))
    for _ in follow_jobs(run_list(work, missing, processes), "partitioning", "partitioned", len(missing)):
        pass
    return len(missing)


def missing_supervoxels(store: CaseStore, edges_mm: Sequence[float]) -> list[str]:
    """Return the names of the cases that lack current supervoxels of one of the edges."""
    return [name for name in store.names if not all(_is_current(store.case(name), edge) for edge in edges_mm)]


def write_supervoxels(name: str, folder: Path, edges_mm: Sequence[float]) -> str:
    """Compute and store the supervoxels of a case with those edges that are missing.

    Args:
        name: Name of the case.
        folder: Folder of the preprocessed cases.
        edges_mm: Edges of the supervoxels in mm.

    Returns:
        The name of the case.
    """
    case = StoredCase(folder, name)
    scaled = scale_intensities(case.read_box((0, 0, 0), case.shape))
    block, chunk = layout(case.shape, case.shape[1:])
    for edge in edges_mm:
        if _is_current(case, edge):
            continue
        packed = blosc2.asarray(
            partition(scaled, case.spacing_mm, edge), chunks=chunk, blocks=block, cparams=COMPRESSION
        )
        packed.schunk.vlmeta["digest"] = case.properties.digest
        write_atomically(folder_of(folder, edge) / f"{name}.b2nd", partial(_write, packed.to_cframe()))
    return name


def scale_intensities(volume: Float32[np.ndarray, "channel z y x"]) -> Float32[np.ndarray, "channel z y x"]:
    """Return intensities with two percentiles of each channel at 0 and 1, clipped there.

    The sum over the channels of squared differences has the same range for any number of channels.
    """
    scaled = np.empty_like(volume)
    for channel, values in zip(scaled, volume, strict=True):
        low, high = (np.float32(bound) for bound in np.percentile(values, RANGE_SHARES))
        np.subtract(values, low, out=channel)
        channel /= max(high - low, np.float32(1e-6))
        np.clip(channel, 0, 1, out=channel)
    scaled /= np.float32(np.sqrt(len(volume)))
    return scaled


def partition(
    scaled: Float32[np.ndarray, "channel z y x"], spacing_mm: Sequence[float], edge_mm: float
) -> Int32[np.ndarray, "z y x"]:
    """Return the supervoxel of every voxel, counted from 1.

    Args:
        scaled: Intensities, as from ``scale_intensities``.
        spacing_mm: Spacing (z, y, x) in mm.
        edge_mm: Edge of a supervoxel in mm.
    """
    if spacing_mm[0] <= THICK_SHARE * edge_mm and scaled.shape[1] > 1:
        return _partition(scaled, spacing_mm, edge_mm)
    parts, found = [], 0
    for number in range(scaled.shape[1]):
        part = _partition(scaled[:, number], spacing_mm[1:], edge_mm)
        parts.append(part + found)
        found += int(part.max())
    return np.stack(parts)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _is_current(case: StoredCase, edge_mm: float) -> bool:
    """Return whether the supervoxels of a case exist and were computed from its present voxels."""
    path = folder_of(case.folder, edge_mm) / f"{case.name}.b2nd"
    if not path.exists():
        return False
    try:
        array = open_array(path)
        return bool(array.schunk.vlmeta["digest"] == case.properties.digest)
    except (OSError, RuntimeError, ValueError, KeyError):
        return False


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
        compactness=COMPACTNESS / max(float(np.ptp(grid)), LEAST_RANGE),  # slic stretches the intensities to 0 and 1
        sigma=SMOOTHING,
        max_num_iter=ITERATIONS,
        convert2lab=False,  # three channels are no colours
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
