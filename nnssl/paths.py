"""nnU-Net's three folders, resolved when they are used.

nnssl reads and writes where nnU-Net does, so every command takes the environment variables ``nnUNet_raw``,
``nnUNet_preprocessed`` and ``nnUNet_results``. One that is not set becomes a folder below ``./nnssl_workspace``
and is put into the environment, so that nnU-Net code of the same process finds the same place.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.log import logger

VARIABLES = {"raw": "nnUNet_raw", "preprocessed": "nnUNet_preprocessed", "results": "nnUNet_results"}


@dataclass(frozen=True)
class Folders:
    """Where raw data sets, preprocessed data sets and results lie."""

    raw: Path
    preprocessed: Path
    results: Path


def resolve_folders() -> Folders:
    """Return nnU-Net's folders, falling back to ``./nnssl_workspace`` for each variable that is not set.

    Returns:
        The three folders as absolute paths; ``preprocessed`` and ``results`` exist and can be written to.

    Raises:
        UserError: a folder cannot be made or written to.
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
    """Make a folder if it is missing and check that files can be made in it.

    Raises:
        UserError: the folder cannot be made or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".nnssl_write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror}); choose a folder that you may write to"
        ) from error
    return folder
