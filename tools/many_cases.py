"""Time and memory of import, planning, preprocessing, loading and the start of a training, by the number of cases.

The cases are small volumes of smoothed noise around a bright body, all different. Every step is a command of its own, whose
largest process is measured::

    python -m tools.many_cases --cases 100 1000 10000
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scipy.ndimage import gaussian_filter

from tools.machine import describe

SHAPE = (20, 40, 40)
DATASET = 501


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    memory_gb: float
    """Largest resident memory of one of its processes."""
    output: str


def write_images(folder: Path, cases: int) -> None:
    """Write volumes of int16, 1 mm isotropic, as ``case_<number>.nii.gz``."""
    folder.mkdir()
    inside = np.linalg.norm(np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")), axis=0) < 0.9
    for number in range(cases):
        noise = gaussian_filter(np.random.default_rng(number).normal(size=SHAPE), 2)
        volume = (inside * (500 + 1000 * noise)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(folder / f"case_{number:05d}.nii.gz"), useCompression=True)


def run(*command: str, **variables: str) -> Cost:
    """Run a command of the package as a module and return its cost.

    Raises:
        SystemExit: If it fails; its output is printed.
    """
    started = perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return Cost(perf_counter() - started, usage.ru_maxrss / 1024**2, output)


def load(method: str, configuration: str, patches: int) -> None:
    """Read patches as a training does and print the seconds until the first batch, and patches per second after it."""
    from trainers.pretraining.pretrain_trainer import PretrainTrainer  # noqa: F401  the imports of a training are not timed

    started = perf_counter()
    from nnssl.data.case_store import CaseStore
    from nnssl.data.loader import make_loader
    from nnssl.paths import resolve_folders
    from nnssl.plan import read_plan
    from trainers.pretraining.pretrain import find_plan

    folders = resolve_folders()
    plan = read_plan(find_plan(folders, str(DATASET), "nnsslPlans"))
    planned = plan.pretext.configurations[configuration]
    store = CaseStore(folders.preprocessed / plan.dataset_name / planned.case_folder)
    batch = 8
    loader = make_loader(store, planned.patch_size, batch, 0, method, 0, patches // batch, num_workers=1)
    batches = iter(loader)
    next(batches)
    first = perf_counter() - started
    read = sum(len(each.volumes) for each in batches)
    print(f"{first:.2f} {read / (perf_counter() - started - first):.0f}")


def measure(cases: int, configuration: str, method: str) -> None:
    """Print one row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "images", cases)
        names = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
        for path in names.values():
            Path(path).mkdir()
        number = str(DATASET)
        imported = run(
            *("nnssl.cli.import_data", str(folder / "images"), "-d", number, "-n", "Many", "--channels", "MRI"), **names
        )
        prepare = ("nnssl.cli.plan_and_preprocess", "-d", number, "--preset", "cpu", "--processes", "2")
        planned = run(*prepare, "--no-preprocessing", **names)
        preprocessed = run(*prepare, "-c", configuration, **names)
        again = run(*prepare, "-c", configuration, **names)
        loaded = run("tools.many_cases", "--load", configuration, "--method", method, "--cases", str(cases), **names)
        first, per_second = loaded.output.split()[-2:]
        trained = run(
            *("nnssl.cli.pretrain", "-m", method, "-d", number, "-c", configuration, "--epochs", "1"),
            *("--iterations-per-epoch", "1", "--device", "cpu", "--retrieval-every", "0", "--set", "batch_size=2"),
            **names,
        )
    cells = [f"{each.seconds:.0f} s, {each.memory_gb:.2f} GB" for each in (imported, planned, preprocessed, again)]
    cells += [f"{first} s", f"{per_second}/s, {loaded.memory_gb:.2f} GB"]
    cells.append(f"{trained.seconds:.0f} s, {trained.memory_gb:.2f} GB")
    print(f"| {cases} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print one row for each number of cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=int, default=[100, 1000, 10000], help="numbers of cases")
    parser.add_argument("--configuration", default="3d_fullres", help="(default: 3d_fullres)")
    parser.add_argument("--method", default="pix2rep", help="method whose start is timed (default: pix2rep)")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.method, args.load, args.cases[0])
        return
    print(describe())
    print(
        "| cases | import | fingerprint and plan | preprocessing | preprocessing again | first batch | loading an epoch | "
        "a training of one step |\n|---|---|---|---|---|---|---|---|"
    )
    for cases in args.cases:
        measure(cases, args.configuration, args.method)


if __name__ == "__main__":
    main()
