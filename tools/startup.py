"""Measure how long ``--help`` of nnssl's and nnU-Net's commands takes: ``python -m tools.startup --repeats 3``."""

import argparse
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from time import perf_counter

OWN = tuple(sorted(each.name for each in entry_points(group="console_scripts") if each.value.startswith("nnssl.")))
COMMANDS = (*OWN, "nnUNetv2_plan_and_preprocess", "nnUNetv2_train")


def main() -> None:
    """Print a table with the shortest and the median time of each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command (default: 5)")
    repeats = parser.parse_args().repeats
    print("| command, with `--help` | shortest (s) | median (s) |\n|---|---|---|")
    for name in COMMANDS:
        path = shutil.which(name, path=str(Path(sys.executable).parent)) or name
        times = []
        for _ in range(repeats):
            started = perf_counter()
            subprocess.run([path, "--help"], check=True, capture_output=True)
            times.append(perf_counter() - started)
        print(f"| `{name}` | {min(times):.2f} | {statistics.median(times):.2f} |")


if __name__ == "__main__":
    main()
