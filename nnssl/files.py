"""Writing files so that a half-written one never looks whole."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nnssl.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, flush it to disk and rename it into place.

    Args:
        path: the file; its folder must exist.
        write: called with the open binary file.

    Raises:
        UserError: the file cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write plain Python content as indented JSON, atomically, keys in the order given."""
    text = json.dumps(content, indent=4) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it is, for the error message ("plan", "fingerprint").

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such {what}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a readable {what} ({error}); write it again") from error


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table with a header line, atomically, in the form that spreadsheets open."""

    def write(file: BinaryIO) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows(rows)
        file.write(text.getvalue().encode())

    write_atomically(path, write)
