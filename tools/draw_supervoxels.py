"""Draw the supervoxels of preprocessed data sets, one row for each: a slice of one case with the borders of every size.

python -m tools.draw_supervoxels regions.png PREPROCESSED/Dataset501_A/nnsslPlans_cases_3d:24,48 ...
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from skimage.segmentation import find_boundaries

from nnssl.data.case_store import CaseStore
from nnssl.data.supervoxels import partition, scale_intensities

PIXELS = 400
"""Approximate width of a picture."""
COLOUR = (1.0, 0.35, 0.0)


def draw(folder: Path, edges_mm: list[float], case: int) -> list[tuple[str, np.ndarray]]:
    """Return a title and a picture for each size."""
    store = CaseStore(folder)
    stored = store.case(store.names[case])
    volume = stored.read_box((0, 0, 0), stored.shape)
    middle = volume.shape[1] // 2
    low, high = np.percentile(volume[0, middle], (1, 99))
    image = np.clip((volume[0, middle] - low) / (high - low), 0, 1)
    factor = max(1, round(PIXELS / image.shape[1]))
    found = []
    for edge in edges_mm:
        parts = partition(scale_intensities(volume), stored.spacing_mm, edge)[middle]
        picture = np.repeat(np.kron(image, np.ones((factor, factor)))[..., None], 3, axis=2)
        picture[find_boundaries(np.kron(parts, np.ones((factor, factor), int)), mode="inner")] = COLOUR
        found.append((f"{folder.parent.name}, {edge:g} mm", picture))
    return found


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER:EDGES", help="folder of preprocessed cases, and edges in mm"
    )
    parser.add_argument("--case", type=int, default=3, help="index of the case (default: 3)")
    args = parser.parse_args()
    rows = []
    for each in args.folders:
        folder, _, edges = each.rpartition(":")
        rows.append(draw(Path(folder), [float(edge) for edge in edges.split(",")], args.case))
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(5 * columns, 5 * len(rows)), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for place, (title, picture) in zip(line, row, strict=True):
            place.imshow(picture, interpolation="nearest")
            place.set_title(title)
            place.axis("off")
    figure.tight_layout()
    figure.savefig(args.output, dpi=50)


if __name__ == "__main__":
    main()
