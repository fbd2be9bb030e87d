"""Writing files so that a half-written one never looks whole."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name, which takes the place of what was there when the block ends well.

    Args:
        folder: the folder; the one that it lies in must exist.

    Yields:
        The temporary folder, empty.

    Raises:
        UserError: something cannot be written there.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def file_digest(path: Path) -> str:
    """Return a digest of a file's bytes, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_digest(content: Any) -> str:
    """Return a digest of plain content, whatever the order of its keys, 8 hexadecimal digits: short enough for a folder name."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=4).hexdigest()


def read_names(path: Path) -> list[str]:
    """Read a list of cases: one name per line; empty lines and lines that start with ``#`` are passed over.

    Raises:
        UserError: no such file, no name in it, or a name twice.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a list of cases ({error}); give a text file, one name per line"
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"{path}: names no case; write one name per line")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: names {some(twice)} more than once; name each case once")
    return names


def some(names: Sequence[str]) -> str:
    """Return the first three of some names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table with a header line, atomically, in the form that spreadsheets open."""

    def write(file: BinaryIO) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows(rows)
        file.write(text.getvalue().encode())

    write_atomically(path, write)
