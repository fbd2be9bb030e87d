"""nnU-Net's three folders, resolved when they are used.

nnssl reads and writes in the same folders as nnU-Net, so every command uses the environment variables ``nnUNet_raw``,
``nnUNet_preprocessed`` and ``nnUNet_results``. A variable that is not set is set to a folder below ``./nnssl_workspace``, so
that nnU-Net's code in the same process uses the same folder.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.files import is_utf8, printable
from nnssl.log import logger

VARIABLES = {"raw": "nnUNet_raw", "preprocessed": "nnUNet_preprocessed", "results": "nnUNet_results"}
PROBES_FOLDER = "nnssl_auto"
"""Folder below the results of a data set for the short runs from which a method is chosen; their weights are never taken."""


@dataclass(frozen=True)
class Folders:
    """The folders of raw data sets, preprocessed data sets and results."""

    raw: Path
    preprocessed: Path
    results: Path


def resolve_folders() -> Folders:
    """Return nnU-Net's folders, below ``./nnssl_workspace`` for each variable that is not set.

    Returns:
        The three folders as absolute paths; ``preprocessed`` and ``results`` exist and can be written to.

    Raises:
        UserError: If a folder cannot be created or written to.
    """
    folders = {}
    for name, variable in VARIABLES.items():
        value = os.environ.get(variable)
        if not value:
            folder = Path.cwd() / "nnssl_workspace" / name
            os.environ[variable] = str(folder)
            logger.info(f"{variable} is not set: using {folder}")
        else:
            folder = Path(value).expanduser().absolute()
        if not is_utf8(folder):
            raise UserError(
                f"{variable}: {printable(folder)} has a path that is not UTF-8, which ITK cannot open; rename it"
            )
        if name != "raw" or not value:
            make_writable(folder)
        folders[name] = folder
    return Folders(**folders)


@contextmanager
def use_folders(folders: Folders | None) -> Iterator[Folders]:
    """Let nnU-Net's code use the same folders as the caller inside a ``with`` block.

    Args:
        folders: Folders to use; None for those of the environment.

    Yields:
        The folders.

    Raises:
        UserError: As ``resolve_folders``.
    """
    used = folders or resolve_folders()
    with variables(
        nnUNet_raw=str(used.raw), nnUNet_preprocessed=str(used.preprocessed), nnUNet_results=str(used.results)
    ):
        yield used


def make_writable(folder: Path) -> Path:
    """Create a folder if it does not exist, and check that files can be created in it.

    Raises:
        UserError: If the folder cannot be created or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".nnssl_write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: the folder is not writable ({error.strerror}); choose another folder") from error
    return folder
