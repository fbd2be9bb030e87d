"""Curves and pictures of a run for TensorBoard, and for Weights & Biases in its offline mode.

Both packages are extras. Nothing is sent anywhere, and no result of a run depends on its trackers. They are given the same
numbers as ``metrics.csv`` or nnU-Net's ``progress.png``: one value per epoch.

nnU-Net's own logger for Weights & Biases (``nnUNet_wandb_enabled=1``) is online by default and asks the server which epochs it
has. Offline it would repeat the epochs after the last checkpoint when a run resumes, and it has no pictures. ``WandbTracker``
therefore writes the epochs before the checkpoint again, so that its folder always holds one whole run.
"""

import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from nnssl.errors import ArgumentError

PICTURE_PIXELS = 1600
"""Largest height and width of a picture that TensorBoard is given."""
NNUNET_WANDB = "nnUNet_wandb_enabled"
"""Variable that makes nnU-Net write runs of Weights & Biases itself."""


class Tracker(Protocol):
    """One place that curves and pictures are written to."""

    has_earlier_epochs: bool
    """Whether the epochs before the first one of this start are still there and need not be written again."""

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values of an epoch, counted from 0."""

    def write_picture(self, epoch: int, name: str, path: Path) -> None:
        """Write a PNG file as the picture of an epoch."""

    def write_results(self, epochs: int, values: Mapping[str, float]) -> None:
        """Write values that a run has once, after its last epoch."""

    def close(self) -> None:
        """Write what is still in memory."""


class TensorBoardTracker:
    """Writes event files to ``tensorboard/`` in the folder of a run.

    Args:
        folder: Folder of the run.
        settings: Everything that determines the run.
        first_epoch: Epoch that the run begins or resumes at; TensorBoard drops later epochs of earlier event files.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        own = folder / "tensorboard"
        if first_epoch == 0:
            shutil.rmtree(own, ignore_errors=True)
        self.has_earlier_epochs = any(own.glob("events.*"))
        self._writer: Any = SummaryWriter(str(own), purge_step=first_epoch)
        if not self.has_earlier_epochs:
            lines = "\n".join(f"    {key}: {value}" for key, value in settings.items())  # indented: code in Markdown
            self._writer.add_text("settings", lines, 0)

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values of an epoch, counted from 0."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def write_picture(self, epoch: int, name: str, path: Path) -> None:
        """Write a PNG file as the picture of an epoch."""
        with Image.open(path) as picture:
            picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), epoch, dataformats="HWC")
        self._writer.flush()

    def write_results(self, epochs: int, values: Mapping[str, float]) -> None:
        """Write values that a run has once, after its last epoch."""
        self.write_epoch(epochs, values)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


class WandbTracker:
    """Writes an offline run to ``wandb/`` in the folder of a run, for ``wandb sync``.

    Args:
        folder: Folder of the run.
        settings: Everything that determines the run.
        first_epoch: Epoch that the run begins or resumes at; a resumed run keeps its identity.
    """

    has_earlier_epochs = False

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_epoch: int) -> None:
        import wandb

        own = folder / "wandb"
        earlier = next(own.glob("*/run-*.wandb"), None) if first_epoch else None
        shutil.rmtree(own, ignore_errors=True)
        self._make_picture = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nnssl"),
            name=f"{folder.parents[1].name} {folder.parent.name}",
            id=earlier.stem.removeprefix("run-") if earlier is not None else secrets.token_hex(4),
            dir=str(folder),
            mode="offline",
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False),
        )

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values of an epoch, counted from 0."""
        self._run.log(dict(values), step=epoch)

    def write_picture(self, epoch: int, name: str, path: Path) -> None:
        """Write a PNG file as the picture of an epoch."""
        self._run.log({name: self._make_picture(str(path))}, step=epoch)

    def write_results(self, epochs: int, values: Mapping[str, float]) -> None:
        """Write values that a run has once, after its last epoch."""
        self._run.summary.update(dict(values))

    def close(self) -> None:
        """Write what is still in memory."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}
"""Every tracker by the name of its package, which is also that of its extra."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and that their packages are installed.

    Raises:
        ArgumentError: If not, or if nnU-Net is asked to write a run of Weights & Biases as well.
    """
    for name in names:
        if name not in TRACKERS:
            raise ArgumentError(f"track must be one of {', '.join(TRACKERS)}, got {name}", "track")
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder that is only named like the package has no origin
            raise ArgumentError(
                f"track {name} needs the package {name}, which is not installed; run pip install 'nnssl[{name}]'",
                "track",
            )
    if "wandb" in names and os.environ.get(NNUNET_WANDB, "0") in ("1", "True", "true"):
        raise ArgumentError(
            "track wandb and nnUNet_wandb_enabled=1 would both write the run; unset nnUNet_wandb_enabled or omit track",
            "track",
        )


class Tracking:
    """The trackers of a run, possibly none.

    Args:
        names: Names of trackers; of several processes, only the first is given any.
        folder: Folder of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._folder = folder
        self._trackers: dict[str, Tracker] = {}
        self._written = 0

    def start(self, settings: Mapping[str, Any], metrics: Mapping[str, Sequence[float]]) -> None:
        """Open the trackers, unless they are open, and write the earlier epochs of a resumed run to those that lack them.

        Args:
            settings: Everything that determines the run.
            metrics: One value per finished epoch for every name.
        """
        if self._trackers:
            return
        self._written = epochs_of(metrics)
        for name in self._names:
            tracker = TRACKERS[name](self._folder, settings, self._written)
            self._trackers[name] = tracker
            if not tracker.has_earlier_epochs:
                for epoch in range(self._written):
                    tracker.write_epoch(epoch, values_of(metrics, epoch))

    def write(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Write the epochs that were not written yet.

        Args:
            metrics: One value per finished epoch for every name.
        """
        for epoch in range(self._written, epochs_of(metrics)):
            for tracker in self._trackers.values():
                tracker.write_epoch(epoch, values_of(metrics, epoch))
        self._written = epochs_of(metrics)

    def write_picture(self, path: Path) -> None:
        """Write a PNG file as the picture of the last epoch, under the name of the file."""
        if path.exists():
            for tracker in self._trackers.values():
                tracker.write_picture(max(0, self._written - 1), path.stem, path)

    def write_results(self, values: Mapping[str, float]) -> None:
        """Write values that a run has once, after its last epoch."""
        for tracker in self._trackers.values():
            tracker.write_results(self._written, values)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers.values():
            tracker.close()
        self._trackers = {}


def epochs_of(metrics: Mapping[str, Sequence[float]]) -> int:
    """Return the number of epochs that all metrics have."""
    return min(map(len, metrics.values()), default=0)


def values_of(metrics: Mapping[str, Sequence[float]], epoch: int) -> dict[str, float]:
    """Return the values of an epoch, without those that were not measured (NaN)."""
    return {name: float(values[epoch]) for name, values in metrics.items() if not math.isnan(values[epoch])}
