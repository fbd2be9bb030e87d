"""Reading and writing files. A file is written completely or not at all."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nnssl.errors import UserError

MOST_NAME_BYTES = 255
"""Largest length of a file name on all usual file systems, in bytes."""


def temporary_path(path: Path) -> Path:
    """Return the hidden name beside a file or folder under which this process writes it; no longer than a name may be."""
    ending = f".{os.getpid()}.tmp"
    name = f".{path.name}{ending}"
    if len(bytes_of(name)) > MOST_NAME_BYTES:
        name = f".{hashlib.blake2b(bytes_of(path.name), digest_size=16).hexdigest()}{ending}"
    return path.with_name(name)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it.

    Args:
        path: File to write; its folder must exist.
        write: Function that is called with the open binary file.

    Raises:
        UserError: If the file cannot be written (no space, no permission).
    """
    temporary = temporary_path(path)
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
    """Fill a folder under a temporary name, which replaces the folder if the ``with`` block ends without an error.

    Args:
        folder: Folder to write; its parent must exist.

    Yields:
        The empty temporary folder.

    Raises:
        UserError: If the folder or a file in it cannot be written.
    """
    temporary = temporary_path(folder)
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
    """Write plain Python content to an indented JSON file atomically, with the keys in the given order."""
    text = json.dumps(content, indent=4) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: File to read.
        what: Kind of file ("plan", "fingerprint"), for the error message.

    Raises:
        UserError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such {what}; check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a {what} ({error}); write the file again") from error


def file_digest(path: Path) -> str:
    """Return a digest of the bytes of a file, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_digest(content: Any) -> str:
    """Return a digest of plain content that does not depend on the order of its keys.

    It has 8 hexadecimal digits, so that it fits into a folder name.
    """
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=4).hexdigest()


def read_names(path: Path) -> list[str]:
    """Read a list of cases, one name per line. Empty lines and lines that start with ``#`` are ignored.

    Raises:
        UserError: If the file does not exist, holds no name, or holds a name twice.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a list of cases ({error}); give a text file with one name per line"
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"{path}: holds no case name; write one name per line")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: lists {some(twice)} more than once; list each case once")
    return names


def some(names: Sequence[str]) -> str:
    """Return the first three of a list of names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def printable(path: Path | str) -> str:
    r"""Return a path as text of one line that can be printed and written: other bytes than UTF-8 become ``\xe9``."""
    text = bytes_of(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)


def is_utf8(path: Path | str) -> bool:
    """Return whether a path is UTF-8; ITK ends the process on any other."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bytes_of(path: Path | str) -> bytes:
    """Return a path as the file system has it."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair, as only JSON can contain
        return str(path).encode("utf-8", "surrogatepass")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table with a header line to a CSV file atomically."""

    def write(file: BinaryIO) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows(rows)
        file.write(text.getvalue().encode())

    write_atomically(path, write)
