"""Cases that cannot be used: the error for a single case, which does not end the command, and its record."""

from dataclasses import dataclass
from typing import ClassVar

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
