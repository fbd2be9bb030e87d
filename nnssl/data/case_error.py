"""Cases that cannot be used: the error for a single case, which does not end the command, and its record."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nnssl.files import bytes_of, is_utf8, printable
from nnssl.schema import STRICT

MOST_SET_ASIDE = 0.1
"""Largest fraction of unusable cases; if more are unusable, the data set itself is assumed to be wrong."""


@dataclass(frozen=True)
class SetAside:
    """A case or file that is not used, and the reason."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    file: str
    reason: str


class CaseError(Exception):
    """An error that makes a single case unusable.

    Attributes:
        file: Image file that causes the error.
        reason: What is wrong, worded so that the file is the subject: "is truncated".
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


TOO_LARGE = "does not fit into memory; use fewer processes, or remove the case"
"""Reason for a case that needs more memory than there is."""


NOT_UTF8 = "has a path that is not UTF-8, which ITK cannot open; rename it"
MOST_NAME_BYTES = 240
"""Largest length of a case's name in bytes. File systems allow 255, of which the files of a preprocessed case add up to 15."""


def check_file(file: Path) -> None:
    """Check that there is a file that ITK can open.

    Raises:
        CaseError: If there is none, or if its path is not UTF-8.
    """
    if not is_utf8(file):
        raise CaseError(printable(file), NOT_UTF8)
    if not file.is_file():
        raise CaseError(str(file), "is a folder" if file.is_dir() else "does not exist")


def fault_of_name(case: str) -> str | None:
    """Return why a name cannot be that of a case, worded so that its file is the subject; None if it can."""
    if not is_utf8(case):
        return NOT_UTF8
    if len(bytes_of(case)) > MOST_NAME_BYTES:
        return (
            f"has a name that is too long: that of a case may have {MOST_NAME_BYTES} bytes, because file names made from it are "
            f"longer, got {len(bytes_of(case))}; rename it"
        )
    if re.search(r"[\x00-\x1f\x7f/]", case) or not case.strip() or case.startswith("."):
        return f"belongs to a case whose name cannot be that of a file or line of text, {case!r}; rename it"
    return None


def ended_process(death: str) -> str:
    """Return the reason for a case on which a worker process ended, such as by ``signal 11 (SIGSEGV)``."""
    return f"ended the process that worked on it by {death}"


def describe(error: Exception) -> str:
    """Return the last line of an error's message, after its type unless the type says no more than that it is an error."""
    name = type(error).__name__
    line = last_line(error)
    return (
        line
        if line and isinstance(error, (RuntimeError, ValueError, AssertionError))
        else f"{name}: {line}".rstrip(": ")
    )


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, which contains the reason for errors of ITK."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
