"""How many readers a GPU needs: patches per second that a pretext stage takes on it, and that one reader delivers.

The need is that of the network's multiply-adds, forward and backward, at a share of the GPU's peak. Supply is measured on cases
of smoothed noise of the size that the plan gives them, once from the page cache and once after it was told to forget them, by one
reader in this process with one thread::

    python -m tools.loader_speed --kind BTCV --presets 24gb 80gb
"""

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import blosc2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from nnssl.data.case_store import CaseProperties, CaseStore, write_case
from nnssl.data.loader import make_loader
from nnssl.data.patch_boxes import as_volume
from nnssl.plan import PretextConfiguration
from nnssl.sizes import in_voxels
from planners.presets import PRESETS
from tools.machine import describe
from tools.synthetic_fingerprints import KINDS, Kind
from tools.table_of_steps import plan_of

GRAIN = 0.1
"""Standard deviation of the noise between neighbouring voxels, relative to that of the image; scans have about as much."""


def write_cases(folder: Path, kind: Kind, stage: PretextConfiguration, patch: tuple[int, ...], cases: int) -> None:
    """Write cases of a kind at a plan's spacing."""
    shape, spacing = kind.shapes[0], kind.spacings_mm[0]
    size = tuple(round(n * mm / new) for n, mm, new in zip(shape, spacing, as_spacing(stage, spacing), strict=True))
    z, y, x = size
    everywhere = np.stack([np.random.default_rng(0).integers(n, size=10000) for n in size], axis=1)
    for index in range(cases):
        rng = np.random.default_rng(index)
        volume = np.stack(
            [gaussian_filter(rng.normal(size=size), 3) * 50 + GRAIN * rng.normal(size=size) for _ in kind.channels]
        ).astype(np.float32)
        properties = CaseProperties(2, (z, y, x), len(kind.channels), (1.0, 1.0, 1.0), (), "", 1.0, 1.0, None)
        write_case(folder, f"case_{index}", volume, everywhere, properties, patch)


def as_spacing(stage: PretextConfiguration, own: tuple[float, ...]) -> tuple[float, ...]:
    """Return the plan's spacing (z, y, x); that of the scan along axes which the plan does not have."""
    return (*own[: 3 - len(stage.spacing_mm)], *stage.spacing_mm)


def patches_per_second(folder: Path, patch: tuple[int, ...], patches: int, cold: bool) -> float:
    """Return what one reader delivers in batches of one patch per case; ``cold`` forgets files and open cases before each."""
    store = CaseStore(folder)
    batch, seconds = len(store.names), 0.0
    steps = -(-patches // batch)
    list(make_loader(store, patch, batch, 0, "speed", 0, 1, learnable=True))  # opens the cases
    for step in range(steps):
        if cold:
            forget(folder)
            store = CaseStore(folder)
        started = perf_counter()
        list(make_loader(store, patch, batch, 0, "speed", step, step + 1, learnable=True))
        seconds += perf_counter() - started
    return batch * steps / seconds


def forget(folder: Path) -> None:
    """Tell the system to drop the files of a folder from the page cache."""
    for path in folder.rglob("*.b2nd"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print one row for each stage of each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(KINDS), default="BTCV", help="kind of data (default: BTCV)")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["24gb"], help="(default: 24gb)")
    parser.add_argument("--stages", nargs="+", help="stages (default: all)")
    parser.add_argument(
        "--peak", type=float, default=989e12, help="bfloat16 operations per second (default: an H200's)"
    )
    parser.add_argument("--share", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    parser.add_argument("--cases", type=int, default=4, help="cases to read from (default: 4)")
    parser.add_argument("--patches", type=int, default=32, help="patches to read (default: 32)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    print(describe())
    print(
        "| preset | stage | patch | needed per second | one reader, warm | cold | readers |\n|---|---|---|---|---|---|---|"
    )
    done: dict[tuple[object, ...], tuple[float, float]] = {}
    for preset in args.presets:
        plan = plan_of(args.kind, preset)
        for name, configuration in plan.pretext.configurations.items():
            for stage, planned in configuration.stages.items():
                if args.stages and stage not in args.stages:
                    continue
                patch = tuple(planned.schedule.patch_size)
                needed = args.share * args.peak / (2 * planned.cost.multiply_adds) * planned.schedule.batch_size
                key = (*as_spacing(configuration, KINDS[args.kind].spacings_mm[0]), as_volume(patch))
                if key not in done:
                    with tempfile.TemporaryDirectory() as temporary:
                        folder = Path(temporary)
                        write_cases(folder, KINDS[args.kind], configuration, patch, args.cases)
                        warm, cold = (patches_per_second(folder, patch, args.patches, each) for each in (False, True))
                        done[key] = warm, cold
                warm, cold = done[key]
                print(
                    f"| `{preset}` | `{stage}` in `{name}` | {in_voxels(patch)} | {needed:.0f} | {warm:.0f} | {cold:.0f} | "
                    f"{needed / warm:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
