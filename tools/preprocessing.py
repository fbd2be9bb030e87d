"""Compare preprocessing by nnssl and by nnU-Net on the same cases.

Both run in this process, case by case. nnU-Net also resamples and writes the segmentation, which it needs::

    python -m tools.preprocessing --dataset 501 --labelled 4 --cases 20
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import blosc2
import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.case_store import CaseStore
from nnssl.data.preprocess import Job, preprocess_case
from nnssl.data.raw import read_dataset
from nnssl.data.recipe import find_outdated, plan_targets
from nnssl.paths import resolve_folders
from nnssl.plan import read_plan
from nnssl.sizes import in_bytes
from tools.machine import describe
from trainers.pretraining.pretrain import find_plan


def main() -> None:
    """Print one row: cases per second of both, their ratio, the largest difference of a voxel, and disk space."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="data set whose plan is used, number or name")
    parser.add_argument("--labelled", required=True, help="data set with the same images and labels, for nnU-Net")
    parser.add_argument("--configuration", default="3d_fullres", help="configuration of the plan (default: 3d_fullres)")
    parser.add_argument("--cases", type=int, default=12, help="number of cases (default: 12)")
    args = parser.parse_args()
    folders = resolve_folders()
    plan = read_plan(find_plan(folders, args.dataset, "nnsslPlans"))
    dataset = read_dataset(args.labelled, folders)
    labels = folders.raw / dataset.name / "labelsTr"
    manager = PlansManager(plan.nnunet)
    configuration = manager.get_configuration(args.configuration)
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary) / "nnssl", Path(temporary) / "nnunet"
        theirs.mkdir()
        targets = plan_targets(plan, ours, [args.configuration])
        for target in targets:
            target.folder.mkdir(parents=True)
        seconds = {"nnssl": 0.0, "nnunet": 0.0}
        for case in dataset.cases[: args.cases]:
            started = perf_counter()
            wanted = find_outdated(case, dataset.reader, targets, {})
            assert preprocess_case(Job(case, dataset.reader, tuple(wanted))) is None
            seconds["nnssl"] += perf_counter() - started
            started = perf_counter()
            DefaultPreprocessor(verbose=False).run_case_save(
                str(theirs / case.name),
                [str(image) for image in case.images],
                str(labels / f"{case.name}{dataset.file_ending}"),
                manager,
                configuration,
                dataset.dataset_json,
            )
            seconds["nnunet"] += perf_counter() - started
        store = CaseStore(targets[0].folder)
        largest = 0.0
        for name in store.names:
            mine = store.case(name).read_box((0, 0, 0), store.case(name).shape)
            largest = max(largest, float(np.abs(mine - blosc2.open(str(theirs / f"{name}.b2nd"), mode="r")[:]).max()))
        disk = {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in (ours, theirs)}
    raw = sum(image.stat().st_size for case in dataset.cases[: args.cases] for image in case.images)
    rate = {name: len(store.names) / value for name, value in seconds.items()}
    print(describe())
    print(
        "| data set | cases | nnssl (cases/s) | nnU-Net (cases/s) | ratio | largest difference | raw images | nnssl | nnU-Net | "
        "disk space (ratio) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {dataset.name} | {len(store.names)} | {rate['nnssl']:.2f} | {rate['nnunet']:.2f} | "
        f"{rate['nnssl'] / rate['nnunet']:.2f} | {largest:.1e} | {in_bytes(raw)} | {in_bytes(disk[ours])} | "
        f"{in_bytes(disk[theirs])} | {disk[ours] / disk[theirs]:.2f} |"
    )


if __name__ == "__main__":
    main()
