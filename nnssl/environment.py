"""The environment of a process: variables, which nnU-Net reads some of its settings from, and another package of this name."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

OTHER_FOLDERS = ("adaptation_planning", "experiment_planning", "training")
"""Folders of MIC-DKFZ's package ``nnssl``, none of which this package has."""


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables inside a ``with`` block and restore the previous values afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def other_folders() -> list[Path]:
    """Return the sorted folders in which MIC-DKFZ's package ``nnssl`` is found in this environment."""
    folders = {Path(entry or ".").absolute() / "nnssl" for entry in sys.path} | {Path(__file__).parent}
    return sorted(folder for folder in folders if any(os.path.isdir(folder / name) for name in OTHER_FOLDERS))


def other_nnssl() -> list[str]:
    """Return where MIC-DKFZ's package ``nnssl`` is found in this environment, as text for the user; empty if it is not.

    Both import as ``nnssl`` and have a command ``nnssl_plan_and_preprocess``, so one hides the other.
    """
    commands = {
        f"command {command.name} ({command.value})"
        for command in entry_points(group="console_scripts")
        if command.value.startswith("nnssl.") and not command.value.startswith("nnssl.cli.")
    }
    return [*map(str, other_folders()), *sorted(commands)]
